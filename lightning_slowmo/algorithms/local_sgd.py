"""Local SGD: every worker steps alone, and now and then all take the average.

Stich, "Local SGD Converges Fast and Communicates Little", ICLR 2019, https://arxiv.org/abs/1805.09767. Over an Adam
optimizer it is what the SlowMo paper calls Local Adam.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.optim import Optimizer

from lightning_slowmo.algorithms.base import NOT_DUE, Algorithm, Round, Running, SyncReport, check_period
from lightning_slowmo.communication.workers import Workers


@dataclass(frozen=True)
class LocalSGD(Algorithm):
    """Average the parameters every ``sync_every`` steps; the optimizers' own buffers stay as they are.

    Args:
        sync_every: optimizer steps between averages.

    Example::

        Trainer(strategy=SlowMoStrategy(LocalSGD(sync_every=8)))
    """

    sync_every: int = 12

    def __post_init__(self) -> None:
        check_period("sync_every", self.sync_every)

    def bind(self, optimizer: Optimizer, workers: Workers) -> Running:
        """Make the running state for one optimizer."""
        return RunningLocalSGD(self, optimizer, workers)


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
