"""Callbacks that know when the workers agree."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_slowmo import private
from lightning_slowmo.algorithms import PostLocal
from lightning_slowmo.averaging import average_tensors
from lightning_slowmo.buffers import shared
from lightning_slowmo.communication.broadcast import broadcast_tensors
from lightning_slowmo.consistency import compare_buffers
from lightning_slowmo.core import StrategyCore

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import EMAWeightAveraging, ModelPruning
else:  # the mixins themselves belong to neither package
    EMAWeightAveraging = ModelPruning = object


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

    _core: StrategyCore | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Start from rank 0's average: this callback copied the model before the workers were given the same one."""
        super().on_fit_start(trainer, pl_module)
        core = getattr(trainer.strategy, "core", None)
        self._core = core if isinstance(core, StrategyCore) else None
        if isinstance(core, StrategyCore):
            with torch.no_grad():
                broadcast_tensors(list(private.averaged_model(self).state_dict().values()), core.everyone)

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Not when Lightning asks, if there are syncs to wait for."""
        at_syncs = self._core is not None and not self._core.exchanges_gradients
        return not at_syncs and super().should_update(step_idx, epoch_idx)

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
            masks = compare_buffers(average.module, core.everyone)
            with torch.no_grad():
                buffers = [slot.tensor for slot in shared(average.module) if slot.name not in masks]
                average_tensors(buffers, core.everyone)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """End with the average, if there is one."""
        if private.averaged_model(self).n_averaged:
            super().on_train_end(trainer, pl_module)
        else:
            rank_zero_warn(
                f"{type(self).__name__} saw no sync at which all workers were equal, so the model is left as trained. "
                "Train for longer than sync_every steps; gossip needs SlowMo around it."
            )


class PruneConsensusMixin(ModelPruning):
    """Pruning of the workers' mean, so that the masks are equal on all workers.

    Lightning's own ``ModelPruning`` prunes each worker's local weights, so every worker gets another mask. Here all
    workers take over the consensus before it is pruned, at the end of every epoch.

    Args:
        arguments: those of ``ModelPruning``; ``prune_on_train_epoch_end=False`` is refused, as weights that are set in
            validation are put back after it.
        kwargs: the same.

    Raises:
        ValueError: if the model is to be pruned in validation.

    Example::

        Trainer(strategy="slowmo", callbacks=PruneConsensus("l1_unstructured", amount=0.2))
    """

    def __init__(self, *arguments: Any, **kwargs: Any) -> None:
        if not kwargs.get("prune_on_train_epoch_end", True):
            raise ValueError(
                f"{type(self).__name__} prunes at the end of training epochs; leave out prune_on_train_epoch_end=False."
            )
        super().__init__(*arguments, **kwargs)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Take over the consensus, and prune it."""
        core = getattr(trainer.strategy, "core", None)
        if isinstance(core, StrategyCore) and core.training:
            trainer.strategy.settle()
        super().on_train_epoch_end(trainer, pl_module)
        if isinstance(core, StrategyCore) and core.training:
            for running in core.running.units:  # a lottery ticket has gone back to its first weights
                running.moved()

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Save pruned weights of the consensus: ``ModelPruning`` reads the weights once more."""
        if isinstance(getattr(trainer.strategy, "core", None), StrategyCore):
            with trainer.strategy.consensus():
                super().on_save_checkpoint(trainer, pl_module, checkpoint)
        else:
            super().on_save_checkpoint(trainer, pl_module, checkpoint)


def refuse_local_pruning(trainer: Any, core: StrategyCore, package: ModuleType) -> None:
    """Refuse callbacks that would prune each worker's local weights.

    Args:
        trainer: whose callbacks are looked at.
        core: of its strategy, with the engine.
        package: the Lightning that the Trainer belongs to.

    Raises:
        ValueError: if there is one, and workers that may differ.
    """
    becomes_local = isinstance(getattr(core.algorithm, "sync_every", None), PostLocal)
    if core.everyone.alone or (core.exchanges_gradients and not becomes_local):
        return
    for callback in trainer.callbacks:
        if isinstance(callback, package.callbacks.ModelPruning) and not isinstance(callback, PruneConsensusMixin):
            raise ValueError(
                f"{type(callback).__name__} prunes each worker's local weights, so the workers' masks would differ. "
                "Use lightning_slowmo.callbacks.PruneConsensus with the same arguments."
            )


if not TYPE_CHECKING:
    try:
        from lightning.pytorch.callbacks import EMAWeightAveraging as _Base
        from lightning.pytorch.callbacks import ModelPruning as _Pruning
    except ImportError:  # pytorch_lightning alone is installed
        pass
    else:

        class EMAAtSync(AtSyncMixin, _Base):  # noqa: D101
            __doc__ = AtSyncMixin.__doc__

        class PruneConsensus(PruneConsensusMixin, _Pruning):  # noqa: D101
            __doc__ = PruneConsensusMixin.__doc__
