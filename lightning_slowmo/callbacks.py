"""Callbacks that know when the workers agree."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_slowmo.averaging import average_tensors
from lightning_slowmo.communication.broadcast import broadcast_tensors

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
        engine = getattr(trainer.strategy, "engine", None)
        self._at_syncs = engine is not None and not engine.exchanges_gradients
        if engine is not None:
            assert self._average_model is not None
            with torch.no_grad():
                broadcast_tensors(list(self._average_model.state_dict().values()), engine.everyone)

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Not when Lightning asks, if there are syncs to wait for."""
        return not self._at_syncs and super().should_update(step_idx, epoch_idx)

    def on_sync(self, trainer: Any, pl_module: Any) -> None:
        """Take the workers' common weights into the average, and the mean of their buffers.

        The strategy calls this within a sync, on all workers, also those that have finished their epoch; but not in a
        round of gossip, nor while another optimizer's parameters are in the middle of a period.
        """
        engine = trainer.strategy.engine
        if super().should_update(engine.rounds - 1):
            assert self._average_model is not None
            self._average_model.update_parameters(pl_module)
            with torch.no_grad():
                average_tensors(list(self._average_model.module.buffers()), engine.everyone)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """End with the average, if there is one."""
        assert self._average_model is not None
        if self._average_model.n_averaged:
            super().on_train_end(trainer, pl_module)
        else:
            rank_zero_warn(
                f"{type(self).__name__} saw no sync at which all workers were equal, so the model is left as trained. "
                "Train for longer than sync_every steps; gossip needs SlowMo around it."
            )


if not TYPE_CHECKING:
    try:
        from lightning.pytorch.callbacks import EMAWeightAveraging as _Base
    except ImportError:  # pytorch_lightning alone is installed, or Lightning is older than 2.6
        pass
    else:

        class EMAAtSync(AtSyncMixin, _Base):  # noqa: D101
            __doc__ = AtSyncMixin.__doc__
