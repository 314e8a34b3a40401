"""What a run measures beside its loss."""

from __future__ import annotations

import time
from typing import Any

import lightning as L

from lightning_slowmo import SlowMoStrategy


class Progress(L.Callback):
    """Logs seconds of training and megabytes sent whenever validation ends: the axes of the plots.

    Attributes:
        seconds: of training so far, without validation.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since: float | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self.seconds, self._since = 0.0, time.perf_counter()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock; everything before was training."""
        self._stop()

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log beside what was validated."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            values = {"progress/seconds": self.seconds, "progress/mb_sent": megabytes_sent(trainer)}
            pl_module.log_dict(values, sync_dist=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let the clock go on."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._since = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        self._stop()

    def _stop(self) -> None:
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since
            self._since = None


def megabytes_sent(trainer: L.Trainer) -> float:
    """Megabytes (10^6 bytes) that this worker has sent in the present or last fit.

    The strategies of this package count them. Of DDP it is what a ring all-reduce of each step's gradients sends.
    """
    strategy: Any = trainer.strategy
    if isinstance(strategy, SlowMoStrategy):
        return strategy.report.bytes_sent / 1e6
    workers = trainer.world_size
    gradients = sum(p.numel() * p.element_size() for p in trainer.lightning_module.parameters() if p.requires_grad)
    return trainer.global_step * gradients * 2 * (workers - 1) / workers / 1e6
