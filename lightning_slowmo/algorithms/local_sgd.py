"""Local SGD: every worker steps alone, and now and then all take the average.

Stich, "Local SGD Converges Fast and Communicates Little", ICLR 2019, https://arxiv.org/abs/1805.09767. Over an Adam
optimizer it is what the SlowMo paper calls Local Adam.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from lightning_slowmo import traffic
from lightning_slowmo.algorithms.base import (
    NOT_DUE,
    Algorithm,
    Round,
    Running,
    SyncReport,
    check_period,
    check_streaming,
)
from lightning_slowmo.algorithms.streaming import RunningStreaming, check_saved
from lightning_slowmo.communication.workers import Workers
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
        if self.overlap or self.fragments > 1:
            return RunningStreaming(self.sync_every, self.overlap, self.fragments, optimizer, workers)
        return RunningLocalSGD(self, optimizer, workers)

    def syncs(self, layout: Layout, workers: int) -> list[traffic.Sync]:
        """An average of the parameters every ``sync_every`` steps."""
        head, mean = traffic.header(workers), self.average_sync(layout, workers)
        return traffic.averages(self.sync_every, head, mean, self.overlap, self.fragments)

    def state_numel(self, layout: Layout, workers: int) -> float:
        """Copies of the parameters while an average is under way."""
        return layout.numel * traffic.copies_in_flight(self.overlap, self.fragments)


class RunningLocalSGD(Running):
    """Local SGD at work; it needs no state but the count of steps."""

    def __init__(self, config: LocalSGD, optimizer: Optimizer, workers: Workers) -> None:
        super().__init__(optimizer, workers)
        self.config = config

    def agrees_after(self, round: Round) -> bool:
        """Always."""
        return True

    def due(self) -> int:
        """Level 1 after every ``sync_every`` local steps."""
        return 1 if self.pending >= self.config.sync_every else NOT_DUE

    def sync(self, round: Round) -> SyncReport:
        """Average."""
        return SyncReport(drift=self.average(round))

    def load_shared_state(self, state: dict[str, Any]) -> None:
        """Nothing, but fragments would not fit."""
        check_saved(state, fragments=1)

    def load_local_state(self, state: dict[str, Any]) -> None:
        """Restore the count of steps.

        Raises:
            ValueError: if an average was in flight.
        """
        if state.get("in_flight"):
            raise ValueError(
                "The checkpoint was saved while an average was on its way. Resume with the same overlap, or load the "
                "weights alone."
            )
        super().load_local_state(state)
