"""Post-local SGD at work: averaged gradients first, then any algorithm of local steps.

The algorithm is made anew where the workers stand after the first phase, so from there it is what it would be if it had
begun with those parameters, and its own periods, anchors and estimates know nothing of the phase before.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch.optim import Optimizer

from lightning_slowmo.algorithms.all_reduce import RunningAllReduce
from lightning_slowmo.algorithms.base import Algorithm, Running, Synced
from lightning_slowmo.algorithms.schedules import PostLocal, Schedule
from lightning_slowmo.communication.meeting import Level, Round
from lightning_slowmo.communication.workers import Workers
from lightning_slowmo.parameters import Layout


class RunningFirstPhase(RunningAllReduce):
    """Averaged gradients, counted: a step that a gradient scaler makes all workers skip counts, too.

    Attributes:
        exchanges: gradients averaged so far.
    """

    def __init__(self, optimizer: Optimizer, workers: Workers) -> None:
        super().__init__(optimizer, workers)
        self.exchanges = 0

    def sync_gradients(self, round: Round) -> None:
        """Average the gradients, and count."""
        super().sync_gradients(round)
        self.exchanges += 1


class RunningPostLocal(Running):
    """An algorithm that begins after some steps of averaged gradients.

    Args:
        config: the algorithm, whose ``sync_every`` is a :class:`~lightning_slowmo.PostLocal`.
        schedule: that ``sync_every``.
        optimizer: the user's own.
        workers: who takes part.

    Attributes:
        inner: what is at work now.
        started: whether local steps have begun.
    """

    def __init__(self, config: Algorithm, schedule: PostLocal, optimizer: Optimizer, workers: Workers) -> None:
        self.config = with_period(config, schedule.every)
        self.schedule = schedule
        self.inner = self.config.bind(optimizer, workers)  # which refuses what does not fit before training, not then
        self.started = schedule.start == 0
        self._place: tuple[bool, bool] | None = None
        if not self.started:
            self.inner = RunningFirstPhase(optimizer, workers)
        super().__init__(optimizer, workers, self.inner)

    def _show(self, inner: Running) -> None:
        """Let what others see of this be that of the algorithm inside."""
        self.inner, self.innermost = inner, inner.innermost
        self.layout, self.averager, self.iterates = inner.layout, inner.averager, inner.iterates

    def begin(self) -> None:
        """Let local steps begin here. All workers must call this, and hold the same parameters."""
        if self.started:
            return
        inner = self.config.bind(self.optimizer, self.workers)
        if self._place is not None:
            inner.place_slow_state(*self._place)
        for each in (inner, inner.innermost):
            if each.clock is not None:  # a momentum that changes does so from the beginning of training
                each.clock.taken = self.schedule.start
        self.started = True
        self._show(inner)

    def groups(self) -> list[list[Any]]:
        """What the algorithm inside syncs."""
        return self.inner.groups()

    def place_slow_state(self, shard: bool, offload: bool) -> None:
        """Keep the slow state that there will be elsewhere."""
        self._place = shard, offload
        inner = self.inner if self.started else self.config.bind(self.optimizer, self.workers)
        inner.place_slow_state(shard, offload)
        self._show(self.inner)

    def join(self) -> None:
        """Let parameters join the algorithm inside."""
        self.inner.join()
        self._show(self.inner)

    def adopt_layout(self, layout: Layout) -> None:
        """Take over a new layout."""
        self.inner.adopt_layout(layout)
        self._show(self.inner)

    # Steps and syncs --------------------------------------------------------------------------------------------------

    def after_step(self) -> None:
        """Count a step inside."""
        self.inner.after_step()

    def due(self) -> Level:
        """In the first phase, its end."""
        if isinstance(self.inner, RunningFirstPhase):
            return Level.BASE if self.inner.exchanges >= self.schedule.start else Level.NONE
        return self.inner.due()

    def sync(self, round: Round) -> Synced:
        """Begin with local steps, from one point: workers whose inputs have ended catch up; or what is due inside."""
        if self.started:
            return self.inner.sync(round)
        if all(round.healthy):
            self.inner.catch_up(round)
        else:
            self.inner.sync(round)
        self.begin()
        return Synced(agreed=True)

    def moved(self) -> None:
        """Let the algorithm inside take note."""
        self.inner.moved()

    def catch_up(self, round: Round) -> None:
        """Let the algorithm inside catch up."""
        self.inner.catch_up(round)

    # State ------------------------------------------------------------------------------------------------------------

    def shared_state(self) -> dict[str, Any]:
        """Which phase this is, and what is kept in it."""
        exchanges = self.inner.exchanges if isinstance(self.inner, RunningFirstPhase) else self.schedule.start
        return {"started": self.started, "exchanges": exchanges, "inner": self.inner.shared_state()}

    def local_state(self) -> dict[str, Any]:
        """That of the algorithm inside."""
        return {"started": self.started, "inner": self.inner.local_state()}

    def load_shared_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`shared_state` returned; with another ``start``, the saved phase goes on or ends."""
        if state["started"]:
            self.begin()
        if state["started"] == self.started:
            self.inner.load_shared_state(state["inner"])
        if isinstance(self.inner, RunningFirstPhase):
            self.inner.exchanges = state["exchanges"]

    def load_local_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`local_state` returned."""
        if state["started"] == self.started:
            self.inner.load_local_state(state["inner"])


def with_period(algorithm: Algorithm, sync_every: int | Schedule) -> Algorithm:
    """A configuration with another ``sync_every``, which its base shares if it does now."""
    base = getattr(algorithm, "base", None)
    changes: dict[str, Any] = {"sync_every": sync_every}
    if base is not None and getattr(base, "sync_every", None) == algorithm.sync_every:  # type: ignore[attr-defined]
        changes["base"] = replace(base, sync_every=sync_every)
    return replace(algorithm, **changes)  # type: ignore[type-var]
