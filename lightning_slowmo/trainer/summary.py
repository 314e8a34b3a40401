"""What a user reads about the syncs of a fit: one warning before it if there will be too few, and one line after it."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from types import ModuleType
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_slowmo.algorithms import Algorithm, SyncReport
from lightning_slowmo.algorithms.schedules import Schedule
from lightning_slowmo.core import StrategyCore


def steps_left(trainer: Any, package: ModuleType, batches: float) -> float:
    """Optimizer steps that a fit is going to take, as far as its limits say; infinity if they do not.

    Args:
        trainer: with its limits, at the beginning of the fit or where it resumes.
        package: the Lightning that it belongs to.
        batches: of an epoch, infinity if unknown.
    """
    steps = math.inf
    if trainer.max_steps != -1:
        steps = max(0, trainer.max_steps - trainer.global_step)
    if math.isinf(batches) or trainer.max_epochs in (None, -1):
        return steps
    scheduler = package.callbacks.GradientAccumulationScheduler
    schedule = next((callback for callback in trainer.callbacks if isinstance(callback, scheduler)), None)
    changes = [] if schedule is None else [epoch for epoch in schedule.scheduling if epoch < trainer.max_epochs]
    starts = sorted({trainer.current_epoch, *(epoch for epoch in changes if epoch > trainer.current_epoch)})
    total = 0
    for start, end in zip(starts, [*starts[1:], trainer.max_epochs], strict=True):
        together = trainer.accumulate_grad_batches if schedule is None else schedule.get_accumulate_grad_batches(start)
        total += max(0, end - start) * math.ceil(batches / together)
    return min(steps, total)


def warn_of_few_steps(algorithm: Algorithm, steps: float, pending: int) -> None:
    """Warn where training ends before the first period does.

    Args:
        algorithm: of the strategy.
        steps: that are going to be taken.
        pending: steps of the first period that were taken before, in a fit that is resumed.
    """
    period, base = _period(algorithm), getattr(algorithm, "base", None)
    if not 0 < steps < period - pending:
        return
    meets_before = base is not None and _period(base) < period
    what = "no slow update will be made" if meets_before else "the workers will meet once, at the end"
    rank_zero_warn(
        f"{steps} step{'s' if steps > 1 else ''}, sync_every={period}: {what}. Train for longer, or with a smaller "
        "sync_every. Steps are counted after accumulation and within max_steps and limit_train_batches."
    )


def _period(algorithm: Algorithm) -> int:
    """Steps between two syncs, or to the first one that a schedule allows; 1 without a period."""
    sync_every: int | Schedule = getattr(algorithm, "sync_every", 1)
    return sync_every.shortest if isinstance(sync_every, Schedule) else sync_every


def warn_of_short_fit(trainer: Any, package: ModuleType, core: StrategyCore, batches: float) -> None:
    """Warn where a fit that is about to begin ends before the first period does.

    Args:
        trainer: with its limits, at the beginning of the fit or where it resumes.
        package: the Lightning that it belongs to.
        core: of the strategy, with its engine.
        batches: of an epoch, infinity if unknown.
    """
    if not core.everyone.alone and trainer.lightning_module.automatic_optimization:
        pending = core.running.units[0].innermost.pending
        warn_of_few_steps(core.algorithm, steps_left(trainer, package, batches), pending)


class Summary:
    """Counts what :meth:`line` says.

    Args:
        timed: whether the seconds of a sync are those of messages; those of simulated workers are not.
    """

    def __init__(self, timed: bool = True) -> None:
        self._timed = timed
        self.start()

    def start(self) -> None:
        """Training begins."""
        self._start = time.perf_counter()
        self._steps: Counter[int] = Counter()

    def stepped(self, index: int) -> None:
        """An optimizer has stepped.

        Args:
            index: which.
        """
        self._steps[index] += 1

    def line(self, core: StrategyCore) -> str | None:
        """The fit in a line, for the process that writes it; None if there is nothing to say.

        What DDP would have sent is the ring all-reduce of the gradients of the same steps.

        Args:
            core: of the strategy, at the end of training.
        """
        engine, workers = core.engine, core.everyone.size
        if engine is None or workers == 1 or not self._steps:
            return None
        gradients = sum(
            self._steps[index] * sum(p.numel() * p.element_size() for p in unit.layout.parameters)
            for index, unit in enumerate(engine.units)
        )
        seconds = max(time.perf_counter() - self._start, 1e-9) if self._timed else None
        return describe(engine.total, 2 * (workers - 1) / workers * gradients, seconds)

    def log(self, core: StrategyCore, package: ModuleType) -> None:
        """Write the line where Lightning writes its own, on the first process.

        Args:
            core: of the strategy, at the end of training.
            package: the Lightning in use.
        """
        line = self.line(core) if core.everyone.rank == 0 else None
        if line is not None:
            logging.getLogger(package.__name__).info(line)


def describe(total: SyncReport, ddp_bytes: float, seconds: float | None) -> str:
    """Totals in words.

    Args:
        total: of all syncs of a worker.
        ddp_bytes: that DDP would have sent in the same steps.
        seconds: of the fit; None where those of its syncs say nothing.

    Example:
        >>> describe(SyncReport(21_800_000, 21_800_000, 0.12, 0.01, count=24, largest_drift=0.034), 261_800_000, 4.0)
        '24 syncs, 21.8 MB sent per worker (DDP would have sent 261.8), 3 % of the time in syncs, largest drift 0.034'
    """
    syncs = f"{total.count} sync{'' if total.count == 1 else 's'}"
    sent = f"{_megabytes(total.bytes_sent)} MB sent per worker (DDP would have sent {_megabytes(ddp_bytes)})"
    share = "" if seconds is None else f"{min(100, 100 * total.seconds / seconds):.0f} % of the time in syncs, "
    return f"{syncs}, {sent}, {share}largest drift {total.largest_drift:.2g}"


def _megabytes(count: float) -> str:
    """Bytes in MB, with one decimal or three significant digits."""
    return f"{count / 1e6:.1f}" if count >= 1e6 or not count else f"{count / 1e6:.3g}"
