"""Simulated workers train as processes do: every preset, and whatever else a Trainer can do, in float64 to 1e-12."""

from functools import cache

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_slowmo import AllReduce, LocalSGD, PostLocal, SimulatedStrategy, SlowMo, SlowMoStrategy
from tests.harness import run_trainers
from tests.test_contract import ALL, configured, optimizer_for
from tests.trainer.models import Regression, data, distance, numbers, trainer

TOLERANCE = {"apmsqueeze": 1e-7, "des_loc": 1e-7, "diloco with Adam outside": 1e-9}
"""Adam divides by second moments that are nearly zero here, and so magnifies the rounding of sums in another order."""


class Model(Regression):
    """BatchNorm, dropout, and the optimizer of an algorithm with a rate that changes."""

    def __init__(self, name, dropout=0.0):
        super().__init__(batch_norm=True)
        self.kind = optimizer_for(name)
        self.net.append(torch.nn.Dropout(dropout))
        self.seen = []

    def validation_step(self, batch, batch_idx):
        self.seen.append(self.loss(batch).item())

    def on_train_batch_start(self, batch, batch_idx):
        self.seen.append(float(self.trainer.global_step))

    def configure_optimizers(self):
        optimizer = self.kind(self.parameters(), lr=0.05)
        rate = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.7)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rate, "interval": "step"}}


class Adversaries(Regression):
    """Manual optimization of two optimizers, one of which steps at every other batch, with schedulers of its own."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.other = torch.nn.Linear(1, 1, dtype=torch.float64)

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        first, second = self.optimizers()
        rates = self.lr_schedulers()
        for optimizer, schedule in zip((first, second), rates, strict=True):
            if optimizer is second and batch_idx % 2:
                continue
            loss = (self.other(self.net(inputs)) - targets).square().mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            schedule.step()

    def configure_optimizers(self):
        optimizers = [
            torch.optim.SGD(self.net.parameters(), 0.05, 0.9),
            torch.optim.Adam(self.other.parameters(), 0.01),
        ]
        return optimizers, [torch.optim.lr_scheduler.ExponentialLR(each, 0.9) for each in optimizers]


def batches(rank):
    return list(data(rank, examples=28))


def loader(ranks):
    """Batches as these ranks take them, one of each in turn."""
    dealt = [batch for step in zip(*(batches(rank) for rank in ranks), strict=True) for batch in step]
    return DataLoader(dealt, batch_size=None, generator=torch.Generator())


CASES = {name: (lambda name=name: (configured(name), Model(name), {})) for name in ALL} | {
    "accumulation": lambda: (SlowMo(sync_every=2), Model("slowmo"), {"accumulate_grad_batches": 3}),
    "accumulated exchange": lambda: (AllReduce(), Model("allreduce"), {"accumulate_grad_batches": 2}),
    "clipping": lambda: (LocalSGD(3), Model("local_sgd"), {"gradient_clip_val": 0.1}),
    "dropout": lambda: (SlowMo(sync_every=3), Model("slowmo", dropout=0.5), {}),
    "manual": lambda: (SlowMo(sync_every=2), Adversaries(), {}),
    "averaged gradients first": lambda: (LocalSGD(PostLocal(start=5, every=3)), Model("local_sgd"), {}),
    "manual exchange": lambda: (AllReduce(), Adversaries(), {}),
    "validation in between": lambda: (SlowMo(sync_every=3), Model("slowmo"), {"val_check_interval": 2}),
    "max_steps": lambda: (SlowMo(sync_every=3), Model("slowmo"), {"max_steps": 10}),
}


def fit(case, strategy, devices, ranks, **more):
    loaders = loader(ranks), DataLoader(batches(99), batch_size=None, generator=torch.Generator())
    torch.manual_seed(7)
    algorithm, module, options = CASES[case]()
    fitted = trainer(devices, strategy(algorithm), precision="64-true", limit_val_batches=2, **options, **more)
    fitted.fit(module, *loaders)
    report = fitted.strategy.report
    counts = [report.count, report.bytes_sent, report.skipped, fitted.global_step]
    return numbers(module), getattr(module, "seen", []), counts


SOME = ("allreduce", "slowmo", "slowmo_sgp", "dpsgd", "qprsgd", "squarm_sgd", "sketched_sgd", "apmsqueeze", "noloco")
SOME += ("slowmo, overlapped in fragments", "manual", "dropout")
"""What more than two workers train."""


def fit_all(rank, size):
    return {case: fit(case, SlowMoStrategy, size, [rank]) for case in (CASES if size == 2 else SOME)}


@cache
def real(size):
    """What the first of as many processes has at the end, by case."""
    return run_trainers(size, fit_all, size, limit=500)[0]


def compare(size, case):
    model, seen, counts = fit(case, lambda algorithm: SimulatedStrategy(algorithm, size), 1, range(size))
    expected, expected_seen, expected_counts = real(size)[case]
    tolerance = TOLERANCE.get(case, 1e-12)
    assert distance(model, expected) < tolerance
    assert seen == pytest.approx(expected_seen, abs=100 * tolerance)
    assert counts == expected_counts


@pytest.mark.processes
@pytest.mark.parametrize("case", CASES)
def test_two_simulated_workers_are_equal_to_two_processes(case):
    compare(2, case)


@pytest.mark.faults
@pytest.mark.processes
@pytest.mark.parametrize("case", SOME)
def test_four_simulated_workers_are_equal_to_four_processes(case):
    compare(4, case)


@pytest.mark.faults
@pytest.mark.processes
@pytest.mark.parametrize("case", SOME)
def test_eight_simulated_workers_are_equal_to_eight_processes(case):
    compare(8, case)
