"""Tensors of all kinds through the Trainer: complex, sparse, pruned, lazy, and buffers that grow."""

import warnings
from functools import cache

import pytest
import torch
from lightning.pytorch.callbacks import ModelPruning
from torch import nn
from torch.nn.utils import prune

from lightning_slowmo import AllReduce, LocalSGD, SlowMo, SlowMoStrategy
from lightning_slowmo.callbacks import PruneConsensus
from tests.harness import run_trainers
from tests.trainer.models import FEATURES, Regression, data, trainer

SYNC_EVERY = 3


class ComplexLayer(Regression):
    """A layer of complex numbers before the others."""

    def __init__(self):
        super().__init__(momentum=0.9)
        self.turn = nn.Parameter(torch.polar(torch.ones(FEATURES), torch.arange(FEATURES) / 3))
        self.register_buffer("seen", torch.zeros(1, dtype=torch.complex64))

    def loss(self, batch):
        inputs, targets = batch
        turned = inputs * self.turn
        self.seen = 0.9 * self.seen + turned.detach().mean()
        return nn.functional.mse_loss(self.net(turned.real + turned.imag), targets)


class Words(Regression):
    """An embedding with sparse gradients, alone in an optimizer that wants them."""

    def __init__(self):
        super().__init__()
        self.net = nn.Embedding(40, 1, sparse=True)

    def loss(self, batch):
        inputs, targets = batch
        return nn.functional.mse_loss(self.net(inputs[:, 0].mul(5).add(20).clamp(0, 39).long()), targets)

    def configure_optimizers(self):
        return torch.optim.SparseAdam(self.net.parameters(), lr=0.1)


class Caching(Regression):
    """A buffer that grows with the batches that a rank has seen, and one that first appears in validation."""

    def __init__(self, persistent):
        super().__init__()
        self.persistent = persistent
        self.register_buffer("queue", torch.zeros(0), persistent)

    def training_step(self, batch, batch_idx):
        self.queue = torch.cat([self.queue, torch.ones(1)])
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        if not hasattr(self, "late"):
            self.register_buffer("late", torch.zeros(1 + self.global_rank), persistent=False)
        super().validation_step(batch, batch_idx)


class Lazy(Regression):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.LazyLinear(1))


class LocallyPruned(Regression):
    def on_train_epoch_end(self):
        prune.l1_unstructured(self.net[0], "weight", 0.5)


class PrunedTogether(Regression):
    def on_train_epoch_end(self):
        with self.trainer.strategy.consensus():
            prune.l1_unstructured(self.net[0], "weight", 0.5)


def pruning(kind, **arguments):
    return kind("l1_unstructured", amount=0.5, parameter_names=["weight"], **arguments)


ALGORITHMS = {"AllReduce": AllReduce(), "SlowMo": SlowMo(sync_every=SYNC_EVERY)}


def fit(rank, size, algorithm, module, callbacks=None, validate=True, batches=(8, 5, 7)):
    """This rank's model after training, or the error that it ended with."""
    fitting = trainer(size, SlowMoStrategy(algorithm), callbacks=callbacks)
    start = data(rank, 4 * batches[rank])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fitting.fit(module, start, data(9, 8) if validate else None)
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    state = {name: tensor for name, tensor in module.state_dict().items() if "queue" not in name}
    return {name: torch.view_as_real(t) if t.is_complex() else t for name, t in state.items()}


