"""SketchedSGD and SensedSGD in a Trainer: accumulation, clipping, a gradient scaler, two optimizers, a real task."""

import warnings

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from lightning_slowmo import AllReduce, SensedSGD, SketchedSGD, SlowMoStrategy
from tests.harness import run_trainers
from tests.trainer.models import Regression, all_finite, data, distance, numbers, trainer
from tests.trainer.test_surface_optimizers import Gan

ALL_MOVE = {
    "sketched": SketchedSGD(k=1.0, uncompressed_below=5, momentum=0.0),
    "sensed": SensedSGD(1.0, 1.0, uncompressed_below=5, momentum=0.0),
}
FEW_MOVE = {
    "sketched": SketchedSGD(k=3, columns=4, uncompressed_below=5),
    "sensed": SensedSGD(0.5, 0.1, uncompressed_below=5),
}

# Identities -----------------------------------------------------------------------------------------------------------


def train(rank, size, strategy, accumulate, clip):
    module = Regression()
    arguments = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip, "precision": "64-true"}
    trainer(size, strategy, **arguments).fit(module, data(rank, examples=36))
    return numbers(module)


def train_pairs(rank, size):
    settings = ((1, None), (2, None), (1, 0.3), (4, 0.3))
    results = {}
    for setting in settings:
        results["ddp", setting] = train(rank, size, "ddp", *setting)
        for name, algorithm in ALL_MOVE.items():
            results[name, setting] = train(rank, size, SlowMoStrategy(algorithm), *setting)
    return results


@pytest.mark.processes
def test_when_all_elements_move_it_is_ddp_with_accumulation_and_clipping():
    for results in run_trainers(3, train_pairs, 3):
        for name, setting in results:
            assert distance(results[name, setting], results["ddp", setting]) < 1e-10, (name, setting)
        assert distance(results["ddp", (1, None)], results["ddp", (4, 0.3)]) > 1e-2


# A gradient scaler ----------------------------------------------------------------------------------------------------


class Overflowing(Regression):
    """Its loss is infinite at the third batch of rank 1."""

    def training_step(self, batch, batch_idx):
        factor = float("inf") if (self.global_rank, batch_idx) == (1, 2) else 1.0
        return self.loss(batch) * factor


def train_scaled(rank, size):
    results = {}
    for name, algorithm in FEW_MOVE.items():
        for growth in (10**6, 3):  # the scale doubles at every third step, or never
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=growth)
            module = Overflowing()
            fitting = trainer(size, SlowMoStrategy(algorithm), plugins=MixedPrecision("16-mixed", "cpu", scaler))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                fitting.fit(module, data(rank))
            (unit,) = fitting.strategy.engine.units
            state = [t.tolist() for t in (*unit.momentum, *unit.residual)]
            results[name, growth] = numbers(module), scaler.get_scale(), unit.steps, all_finite(state)
    return results


@pytest.mark.processes
def test_an_overflow_on_one_rank_skips_the_step_on_all_and_the_scale_is_not_part_of_what_is_kept():
    first, second = run_trainers(2, train_scaled, 2)
    for name, (model, scale, steps, kept_is_finite) in first.items():
        assert (model, scale, steps) == second[name][:3]
        assert all_finite(model)
        assert kept_is_finite
        assert steps == 14  # of 16: twice, one in an epoch, it was skipped
        assert scale == 2.0**8 if name[1] == 10**6 else scale > 2.0**8
    for name in FEW_MOVE:
        # Half-precision activations are rounded alike; their gradients, which a scale shifts, nearly.
        assert distance(first[name, 3][0], first[name, 10**6][0]) < 2e-2


# Several optimizers ---------------------------------------------------------------------------------------------------


class SgdGan(Gan):
    """Of whose optimizers neither has momentum."""

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), lr=0.05) for net in (self.generator, self.critic)]


def train_gan(rank, size):
    always = dict.fromkeys(("critic", "generator"), lambda batch, rank: True)
    results = {}
    for name, algorithm in ({"all": AllReduce()} | ALL_MOVE | {f"few {n}": a for n, a in FEW_MOVE.items()}).items():
        module = SgdGan(always)
        fitting = trainer(size, SlowMoStrategy(algorithm), precision="64-true")
        fitting.fit(module, data(rank))
        steps = [getattr(unit, "steps", None) for unit in fitting.strategy.engine.units]
        results[name] = numbers(module), steps
    return results


@pytest.mark.processes
def test_two_optimizers_exchange_each_gradient_once():
    first, second = run_trainers(2, train_gan, 2)
    assert first == second
    for name, (model, steps) in first.items():
        assert all_finite(model)
        if name != "all":
            assert steps == [16, 16], name
        if name in ALL_MOVE:
            assert distance(model, first["all"][0]) < 1e-10, name


# A real task ----------------------------------------------------------------------------------------------------------


class Digits(Regression):
    """Handwritten digits; without an algorithm's own momentum, the optimizer has it."""

    def __init__(self, momentum):
        super().__init__(lr=0.1, momentum=momentum)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            linear = torch.nn.Linear
            self.net = torch.nn.Sequential(linear(64, 128), torch.nn.ReLU(), linear(128, 10))

    def loss(self, batch):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])


def train_on_digits(rank, size):
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, mine = order[:360], order[360:][rank::size]
    results = {}
    compressed = {"sketched": SketchedSGD(uncompressed_below=200), "sensed": SensedSGD(uncompressed_below=200)}
    for name, algorithm in ({"sgd": AllReduce()} | compressed).items():
        module = Digits(0.9 if name == "sgd" else 0.0)
        torch.manual_seed(1)
        fitting = trainer(size, SlowMoStrategy(algorithm), max_epochs=15)
        fitting.fit(module, DataLoader(TensorDataset(images[mine], labels[mine]), 32, shuffle=True))
        correct = (module.net(images[test]).argmax(1) == labels[test]).float().mean()
        results[name] = 100 * float(correct), fitting.strategy.report.bytes_sent, fitting.global_step
    return results


@pytest.mark.faults
@pytest.mark.processes
def test_digits_are_learned_nearly_as_well_at_equal_steps():
    for results in run_trainers(2, train_on_digits, 2):
        accuracy, sent, steps = results["sgd"]
        assert accuracy > 95
        for name in ("sketched", "sensed"):
            assert results[name][0] > accuracy - 3, results
            assert results[name][1] < 0.3 * sent, results
            assert results[name][2] == steps
