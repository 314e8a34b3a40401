"""What a run measures beside its loss."""

from __future__ import annotations

import time
from typing import Any

import lightning as L

from lightning_slowmo import SimulatedStrategy, SlowMoModelParallelStrategy, SlowMoStrategy

OURS = (SlowMoStrategy, SimulatedStrategy, SlowMoModelParallelStrategy)
"""Strategies that know their workers, and count what these send."""


class Progress(L.Callback):
    """Logs seconds of training and megabytes sent beside what is validated: the axes of the plots.

    Both go on in a run that is resumed.

    Attributes:
        seconds: of training so far, without validation, up to the last time the clock stood still.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since: float | None = None
        self._earlier_megabytes = 0.0
        self._first_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._since, self._first_step = time.perf_counter(), trainer.global_step

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock; everything before was training."""
        self._stop()

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log beside what was validated."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            values = {"progress/seconds": self.seconds, "progress/mb_sent": self.megabytes(trainer)}
            pl_module.log_dict(values, sync_dist=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let the clock go on."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._since = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        self._stop()

    def megabytes(self, trainer: L.Trainer) -> float:
        """Megabytes (10^6 bytes) that this worker has sent.

        The strategies of this package count them. Of DDP it is what a ring all-reduce of each step's gradients sends.
        """
        strategy: Any = trainer.strategy
        if isinstance(strategy, OURS):
            report = strategy.report
            return self._earlier_megabytes + (report.bytes_sent / 1e6 if report is not None else 0.0)
        workers, steps = trainer.world_size, trainer.global_step - self._first_step
        gradients = sum(p.numel() * p.element_size() for p in trainer.lightning_module.parameters() if p.requires_grad)
        return self._earlier_megabytes + steps * gradients * 2 * (workers - 1) / workers / 1e6

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep what was measured."""
        running = time.perf_counter() - self._since if self._since is not None else 0.0
        checkpoint["progress"] = {"seconds": self.seconds + running, "megabytes": self.megabytes(trainer)}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on from what was measured."""
        kept = checkpoint.get("progress", {"seconds": 0.0, "megabytes": 0.0})
        self.seconds, self._earlier_megabytes = kept["seconds"], kept["megabytes"]

    def _stop(self) -> None:
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since
            self._since = None
