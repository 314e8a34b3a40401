"""One warning before a fit that is shorter than a period, and one line after every fit."""

import logging
import math
import re
import warnings
from functools import cache, partial

import lightning as L
import pytest
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
from torch.utils.data import DataLoader

from lightning_slowmo import AllReduce, DiLoCo, Gossip, LocalSGD, SimulatedStrategy, SlowMo, SlowMoStrategy, SyncReport
from lightning_slowmo.algorithms.schedules import Stages
from lightning_slowmo.trainer.summary import describe, steps_left, warn_of_few_steps
from tests.harness import run_trainers
from tests.trainer.models import Regression, data, trainer


class Expected(Callback):
    """Asks at the beginning of the fit how many steps it will take."""

    def on_train_start(self, trainer, pl_module):
        self.steps = steps_left(trainer, L.pytorch, trainer.num_training_batches)


@pytest.mark.parametrize(
    "limits",
    [
        {"max_epochs": 3},
        {"max_epochs": 2, "accumulate_grad_batches": 3},
        {"max_epochs": 2, "limit_train_batches": 5, "accumulate_grad_batches": 2},
        {"max_epochs": 9, "max_steps": 11},
        {"max_epochs": -1, "max_steps": 7},
        {"max_epochs": 2, "limit_train_batches": 0.5},
        {"max_epochs": 5, "callbacks": GradientAccumulationScheduler({1: 3, 3: 4, 8: 2})},
    ],
    ids=" ".join,  # not of objects, whose addresses differ from process to process
)
def test_the_steps_of_a_fit_are_known_before_it(limits):
    expected = Expected()
    limits = {**limits, "callbacks": [expected, *filter(None, [limits.get("callbacks")])]}
    fitting = trainer(1, "slowmo", **limits)
    fitting.fit(Regression(), data(0))
    assert expected.steps == fitting.global_step > 0


def test_steps_of_unknown_number_are_infinite():
    assert steps_left(trainer(1, "slowmo", max_epochs=3), L.pytorch, math.inf) == math.inf
    assert steps_left(trainer(1, "slowmo", max_epochs=3, max_steps=40), L.pytorch, math.inf) == 40
    assert steps_left(trainer(1, "slowmo", max_epochs=-1), L.pytorch, 8) == math.inf


def test_the_line_says_what_was_counted():
    report = SyncReport(bytes_sent=2_500_000, seconds=0.5, count=1, largest_drift=0.1234)
    assert describe(report, 900, 2.0) == (
        "1 sync, 2.5 MB sent per worker (DDP would have sent 0.0009), 25 % of the time in syncs, largest drift 0.12"
    )
    assert describe(report, 900, None) == (
        "1 sync, 2.5 MB sent per worker (DDP would have sent 0.0009), largest drift 0.12"
    )


def test_the_largest_drift_is_that_of_all_syncs():
    total = SyncReport(count=0)
    for drift in (0.1, 0.4, 0.2):
        total = total + SyncReport(drift=drift)
    assert (total.drift, total.largest_drift, total.count) == (0.2, 0.4, 3)
    assert "sync/largest_drift" not in total.metrics()


@pytest.mark.parametrize(
    ("algorithm", "steps", "pending", "warns"),
    [
        (LocalSGD(12), 11, 0, True),
        (LocalSGD(12), 12, 0, False),
        (LocalSGD(12), 11, 1, False),  # a step of the period was taken before the fit was resumed
        (LocalSGD(Stages({0: 20, 100: 40})), 19, 0, True),
        (LocalSGD(Stages({0: 20, 100: 40})), 20, 0, False),
        (SlowMo(sync_every=Stages({0: 20, 100: 40})), 19, 0, True),
        (Gossip(), 1, 0, False),
        (LocalSGD(12), math.inf, 0, False),
    ],
)
def test_a_warning_needs_fewer_steps_than_a_period(algorithm, steps, pending, warns):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_few_steps(algorithm, steps, pending)
    assert len(caught) == warns


CASES = {
    "too short": (DiLoCo(), {"max_steps": 10}),
    "accumulated": (LocalSGD(5), {"max_epochs": 2, "accumulate_grad_batches": 4}),
    "no slow update": (SlowMo(Gossip(), sync_every=48), {"max_steps": 10}),
    "long enough": (LocalSGD(5), {"max_steps": 10}),
    "every step": (AllReduce(), {"max_steps": 2}),
}


def fits(strategy, devices, loader):
    """Warnings, lines and the report of each case, with a strategy for its algorithm; also of silent fits."""
    said = {}
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.INFO)
    for name, (algorithm, limits) in CASES.items():
        for silent in (False, True):
            lines = logging.Handler()
            lines.emit = lambda record, own=(written := []): own.append(record.getMessage())
            log.addHandler(lines)
            fitting = trainer(devices, strategy(algorithm, log_syncs=not silent), **limits)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                fitting.fit(Regression(), loader)
            log.removeHandler(lines)
            texts = [str(each.message) for each in caught if "sync_every=" in str(each.message)]
            said[name, silent] = texts, [line for line in written if "MB sent" in line], vars(fitting.strategy.report)
    log.setLevel(level)
    return said


def real_fits(rank):
    return fits(SlowMoStrategy, 2, data(rank))


@cache
def real():
    return run_trainers(2, real_fits, limit=180)


@pytest.mark.processes
def test_simulated_workers_say_what_processes_would_but_for_seconds():
    dealt = [batch for step in zip(data(0), data(1), strict=True) for batch in step]
    simulated = fits(partial(SimulatedStrategy, workers=2), 1, DataLoader(dealt, batch_size=None))
    for case, (warned, lines, report) in real()[0].items():
        untimed = [re.sub(r"\d+ % of the time in syncs, ", "", line) for line in lines]
        assert simulated[case][:2] == (warned, untimed), case
        assert simulated[case][2]["bytes_sent"] == report["bytes_sent"], case


@pytest.mark.processes
def test_a_fit_begins_with_one_warning_if_it_is_too_short_and_ends_with_one_line():
    first, second = real()
    expected = {
        "too short": "10 steps, sync_every=500: the workers will meet once, at the end",
        "accumulated": "4 steps, sync_every=5: the workers will meet once, at the end",
        "no slow update": "10 steps, sync_every=48: no slow update will be made",
    }
    gradients = 4 * sum(p.numel() for p in Regression().parameters())
    for name in CASES:
        for silent in (False, True):
            warned, lines, report = first[name, silent]
            assert [text.split(". Train")[0] for text in warned] == [expected[name] for _ in range(name in expected)], (
                name
            )
            assert len(lines) == (not silent), name
            assert second[name, silent][:2] == ([], []), name
        [line] = first[name, False][1]
        steps = 4 if name == "accumulated" else CASES[name][1]["max_steps"]
        sent, ddp = map(float, re.search(r"syncs?, (\S+) MB .* have sent (\S+)\)", line).groups())
        assert sent == pytest.approx(report["bytes_sent"] / 1e6, rel=0.01), name
        assert ddp == pytest.approx(steps * gradients / 1e6, rel=0.01), name  # 2 (n - 1) / n is 1 for two workers
        assert int(line.split()[0]) == report["count"], name
        assert float(line.split()[-1]) == pytest.approx(report["largest_drift"], rel=0.05), name
