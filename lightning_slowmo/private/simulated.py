"""Private members of Lightning that simulated workers need: loaders, and what the loops keep of one process."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from torch import Tensor


def prepared(trainer: Any, batch: Any) -> Any:
    """A batch as ``training_step`` gets it: converted, and moved to the device by the module's hooks.

    Tested with Lightning 2.6.6 (``_TrainingEpochLoop.advance``, ``LightningModule._on_before_batch_transfer``). Public
    replacement: none.
    """
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def combine(trainer: Any, batches: Sequence[Any]) -> Any:
    """The batches of several training loaders in the structure in which the user gave the loaders.

    Tested with Lightning 2.6.6 (``_FitLoop._combined_loader``, ``CombinedLoader._spec``). Public replacement: none.
    """
    loader = trainer.fit_loop._combined_loader
    return sys.modules[type(loader).__module__].tree_unflatten(list(batches), loader._spec)  # type: ignore[attr-defined]


def combination(trainer: Any) -> str:
    """How the Trainer combines its training loaders, such as ``"max_size_cycle"``.

    Tested with Lightning 2.6.6 (``CombinedLoader._mode``). Public replacement: none.
    """
    return trainer.fit_loop._combined_loader._mode


def accumulates(trainer: Any) -> bool:
    """Whether the gradients of the present batch are kept for a later step.

    Tested with Lightning 2.6.6 (``_FitLoop._should_accumulate``). Public replacement: none; the strategy is told by
    ``block_backward_sync``, if it has it.
    """
    return trainer.fit_loop._should_accumulate()


def uses_iterator(trainer: Any) -> bool:
    """Whether ``training_step`` takes the loader's iterator in place of a batch.

    Tested with Lightning 2.6.6 (``_DataLoaderIterDataFetcher``). Public replacement: none.
    """
    return type(trainer.fit_loop._data_fetcher).__name__ == "_DataLoaderIterDataFetcher"


def begins_epoch(trainer: Any) -> bool:
    """Whether this is the first batch that the Trainer trains on since an epoch began, or since it resumed in one.

    Tested with Lightning 2.6.6 (``_TrainingEpochLoop.batch_progress``). Public replacement: the ``batch_idx`` of
    ``on_train_batch_start``, which does not tell of a resumed epoch.
    """
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return progress.current.ready <= 1


class LoopState:
    """What the Trainer's loops keep of one process while it trains on a batch.

    Tested with Lightning 2.6.6 (``_AutomaticOptimization.optim_progress``, ``_ManualOptimization.optim_step_progress``,
    ``LightningModule._current_fx_name``, ``GradScaler._scale``, ``_growth_tracker``). Public replacement: none.

    Args:
        trainer: whose loops.
        own: whether these are the loops' own counters; otherwise copies are made.
        profiler: what measures this worker.
        earlier: this worker's state before, whose loss scale goes on.
    """

    def __init__(self, trainer: Any, own: bool, profiler: Any, earlier: LoopState | None = None) -> None:
        self._trainer, self._profiler = trainer, profiler
        loop, clone = trainer.fit_loop.epoch_loop, (lambda value: value) if own else deepcopy
        self._automatic = clone(loop.automatic_optimization.optim_progress)
        self._manual = clone(loop.manual_optimization.optim_step_progress)
        self._hook: str | None = trainer.lightning_module._current_fx_name
        self._schedules = [deepcopy(each.scheduler.state_dict()) for each in self._schedulers]
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        present = None if scaler is None else (scaler._scale, scaler._growth_tracker)
        self._scale: Any = earlier._scale if earlier else present and tuple(map(_own, present))

    @property
    def _schedulers(self) -> list[Any]:
        """The schedulers that a worker steps by itself."""
        trainer = self._trainer
        return [] if trainer.lightning_module.automatic_optimization else trainer.strategy.lr_scheduler_configs

    def install(self) -> None:
        """Let the loops have this state."""
        trainer = self._trainer
        loop = trainer.fit_loop.epoch_loop
        loop.automatic_optimization.optim_progress = self._automatic
        loop.manual_optimization.optim_step_progress = self._manual
        trainer.lightning_module._current_fx_name = self._hook
        trainer.profiler = self._profiler
        if not trainer.lightning_module.automatic_optimization:  # workers whose batch has ended stop the counting
            loop.manual_optimization.on_run_start()
        for each, state in zip(self._schedulers, self._schedules, strict=True):
            each.scheduler.load_state_dict(state)
        if self._scale is not None:
            trainer.precision_plugin.scaler._scale, trainer.precision_plugin.scaler._growth_tracker = self._scale

    def take(self) -> None:
        """Take what has become of it."""
        trainer = self._trainer
        self._hook = trainer.lightning_module._current_fx_name
        self._schedules = [dict(each.scheduler.state_dict()) for each in self._schedulers]
        if self._scale is not None:
            self._scale = (trainer.precision_plugin.scaler._scale, trainer.precision_plugin.scaler._growth_tracker)


def _own(tensor: Tensor | None) -> Tensor | None:
    """A copy. Tested with torch 2.15. Public replacement: none."""
    return None if tensor is None else tensor.clone()
