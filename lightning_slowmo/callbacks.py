"""Callbacks that know when the workers agree."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import EMAWeightAveraging
else:  # the mixin itself belongs to neither package
    EMAWeightAveraging = object


class AtSyncMixin(EMAWeightAveraging):
    """Exponential moving average of the weights, taken only right after a sync, when they are equal on all workers.

    Lightning's own ``EMAWeightAveraging`` averages after every step, which is each worker's local weights here: the
    averages differ between workers, and so do the metrics that are validated with them.

    Args:
        decay: of the average, per sync rather than per step.
        kwargs: further arguments of ``EMAWeightAveraging``.

    Example::

        Trainer(strategy="slowmo", callbacks=EMAAtSync(decay=0.9))
    """

    _synced = False

    def on_train_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        """See whether the step that has just been taken ended in a sync."""
        self._synced = getattr(trainer.strategy, "just_synced", True)  # other strategies keep workers equal always
        super().on_train_batch_end(trainer, *args, **kwargs)

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Only after a sync."""
        return self._synced and super().should_update(step_idx, epoch_idx)


if not TYPE_CHECKING:
    try:
        from lightning.pytorch.callbacks import EMAWeightAveraging as _Base
    except ImportError:  # pytorch_lightning alone is installed, or Lightning is older than 2.6
        pass
    else:

        class EMAAtSync(AtSyncMixin, _Base):  # noqa: D101
            __doc__ = AtSyncMixin.__doc__