def fit_all(rank, size):
    outcomes = {}
    for name, algorithm in ALGORITHMS.items():
        outcomes["complex", name] = fit(rank, size, algorithm, ComplexLayer())
        outcomes["sparse", name] = fit(rank, size, algorithm, Words())
        outcomes["caching", name] = fit(rank, size, algorithm, Caching(persistent=False))
    local = LocalSGD(SYNC_EVERY)
    outcomes["queue"] = fit(rank, size, local, Caching(persistent=True))
    outcomes["lazy"] = fit(rank, size, local, Lazy())
    outcomes["locally pruned"] = fit(rank, size, local, LocallyPruned())
    outcomes["pruned together"] = fit(rank, size, local, PrunedTogether())
    outcomes["ModelPruning"] = fit(rank, size, local, Regression(), pruning(ModelPruning))
    outcomes["ModelPruning with AllReduce"] = fit(rank, size, AllReduce(), Regression(), pruning(ModelPruning))
    callback = pruning(PruneConsensus)
    outcomes["PruneConsensus"] = fit(rank, size, SlowMo(sync_every=SYNC_EVERY), Regression(), callback)
    callback = pruning(PruneConsensus, use_lottery_ticket_hypothesis=False)
    outcomes["PruneConsensus without tickets"] = fit(rank, size, local, Regression(), callback, validate=False)
    return outcomes


@cache
def outcomes(size):
    return run_trainers(size, fit_all, size)


def of(size, key):
    return [outcome[key] for outcome in outcomes(size)]


def assert_equal(models):
    for model in models:
        assert not isinstance(model, str), model
        for name, tensor in model.items():
            assert torch.equal(tensor, models[0][name]), name
            assert tensor.isfinite().all()


@pytest.mark.processes
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("kind", ["complex", "sparse", "caching"])
def test_models_of_all_kinds_end_equal_with_uneven_batches(kind, algorithm, size):
    assert_equal(of(size, (kind, algorithm)))


@pytest.mark.processes
@pytest.mark.parametrize("size", [2, 3])
def test_a_complex_layer_is_trained_in_both_parts(size):
    turn = of(size, ("complex", "AllReduce"))[0]["turn"]
    start = torch.view_as_real(ComplexLayer().turn.detach())
    assert ((turn - start).abs() > 1e-4).all()


@pytest.mark.processes
@pytest.mark.parametrize("size", [2, 3])
def test_a_persistent_queue_of_other_lengths_is_named_on_all_ranks(size):
    lengths = ", ".join(f"rank {rank} has float32[{length}]" for rank, length in enumerate((8, 5, 7)[:size]))
    for text in of(size, "queue"):
        assert text.startswith(f"SyncError: The model differs between workers: {lengths} as queue in Caching")


@pytest.mark.processes
@pytest.mark.parametrize("size", [2, 3])
def test_a_lazy_parameter_is_named_on_all_ranks(size):
    for text in of(size, "lazy"):
        assert text.startswith("ValueError: net.0.weight in LazyLinear (net.0) has no shape yet")


@pytest.mark.processes
@pytest.mark.parametrize("size", [2, 3])
def test_pruning_of_local_weights_is_refused_on_all_ranks_with_what_to_do(size):
    for text in of(size, "locally pruned"):
        assert text.startswith("SyncError: The mask net.0.weight_mask differs between workers")
    for text in of(size, "ModelPruning"):
        assert text.startswith("ValueError: ModelPruning prunes each worker's local weights")
        assert "PruneConsensus" in text


@pytest.mark.processes
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("key", ["PruneConsensus", "PruneConsensus without tickets", "ModelPruning with AllReduce"])
def test_the_consensus_is_pruned_and_stays_sparse_to_the_end(key, size):
    models = of(size, key)
    assert_equal(models)
    weights = torch.cat([tensor.flatten() for name, tensor in models[0].items() if name.endswith("weight")])
    assert (weights == 0).float().mean() == 0.75  # half of it, twice
    assert not any("mask" in name for name in models[0])


@pytest.mark.processes
@pytest.mark.parametrize("size", [2, 3])
def test_masks_that_are_drawn_inside_the_consensus_are_equal_and_binary(size):
    models = of(size, "pruned together")
    assert_equal(models)
    mask = models[0]["net.0.weight_mask"]
    assert mask.unique().tolist() == [0, 1]
    assert mask.sum() == mask.numel() // 4


def test_pruning_in_validation_is_refused():
    with pytest.raises(ValueError, match="leave out prune_on_train_epoch_end=False"):
        pruning(PruneConsensus, prune_on_train_epoch_end=False)
