"""Callbacks that know when the workers agree."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_slowmo import private
from lightning_slowmo.averaging import average_tensors
from lightning_slowmo.communication.broadcast import broadcast_tensors
from lightning_slowmo.core import StrategyCore

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import EMAWeightAveraging
else:  # the mixin itself belongs to neither package
    EMAWeightAveraging = object


class AtSyncMixin(EMAWeightAveraging):
    """Exponential moving average of the weights, taken only at syncs, when they are equal on all workers.

    Lightning's own ``EMAWeightAveraging`` averages after every step, which is each worker's local weights here: the
    averages differ between workers, and so do the metrics that are validated with them. With strategies that keep the
    workers equal at all times, this callback is Lightning's own.

    Args:
        decay: of the average, per sync rather than per step.
        kwargs: further arguments of ``EMAWeightAveraging``; where they count steps, they count syncs here.

    Example::

        Trainer(strategy="slowmo", callbacks=EMAAtSync(decay=0.9))
    """

    _at_syncs = False

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Start from rank 0's average: this callback copied the model before the workers were given the same one."""
        super().on_fit_start(trainer, pl_module)
        core = getattr(trainer.strategy, "core", None)
        self._at_syncs = isinstance(core, StrategyCore) and not core.exchanges_gradients
        if isinstance(core, StrategyCore):
            with torch.no_grad():
                broadcast_tensors(list(private.averaged_model(self).state_dict().values()), core.everyone)

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Not when Lightning asks, if there are syncs to wait for."""
        return not self._at_syncs and super().should_update(step_idx, epoch_idx)

    def on_sync(self, trainer: Any, pl_module: Any) -> None:
        """Take the workers' common weights into the average, and the mean of their buffers.

        The strategy calls this at the end of a sync, on all workers, including those that have finished their epoch. It
        does not after a round of gossip, nor while another optimizer's parameters are in the middle of a period: the
        workers' weights differ then.
        """
        core = trainer.strategy.core
        if super().should_update(core.running.rounds - 1):
            average = private.averaged_model(self)
            average.update_parameters(pl_module)
            with torch.no_grad():
                average_tensors(list(average.module.buffers()), core.everyone)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """End with the average, if there is one."""
        if private.averaged_model(self).n_averaged:
            super().on_train_end(trainer, pl_module)
        else:
            rank_zero_warn(
                f"{type(self).__name__} saw no sync at which all workers were equal, so the model is left as trained. "
                "Train for longer than sync_every steps; gossip needs SlowMo around it."
            )


if not TYPE_CHECKING:
    try:
        from lightning.pytorch.callbacks import EMAWeightAveraging as _Base
    except ImportError:  # pytorch_lightning alone is installed
        pass
    else:

        class EMAAtSync(AtSyncMixin, _Base):  # noqa: D101
            __doc__ = AtSyncMixin.__doc__
