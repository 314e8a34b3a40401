"""Local SGD: every worker steps alone, and now and then all take the average.

Stich, "Local SGD Converges Fast and Communicates Little", ICLR 2019, https://arxiv.org/abs/1805.09767. Over an Adam
optimizer it is what the SlowMo paper calls Local Adam.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from lightning_slowmo import traffic
from lightning_slowmo.algorithms.base import Algorithm, Running, Synced
from lightning_slowmo.algorithms.clock import Clock
from lightning_slowmo.algorithms.post_local import RunningPostLocal
from lightning_slowmo.algorithms.schedules import (
    PostLocal,
    Schedule,
    check_streaming,
    check_sync_every,
    divided,
    header,
    usual,
)
from lightning_slowmo.averaging import Averager, CompressedAverager, DelayedAverager
from lightning_slowmo.communication.meeting import Level, Round
from lightning_slowmo.communication.workers import Workers
from lightning_slowmo.compression import Compressor
from lightning_slowmo.parameters import Layout


@dataclass(frozen=True)
class LocalSGD(Algorithm):
    """Average the parameters every ``sync_every`` steps; the optimizers' own buffers stay as they are.

    Args:
        sync_every: optimizer steps between averages, or a schedule: :class:`~lightning_slowmo.PostLocal`,
            :class:`~lightning_slowmo.QSR` or :class:`~lightning_slowmo.Stages`.
        overlap: for how many of the next steps an average is on its way before it is taken in, less than the steps
            between two syncs; 0 waits for it. It costs the memory of two copies of what is averaged.
        fragments: number of parts of the parameters of which one at a time is averaged, every
            ``sync_every / fragments`` steps; each still every ``sync_every``. It must divide ``sync_every``.

    Raises:
        ValueError: if an argument is out of its range. :meth:`bind` raises it if there are fewer parameters than
            fragments.

    Example::

        Trainer(strategy=SlowMoStrategy(LocalSGD(sync_every=8, overlap=2)))
    """

    elementwise = True

    sync_every: int | Schedule = 12
    overlap: int = 0
    fragments: int = 1

    def __post_init__(self) -> None:
        check_sync_every(self.sync_every)
        check_streaming(self.sync_every, self.overlap, self.fragments)

    def bind(self, optimizer: Optimizer, workers: Workers) -> Running:
        """Make the running state for one optimizer."""
        if isinstance(self.sync_every, PostLocal):
            return RunningPostLocal(self, self.sync_every, optimizer, workers)
        return local_steps(optimizer, workers, self.sync_every, self.overlap, self.fragments)

    def syncs(self, layout: Layout, workers: int) -> list[traffic.Sync]:
        """An average of the parameters every ``sync_every`` steps."""
        head, mean = header(self.sync_every, workers), self.average_sync(layout, workers)
        return traffic.averages(usual(self.sync_every), head, mean, self.overlap, self.fragments)

    def state_numel(self, layout: Layout, workers: int) -> float:
        """Copies of the parameters while an average is under way."""
        return layout.numel * traffic.copies_in_flight(self.overlap, self.fragments)


class RunningLocalSGD(Running):
    """Local steps, and an average now and then: exact, delayed or compressed, as its averager does it.

    Args:
        sync_every: optimizer steps between averages, or a schedule.
        optimizer: the user's own.
        workers: who takes part.
        make_averager: makes what averages the parameters of a layout; None: an exact average of all at once.
        fragments: number of parts of which one at a time is averaged.
    """

    def __init__(
        self,
        sync_every: int | Schedule,
        optimizer: Optimizer,
        workers: Workers,
        make_averager: Callable[[Layout], Averager] | None = None,
        fragments: int = 1,
    ) -> None:
        super().__init__(optimizer, workers, fragments=fragments)
        self.clock: Clock = Clock(sync_every, optimizer, workers)
        if make_averager is not None:
            self.averager = make_averager(self.layout)

    def after_step(self) -> None:
        """Count a local step, during which an average may have been under way."""
        self.clock.tick(first=self.pending == 0)
        super().after_step()
        if self.averager.after_step():
            with self.iterates.following(self.workers):
                self.averager.land()

    def due(self) -> Level:
        """After every ``sync_every`` local steps."""
        return Level.BASE if self.pending >= self.clock.period else Level.NONE

    def sync(self, round: Round) -> Synced:
        """Average."""
        self.clock.agree()
        agreed, drift = self.averager.agrees(round), self.averager.average(round)
        self.pending = 0
        return Synced(drift, agreed=agreed)

    def shared_state(self) -> dict[str, Any]:
        """What the averager keeps, and the clock."""
        return self.averager.shared_state() | {"clock": self.clock.shared_state()}

    def local_state(self) -> dict[str, Any]:
        """The count of steps, and what the averager keeps on this worker."""
        return super().local_state() | self.averager.local_state() | {"clock": self.clock.local_state()}

    def load_shared_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`shared_state` returned."""
        self.averager.load_shared_state(state)
        self.clock.load_shared_state(state.get("clock", {}))

    def load_local_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`local_state` returned."""
        self.averager.load_local_state(state)
        self.clock.load_local_state(state.get("clock", {}))
        super().load_local_state(state)


def local_steps(
    optimizer: Optimizer,
    workers: Workers,
    sync_every: int | Schedule,
    overlap: int = 0,
    fragments: int = 1,
    compressor: Compressor | None = None,
) -> RunningLocalSGD:
    """Local steps with the average that these settings ask for, also for the inside of an outer loop.

    Args:
        optimizer: the user's own.
        workers: who takes part.
        sync_every: optimizer steps between two averages of the same parameters, or a schedule.
        overlap: see :class:`LocalSGD`.
        fragments: see :class:`LocalSGD`.
        compressor: compresses the average, with error feedback; does not go with the two before.
    """

    def make(layout: Layout) -> Averager:
        if compressor is not None:
            return CompressedAverager(layout, workers, compressor)
        return DelayedAverager(layout, workers, overlap)

    plain = compressor is None and not overlap and fragments == 1
    return RunningLocalSGD(divided(sync_every, fragments), optimizer, workers, None if plain else make, fragments)
