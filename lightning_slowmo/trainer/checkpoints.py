"""Checkpoints of the Trainer: the consensus in Lightning's own file, and beside it what each rank has of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_slowmo import checkpoint as checkpoints
from lightning_slowmo.checkpoint import Restored
from lightning_slowmo.communication import Reason
from lightning_slowmo.trainer.consensus import ConsensusMixin


class CheckpointsMixin(ConsensusMixin):
    """Saving, loading and removing checkpoints."""

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The weights to save: the consensus."""
        with self._consensus(Reason.SAVE):
            state = super().lightning_module_state_dict()
            if not self.core.training or self._failed:
                return state
            # Copied, since the worker's own parameters come back into these tensors, while a writer in the background
            # may not have finished.
            return {key: _cloned(value) for key, value in state.items()} if self._keeps_weights else state

    @property
    def _keeps_weights(self) -> bool:
        """Whether this process needs the weights to save once the worker has its own again."""
        return self.is_global_zero

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write Lightning's file, and beside it what differs by rank (unless only weights are saved)."""

        def write_main() -> None:
            # Under a temporary name, then renamed: Lightning's own writer moves the file from the temporary folder,
            # which is a copy, and can be cut short, where that is on another disk.
            local = "://" not in str(filepath)
            renamed = local and type(self.checkpoint_io) is self.package.plugins.TorchCheckpointIO
            target = f"{filepath}.part" if renamed else filepath
            super(CheckpointsMixin, self).save_checkpoint(checkpoint, target, storage_options)
            if renamed and self.is_global_zero:
                os.replace(target, filepath)

        if self.core.engine is None or self._failed or "optimizer_states" not in checkpoint:
            write_main()
            return
        scaler = type(self.precision_plugin).__qualname__  # where Lightning keeps a gradient scaler's state
        with self._uninterrupted():
            self.core.save(checkpoint, filepath, write_main, (scaler,))

    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read Lightning's file; to go on with training, also this rank's own state."""
        checkpoint = super().load_checkpoint(checkpoint_path, *args, **kwargs)
        if self._trainer.state.fn == "fit" and "optimizer_states" in checkpoint:
            restored = self._fit.restored = self.core.load(checkpoint, checkpoint_path)
            if restored.warning:
                rank_zero_warn(restored.warning)
            checkpoint.update(restored.entries or {})
        return checkpoint

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore optimizers, then the engine, which needs their parameters."""
        super().load_optimizer_state_dict(checkpoint)
        self.core.restore(self._fit.restored)
        self._fit.restored = Restored()

    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove Lightning's file and what lies beside it."""
        if self.is_global_zero:
            checkpoints.remove(filepath)
        super().remove_checkpoint(filepath)


def _cloned(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
