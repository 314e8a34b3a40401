"""A worker's clock: it counts optimizer steps, and says how long the present period is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer

from lightning_slowmo.algorithms.base import Running, learning_rates
from lightning_slowmo.algorithms.schedules import Schedule, is_varying
from lightning_slowmo.communication.workers import Workers


class Clock:
    """Counts the optimizer steps of one worker.

    A period's length is fixed at its first step, by the learning rate of that step: schedulers move on after a sync, so
    it cannot be known there. So that all workers decide alike, they tell one another at each sync how many steps they
    have taken and at which rate; the largest count is everybody's from then on, and where rates differ (a scheduler
    that looks at each worker's own loss), the next period follows from their mean.

    Args:
        schedule: of the periods, or their constant length.
        optimizer: whose steps are counted.
        workers: who takes part.
        counted: whether something else follows from the count, so that workers must agree on it in any case.

    Attributes:
        taken: optimizer steps so far.
        period: steps of the present period.
        epoch: number of the present epoch; None if nobody has told it.
    """

    def __init__(self, schedule: int | Schedule, optimizer: Optimizer, workers: Workers, counted: bool = False) -> None:
        self.schedule = schedule
        self.optimizer = optimizer
        self.workers = workers
        self.agrees = counted or is_varying(schedule)
        self.taken = 0
        self.period = schedule if isinstance(schedule, int) else schedule.shortest
        self.epoch: int | None = None
        self._rate: float | None = None

    def tick(self, first: bool) -> None:
        """Count a step.

        Args:
            first: whether it is the first one of a period.

        Raises:
            ValueError: if the schedule goes by epochs and nobody has said which one this is.
        """
        if first and isinstance(self.schedule, Schedule):
            if self.schedule.by_epoch and self.epoch is None:
                raise ValueError(
                    f"{self.schedule!r} goes by epochs. At the start of each, call start_epoch(engine.units, epoch) of "
                    "lightning_slowmo.algorithms.clock, or give the stages in steps."
                )
            rate = max(learning_rates(self.optimizer)) if self._rate is None else self._rate
            self.period = self.schedule.period(self.taken, rate, self.epoch or 0)
        self.taken += 1

    def agree(self) -> None:
        """Agree with the other workers on steps and rate. At a sync, all workers must call this."""
        if not self.agrees:
            return
        own = [float(self.taken), max(learning_rates(self.optimizer))]
        counts, rates = zip(*self.workers.gather(own, "agreeing on the next period"), strict=True)
        self.taken = int(max(counts))
        self._rate = None if len(set(rates)) == 1 else math.fsum(rates) / len(rates)

    # State ------------------------------------------------------------------------------------------------------------

    def shared_state(self) -> dict[str, Any]:
        """The count and the epoch. All workers must call this."""
        taken = self.taken
        if self.agrees:
            taken = int(max(row[0] for row in self.workers.gather([float(taken)], "counting steps")))
        return {"taken": taken, "epoch": self.epoch}

    def local_state(self) -> dict[str, Any]:
        """Where this worker is in the present period."""
        return {"taken": self.taken, "period": self.period, "rate": self._rate}

    def load_shared_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`shared_state` returned; a state without it is of an older version."""
        self.taken, self.epoch = state.get("taken", 0), state.get("epoch")

    def load_local_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`local_state` returned."""
        self.taken, self._rate = state.get("taken", self.taken), state.get("rate")
        if isinstance(self.schedule, Schedule):
            self.period = state.get("period", self.period)


def start_epoch(units: Iterable[Running], epoch: int) -> None:
    """Tell schedules that go by epochs which one begins.

    Args:
        units: the running algorithms of an engine.
        epoch: from 0.
    """
    for running in units:
        for each in (running, running.innermost):
            if each.clock is not None:
                each.clock.epoch = epoch
