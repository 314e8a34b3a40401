"""Checkpoints of Fabric: the consensus in the file that was asked for, and beside it what each rank has of its own.

The file is what any other strategy of Fabric would write, so that they can load it. What is not one of the models that
were set up (optimizers, schedulers, step counters, averaged copies of the weights) is each rank's own: the file has
rank 0's, and :meth:`CheckpointsMixin.load_checkpoint` gives every rank its own back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn import Module, ModuleList
from torch.optim import Optimizer

from lightning_slowmo.checkpoint import KEY, Restored
from lightning_slowmo.communication import Reason
from lightning_slowmo.fabric.base import StrategyPart


class CheckpointsMixin(StrategyPart):
    """What ``fabric.save``, ``fabric.load`` and ``fabric.load_raw`` call."""

    def save_checkpoint(
        self,
        path: str | Path,
        state: dict[str, Any],
        storage_options: Any = None,
        filter: dict[str, Callable[[str, Any], bool]] | None = None,
    ) -> None:
        """Write the file with the consensus, and beside it what differs by rank, if an optimizer is among the state.

        Args:
            path: of the file.
            state: what to save: models, optimizers, objects with ``state_dict``, and plain values.
            storage_options: for the CheckpointIO plugin.
            filter: for some entries, which of their keys are saved.
        """
        weights, resumable = self._models_in(state), bool(self._optimizers_in(state))
        with self._consensus(Reason.SAVE):
            content = {name: self._content(name, entry, filter or {}) for name, entry in state.items()}
            if self.core.training and self.is_global_zero:
                # Copied, since the worker's own parameters come back into these tensors.
                content |= {name: {key: _cloned(value) for key, value in content[name].items()} for name in weights}

        def write_main() -> None:
            if self.is_global_zero:
                self.checkpoint_io.save_checkpoint(content, path, storage_options)

        if self._run.failed or not resumable:
            write_main()
        else:
            self.core.save(content, path, write_main, [name for name in state if name not in weights])

    def load_checkpoint(
        self,
        path: str | Path,
        state: Module | Optimizer | dict[str, Any] | None = None,
        strict: bool = True,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Restore what was saved; where models are among it, the algorithm goes on from there.

        With all models and optimizers that were set up, and as many ranks as saved, training goes on bit for bit.

        Args:
            path: of the file.
            state: what to restore: a dictionary as for :meth:`save_checkpoint`, or one model or optimizer whose
                ``state_dict`` the file is. None returns the file's content.
            strict: whether every entry of ``state`` must be in the file.
            weights_only: for ``torch.load``.

        Returns:
            What is left in the file.

        Raises:
            KeyError: if an entry is missing.
            ValueError: if the file is damaged.
        """
        run = self._run
        entries = {"": state} if isinstance(state, Module) else state if isinstance(state, dict) else {}
        weights = self._models_in(entries)
        if not weights:
            return super().load_checkpoint(path, state, strict, weights_only)
        self._meet(Reason.BROADCAST)
        if isinstance(state, Module):
            super().load_checkpoint(path, state, strict, weights_only)
            self._start_anew()
            self._note_versions()
            return {}
        checkpoint = super().load_checkpoint(path, None, strict, weights_only)
        missing = [name for name in entries if name not in checkpoint]
        if missing and strict:
            raise KeyError(f"{path} has no entry {missing[0]!r}. It has: {', '.join(checkpoint)}.")
        whole = _parameters(*run.modules) <= _parameters(*(entries[name] for name in weights))
        whole &= len(self._optimizers_in(entries)) == len(run.optimizers)
        restored = self.core.load(checkpoint, path, weights) if whole else Restored()
        if KEY in checkpoint and not whole:
            rank_zero_warn(f"Not all models and optimizers are loaded from {path}: the algorithm starts anew.")
        if restored.warning:
            rank_zero_warn(restored.warning)
        checkpoint.update(restored.entries or {})
        checkpoint.pop(KEY, None)
        self._restore(entries, checkpoint, strict)
        self._start_anew()
        self.core.restore(restored)
        self._note_versions()
        return checkpoint

    def _restore(self, entries: dict[str, Any], checkpoint: dict[str, Any], strict: bool) -> None:
        """Give each entry what the checkpoint has for it, and take it out of the checkpoint."""
        for name, entry in list(entries.items()):
            if name not in checkpoint:
                continue
            saved = checkpoint.pop(name)
            if isinstance(entry, Module):
                self.load_module_state_dict(entry, saved, strict)
            elif hasattr(entry, "load_state_dict"):
                entry.load_state_dict(saved)
            else:
                entries[name] = saved

    def _start_anew(self) -> None:
        """Make the engine for the models and optimizers that were set up, as they are now; every process calls this."""
        run = self._run
        self.core.make_engine(run.optimizers, run.modules[0] if len(run.modules) == 1 else ModuleList(run.modules))

    def _content(self, name: str, entry: Any, filter: Mapping[str, Callable[[str, Any], bool]]) -> Any:
        """What of an entry is saved, as Fabric's own strategies do it."""
        if isinstance(entry, Module):
            entry = self.get_module_state_dict(entry)
        elif isinstance(entry, Optimizer):
            entry = self.get_optimizer_state(entry)
        elif hasattr(entry, "state_dict"):
            entry = entry.state_dict()
        if name in filter and isinstance(entry, dict):
            return {key: value for key, value in entry.items() if filter[name](key, value)}
        return entry

    def _models_in(self, state: Mapping[str, Any]) -> list[str]:
        """The entries that hold parameters of the models that were set up, by themselves or inside other modules."""
        own = _parameters(*self._run.modules)
        return [name for name, entry in state.items() if isinstance(entry, Module) and own & _parameters(entry)]

    def _optimizers_in(self, state: Mapping[str, Any]) -> list[str]:
        """The entries that are optimizers that were set up."""
        return [name for name, entry in state.items() if any(entry is each for each in self._run.optimizers)]


def _parameters(*modules: Module) -> set[int]:
    return {id(parameter) for module in modules for parameter in module.parameters()}


def _cloned(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
