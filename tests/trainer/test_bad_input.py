"""Mistakes give one clear error on every rank, before training starts where that is possible, and never a hang."""

import pytest
import torch
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, FSDPPrecision

from lightning_slowmo import LocalSGD, SlowMo, SlowMoStrategy
from lightning_slowmo.presets import PRESETS
from tests.harness import run_trainers
from tests.trainer.models import Regression, data, trainer


def test_an_unknown_algorithm_lists_the_known_ones():
    with pytest.raises(ValueError, match="slomo") as raised:
        SlowMoStrategy("slomo")
    assert all(name in str(raised.value) for name in PRESETS)


@pytest.mark.parametrize("algorithm", [None, 3, {"sync_every": 3}, torch.optim.SGD])
def test_an_algorithm_of_the_wrong_type_is_refused(algorithm):
    with pytest.raises(ValueError, match=r"algorithm must be the name of a preset .* or a configuration"):
        SlowMoStrategy(algorithm)


def test_arguments_for_ddp_without_nodes_are_refused():
    with pytest.raises(ValueError, match="workers_per_node is None"):
        SlowMoStrategy(ddp_kwargs={"find_unused_parameters": True})


def test_mps_devices_are_refused():
    strategy = SlowMoStrategy(parallel_devices=[torch.device("mps", 0)])
    strategy.cluster_environment = type("Environment", (), {"local_rank": lambda self: 0})()
    with pytest.raises(ValueError, match="MPS devices cannot take part"):
        strategy.setup_environment()


@pytest.mark.parametrize("plugin", [FSDPPrecision, DeepSpeedPrecision])
def test_precision_plugins_of_sharding_strategies_are_refused(plugin):
    strategy = SlowMoStrategy(parallel_devices=[torch.device("cpu")])
    strategy.cluster_environment = type("Environment", (), {"local_rank": lambda self: 0})()
    strategy._precision_plugin = object.__new__(plugin)
    with pytest.raises(ValueError, match=f"{plugin.__name__} belongs to a strategy that shards the model"):
        strategy.setup_environment()


class Counted(Regression):
    """Counts how often it was trained."""

    steps = 0

    def training_step(self, batch, batch_idx):
        Counted.steps += 1
        return super().training_step(batch, batch_idx)


class RawOptimizer(Counted):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=False)
        super().training_step(batch, batch_idx).backward()
        optimizer.step()


class Frozen(Counted):
    def __init__(self):
        super().__init__()
        self.requires_grad_(False)


class OneFrozen(Counted):
    def __init__(self):
        super().__init__()
        self.net[0].bias.requires_grad_(False)


class Empty(Counted):
    def configure_optimizers(self):
        return torch.optim.SGD([torch.empty(0, requires_grad=True)], lr=0.1)


class OtherOptimizer(Counted):
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


def mistakes(rank):
    """What to train on this rank, and what every rank must be told."""
    first = rank == 0
    return {
        "other width": (LocalSGD(), Counted(hidden=4 + rank), "The model differs between workers"),
        "other freezing": (LocalSGD(), Counted() if first else OneFrozen(), "The model differs between workers"),
        "other optimizer": (LocalSGD(), Counted() if first else OtherOptimizer(), "The model differs between workers"),
        "other period": (LocalSGD(4 + rank), Counted(), "LocalSGD(sync_every=4,"),
        "other algorithm": (LocalSGD() if first else SlowMo(), Counted(), "The algorithm differs between workers"),
        "all frozen": (LocalSGD(), Frozen(), "There is nothing to train"),
        "empty": (LocalSGD(), Empty(), "There is nothing to train"),
        "sync_batchnorm": (LocalSGD(), Counted(batch_norm=True), "sync_batchnorm=True"),
        "raw optimizer": (LocalSGD(), RawOptimizer(), "use_pl_optimizer=False"),
    }


def make_mistakes(rank):
    told = {}
    for name, (algorithm, module, _) in mistakes(rank).items():
        Counted.steps = 0
        fitting = trainer(2, SlowMoStrategy(algorithm), sync_batchnorm=name == "sync_batchnorm")
        try:
            fitting.fit(module, data(rank))
        except Exception as error:
            told[name] = f"{type(error).__name__}: {error}", Counted.steps
        else:
            told[name] = "no error", Counted.steps
    return told


@pytest.mark.processes
def test_mistakes_that_only_the_workers_together_can_see_end_with_one_error_on_all_of_them():
    expected = mistakes(0)
    first, second = run_trainers(2, make_mistakes)
    for name, (_, _, text) in expected.items():
        assert text in first[name][0], name
        assert first[name][0] == second[name][0], name
        assert first[name][1] == second[name][1] == (1 if name == "raw optimizer" else 0), name
