"""What simulated workers share between batches: their cores, the consensus, and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_slowmo import checkpoint as checkpoints
from lightning_slowmo.algorithms import SyncReport
from lightning_slowmo.checkpoint import Restored
from lightning_slowmo.communication import Reason
from lightning_slowmo.communication.in_process import together
from lightning_slowmo.core import StrategyCore
from lightning_slowmo.replicas import Stage

if TYPE_CHECKING:
    from lightning.pytorch.strategies import SingleDeviceStrategy
else:  # a subclass adds either package's
    SingleDeviceStrategy = object

T = TypeVar("T")


class SimulatedState(SingleDeviceStrategy):
    """Base of :class:`~lightning_slowmo.trainer.simulated.SimulatedMixin`.

    Attributes:
        cores: of the workers, by rank.
        parallel_devices: the Trainer's; one device.
        package: the Lightning that a subclass serves: ``lightning.pytorch`` or ``pytorch_lightning``.
    """

    cores: list[StrategyCore]
    parallel_devices: list[torch.device] | None
    package: ClassVar[ModuleType]
    _stage: Stage | None
    _restored: list[Restored]

    @property
    def core(self) -> StrategyCore:
        """The first worker's core."""
        return self.cores[0]

    @property
    def report(self) -> SyncReport | None:
        """Totals over all syncs of the present or last fit, of the first worker; None if there was none."""
        return self.core.report

    @property
    def root_device(self) -> torch.device:
        """The device on which all workers train."""
        return self.parallel_devices[0] if self.parallel_devices else torch.device("cpu")

    @property
    def _trainer(self) -> Any:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    # All workers ------------------------------------------------------------------------------------------------------

    def _on_all(self, function: Callable[[StrategyCore], T]) -> list[T]:
        """Call a function with every worker's core, while none stands on the stage; then the first one does."""
        stage = self._stage
        if stage is not None:
            stage.clear()
            stage.spread_options()  # between batches a scheduler may have changed them
        try:
            return together([core.workers for core in self.cores], lambda workers: function(self.cores[workers.rank]))
        finally:
            if stage is not None:
                stage.put(0)

    # The consensus ----------------------------------------------------------------------------------------------------

    @contextmanager
    def consensus(self) -> Iterator[None]:
        """Let the model hold the consensus in this context; afterwards the first worker has its own parameters back."""
        with self._consensus(Reason.CONSENSUS):
            yield

    @contextmanager
    def _consensus(self, reason: Reason) -> Iterator[None]:
        if not self.core.training or self.core.running.in_consensus:
            yield
            return
        self._on_all(lambda core: core.enter_consensus(reason))
        try:
            yield
        finally:
            self._on_all(lambda core: core.running.leave_consensus())

    def on_validation_start(self) -> None:
        """Validate the consensus."""
        super().on_validation_start()
        if self._trainer.state.fn == "fit" and self.core.engine is not None:
            self._on_all(lambda core: core.enter_consensus(Reason.VALIDATION))

    def on_validation_end(self) -> None:
        """Give the workers their own parameters back."""
        super().on_validation_end()
        if self._trainer.state.fn == "fit" and self.core.engine is not None:
            self._on_all(lambda core: core.running.leave_consensus())

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The weights to save: the consensus."""
        with self._consensus(Reason.SAVE):
            state = super().lightning_module_state_dict()
            return {key: value.detach().clone() if isinstance(value, Tensor) else value for key, value in state.items()}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write the same files as as many processes would."""
        if self.core.engine is None or "optimizer_states" not in checkpoint:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        assert self._stage is not None
        replicas, save = self._stage.replicas, super().save_checkpoint
        scaler = type(self.precision_plugin).__qualname__  # where Lightning keeps a gradient scaler's state

        def save_own(core: StrategyCore) -> None:
            states = [optimizer.state_dict() for optimizer in replicas[core.workers.rank].optimizers]
            own = checkpoint | {"optimizer_states": states}
            core.save(
                own, filepath, lambda: save(own, filepath, storage_options) if core is self.core else None, (scaler,)
            )

        self._on_all(save_own)

    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read Lightning's file; to go on with training, also every worker's own state."""
        checkpoint = super().load_checkpoint(checkpoint_path, *args, **kwargs)
        if self._trainer.state.fn == "fit" and "optimizer_states" in checkpoint:
            self._restored = self._on_all(lambda core: core.load(checkpoint, checkpoint_path))
            if self._restored[0].warning:
                rank_zero_warn(self._restored[0].warning)
            checkpoint.update(self._restored[0].entries or {})
        return checkpoint

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Restore the workers' optimizers, then their engines."""
        super().load_optimizer_state_dict(checkpoint)
        if not self._restored or self._stage is None:
            return
        replicas = self._stage.replicas

        def restore(core: StrategyCore) -> None:
            rank = core.workers.rank
            states = (self._restored[rank].entries or {}).get("optimizer_states")
            if states is None:  # of another number of workers, so that all have the same, and need their own copies
                states = deepcopy(checkpoint["optimizer_states"])
            for optimizer, state in zip(replicas[rank].optimizers, states, strict=True):
                optimizer.load_state_dict(state)
            core.restore(self._restored[rank])

        self._on_all(restore)
        self._restored = []

    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove Lightning's file and what lies beside it."""
        checkpoints.remove(filepath)
        super().remove_checkpoint(filepath)
