"""Warnings of settings that make workers wait for one another at every step, with what to use instead."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_slowmo import private
from lightning_slowmo.callbacks import AtSyncMixin


def warn_of_callbacks(trainer: Any, package: ModuleType) -> None:
    """Warn of the Trainer's callbacks that communicate at every step, or that average local weights.

    Args:
        trainer: whose callbacks are looked at.
        package: the Lightning that it belongs to.
    """
    kinds = package.callbacks
    for callback in trainer.callbacks:
        if isinstance(callback, kinds.ModelCheckpoint) and private.saves_by_the_clock(callback):
            rank_zero_warn(
                "ModelCheckpoint(train_time_interval=...) broadcasts the clock after every batch, so local steps wait "
                "for rank 0. Use every_n_train_steps, a multiple of sync_every."
            )
        averages = isinstance(callback, kinds.WeightAveraging)
        if averages and not isinstance(callback, AtSyncMixin):
            rank_zero_warn(
                f"{type(callback).__name__} averages each worker's local weights, which differ between syncs. Use "
                "lightning_slowmo.callbacks.EMAAtSync."
            )


class MetricReductions:
    """Counts the steps between two syncs that reduced a metric over the workers, and warns once if most did."""

    def __init__(self) -> None:
        self._reduced = False
        self._steps = self._reducing_steps = 0
        self._warned = False

    def reduced(self) -> None:
        """A metric was reduced in the course of the present step."""
        self._reduced = True

    def stepped(self) -> None:
        """A step ends."""
        self._steps += 1
        self._reducing_steps += self._reduced
        self._reduced = False

    def synced(self) -> None:
        """The workers sync: warn if they have met at most steps before this one already."""
        if 2 <= self._steps < 2 * self._reducing_steps and not self._warned:
            rank_zero_warn(
                f"{self._reducing_steps} of {self._steps} steps between two syncs reduced a metric over the workers, "
                "which makes them wait for one another. Use self.log(..., on_step=False, on_epoch=True, "
                "sync_dist=True), or sync_dist=False."
            )
            self._warned = True
        self._steps = self._reducing_steps = 0
