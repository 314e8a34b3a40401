"""Checkpoints of sharded workers: the consensus as a distributed checkpoint (DCP) or as one file, the rest beside it.

A distributed checkpoint is a folder that Lightning's own ``ModelParallelStrategy`` opens too: ``meta.pt`` has what is
not sharded, and the processes of the first worker write the weights and their optimizers' state::

    model.ckpt/
        meta.pt           what is no weight, with the checksums of the files below
        .metadata         of DCP
        __0_0.distcp      of rank 0
    model.ckpt.slowmo/    slow state and what is each process's own, as for whole models

It is written as ``model.ckpt.part`` and takes the old one's place when it is complete. Files that are damaged, or
belong to another save, are found by their checksums before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from lightning_slowmo.checkpoint import Restored, distributed
from lightning_slowmo.communication import Reason
from lightning_slowmo.sharded_core import ShardedCore
from lightning_slowmo.trainer.checkpoints import CheckpointsMixin


class ShardedCheckpointsMixin(CheckpointsMixin):
    """Saving and loading where every process holds shards of the model."""

    core: ShardedCore
    save_distributed_checkpoint: bool
    _loaded_from: Path = Path()
    _on_sync: Callable[[bool], None]

    @property
    def _keeps_weights(self) -> bool:
        """Every process of the first worker writes its shards."""
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning is to call :meth:`load_optimizer_state_dict`, once the weights are there."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The weights to save, the consensus: this process's shards, or whole tensors on rank 0."""
        if self._failed:
            return {}
        assert self.model is not None
        with self._consensus(Reason.SAVE):
            options = StateDictOptions(full_state_dict=not self.save_distributed_checkpoint, cpu_offload=True)
            state: dict[str, Any] = get_model_state_dict(self.model, options=options)
            return {key: value.detach().clone() for key, value in state.items()}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """This process's part of an optimizer's state."""
        wrapped = isinstance(optimizer, self.package.core.optimizer.LightningOptimizer)
        return distributed.own_state(optimizer.optimizer if wrapped else optimizer)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write the folder or file with the consensus, and beside it what differs by rank (unless weights alone)."""
        if storage_options is not None:
            raise TypeError(
                f"{type(self).__name__} writes checkpoints without CheckpointIO; leave out storage_options."
            )
        if self._failed:  # shards are of use together alone, and the other processes may never come
            rank_zero_warn(f"{filepath} is not saved: after an exception no worker has all of the model.")
            return
        everyone = self.core.everyone
        with self._uninterrupted(), everyone.naming("writing a checkpoint"):
            path = Path(everyone.gather_text(str(filepath))[0])
            own = checkpoint.pop("optimizer_states", None)
            write_main = (self._write_folder if self.save_distributed_checkpoint else self._write_file)(
                checkpoint, path, own is not None
            )
            if own is None or self.core.engine is None:
                write_main()
                return
            scaler = type(self.precision_plugin).__qualname__
            self.core.save(checkpoint, path, write_main, (scaler,), {"optimizer_states": own})

    def _write_folder(self, checkpoint: dict[str, Any], path: Path, optimizers: bool) -> Callable[[], None]:
        """Write the shards of the first worker. Returns what puts the folder in its place."""
        core, part = self.core, Path(f"{path}.part")
        content = {"state_dict": checkpoint.pop("state_dict")}
        if optimizers:
            assert self.model is not None
            names = distributed.names_of(self.model)
            states = [distributed.named_state(optimizer, names) for optimizer in self.optimizers]
            content |= {f"optimizer_{index}": state for index, state in enumerate(states)}
        assert core.node is not None
        checkpoint[distributed.FILES] = distributed.write(
            part, content, core.everyone, first=core.workers.rank == 0, group=core.node.group
        )

        def write_main() -> None:
            if self.is_global_zero:
                torch.save(checkpoint, part / distributed.META)
                distributed.move(part, path)

        return write_main

    def _write_file(self, checkpoint: dict[str, Any], path: Path, optimizers: bool) -> Callable[[], None]:
        """Make the optimizers' state whole. Returns what writes the file."""
        if optimizers:
            checkpoint["optimizer_states"] = [distributed.whole_state(optimizer) for optimizer in self.optimizers]

        def write_main() -> None:
            if self.is_global_zero:
                part = Path(f"{path}.part")
                self.checkpoint_io.save_checkpoint(checkpoint, part)
                distributed.move(part, path)

        return write_main

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load the weights of a folder or file, of this strategy or others; to go on with training, all the rest.

        Raises:
            ValueError: on all processes, if a file of the folder is damaged, missing, or of another save.
        """
        path = Path(self.broadcast(checkpoint_path))
        folder = path.is_dir()
        main = path / distributed.META if folder else path
        checkpoint = torch.load(main, map_location="cpu", weights_only=weights_only, mmap=not folder)
        if distributed.FILES in checkpoint:
            distributed.verify(path, checkpoint[distributed.FILES], self.core.everyone)
        optimizers, self.optimizers = self.optimizers, []  # Lightning is to load the weights alone
        try:
            super(CheckpointsMixin, self).load_checkpoint(path, weights_only=weights_only)
        finally:
            self.optimizers = optimizers
        weights = not folder and "optimizer_states" not in checkpoint
        if self._trainer.state.fn == "fit" and not weights:
            restored = self._fit.restored = self.core.load(checkpoint, path)
            if restored.warning:
                rank_zero_warn(restored.warning)
            checkpoint.update(restored.entries or {})
            self._loaded_from = path
            checkpoint.setdefault("optimizer_states", [])  # in a folder they are among the shards
        checkpoint.pop("state_dict", None)
        return checkpoint

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore optimizers, and make the engine again, whose slow state begins with the weights that were loaded."""
        restored, self._fit.restored = self._fit.restored, Restored()
        own = (restored.entries or {}).get("optimizer_states")
        assert self.model is not None
        assert self.lightning_module is not None
        names = distributed.names_of(self.model)
        for index, optimizer in enumerate(self.optimizers):
            if own is not None:
                distributed.load_own_state(optimizer, own[index])
            elif self._loaded_from.is_dir():
                distributed.load_named_state(self._loaded_from, f"optimizer_{index}", optimizer, names)
            else:
                distributed.load_whole_state(optimizer, checkpoint["optimizer_states"][index])
        self.core.make_engine(self.optimizers, self.lightning_module).on_sync = self._on_sync
        self.core.restore(restored)
