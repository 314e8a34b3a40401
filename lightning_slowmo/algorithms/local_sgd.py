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
from lightning_slowmo.algorithms.base import Algorithm, Running, Synced, check_period, check_streaming
from lightning_slowmo.averaging import Averager, CompressedAverager, DelayedAverager
from lightning_slowmo.communication.meeting import Level, Round
from lightning_slowmo.communication.workers import Workers
from lightning_slowmo.compression import Compressor
from lightning_slowmo.parameters import Layout


@dataclass(frozen=True)
class LocalSGD(Algorithm):
    """Average the parameters every ``sync_every`` steps; the optimizers' own buffers stay as they are.

    Args:
        sync_every: optimizer steps between averages.
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

    sync_every: int = 12
    overlap: int = 0
    fragments: int = 1

    def __post_init__(self) -> None:
        check_period("sync_every", self.sync_every)
        check_streaming(self.sync_every, self.overlap, self.fragments)

    def bind(self, optimizer: Optimizer, workers: Workers) -> Running:
        """Make the running state for one optimizer."""
        return local_steps(optimizer, workers, self.sync_every, self.overlap, self.fragments)

    def syncs(self, layout: Layout, workers: int) -> list[traffic.Sync]:
        """An average of the parameters every ``sync_every`` steps."""
        head, mean = traffic.header(workers), self.average_sync(layout, workers)
        return traffic.averages(self.sync_every, head, mean, self.overlap, self.fragments)

    def state_numel(self, layout: Layout, workers: int) -> float:
        """Copies of the parameters while an average is under way."""
        return layout.numel * traffic.copies_in_flight(self.overlap, self.fragments)


class RunningLocalSGD(Running):
    """Local steps, and an average now and then: exact, delayed or compressed, as its averager does it.

    Args:
        sync_every: optimizer steps between averages.
        optimizer: the user's own.
        workers: who takes part.
        make_averager: makes what averages the parameters of a layout; None: an exact average of all at once.
        fragments: number of parts of which one at a time is averaged.
    """

    def __init__(
        self,
        sync_every: int,
        optimizer: Optimizer,
        workers: Workers,
        make_averager: Callable[[Layout], Averager] | None = None,
        fragments: int = 1,
    ) -> None:
        super().__init__(optimizer, workers, fragments=fragments)
        self.sync_every = sync_every
        if make_averager is not None:
            self.averager = make_averager(self.layout)

    def after_step(self) -> None:
        """Count a local step, during which an average may have been under way."""
        super().after_step()
        if self.averager.after_step():
            with self.iterates.following(self.workers):
                self.averager.land()

    def due(self) -> Level:
        """After every ``sync_every`` local steps."""
        return Level.BASE if self.pending >= self.sync_every else Level.NONE

    def sync(self, round: Round) -> Synced:
        """Average."""
        agreed, drift = self.averager.agrees(round), self.averager.average(round)
        self.pending = 0
        return Synced(drift, agreed=agreed)

    def shared_state(self) -> dict[str, Any]:
        """What the averager keeps."""
        return self.averager.shared_state()

    def local_state(self) -> dict[str, Any]:
        """The count of steps, and what the averager keeps on this worker."""
        return super().local_state() | self.averager.local_state()

    def load_shared_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`shared_state` returned."""
        self.averager.load_shared_state(state)

    def load_local_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`local_state` returned."""
        self.averager.load_local_state(state)
        super().load_local_state(state)


def local_steps(
    optimizer: Optimizer,
    workers: Workers,
    sync_every: int,
    overlap: int = 0,
    fragments: int = 1,
    compressor: Compressor | None = None,
) -> RunningLocalSGD:
    """Local steps with the average that these settings ask for, also for the inside of an outer loop.

    Args:
        optimizer: the user's own.
        workers: who takes part.
        sync_every: optimizer steps between two averages of the same parameters.
        overlap: see :class:`LocalSGD`.
        fragments: see :class:`LocalSGD`.
        compressor: compresses the average, with error feedback; does not go with the two before.
    """

    def make(layout: Layout) -> Averager:
        if compressor is not None:
            return CompressedAverager(layout, workers, compressor)
        return DelayedAverager(layout, workers, overlap)

    plain = compressor is None and not overlap and fragments == 1
    return RunningLocalSGD(sync_every // fragments, optimizer, workers, None if plain else make, fragments)
