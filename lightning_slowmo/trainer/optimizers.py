"""The optimizers of a fit: none is stepped without the strategy, and some are replaced in the middle of it."""

from __future__ import annotations

from typing import Any

from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_slowmo.trainer.base import StrategyPart
from lightning_slowmo.unsynced import refuse_steps

ADVICE = (
    "In manual optimization call step() on what self.optimizers() returns, not with use_pl_optimizer=False. An "
    "optimizer with steps of its own around one that it holds (SAM's first_step and second_step) needs step(closure)."
)
"""What to do instead of stepping an optimizer without the strategy."""


class OptimizersMixin(StrategyPart):
    """Which optimizers the engine runs on."""

    def setup_optimizers(self, trainer: Any) -> None:
        """Make the optimizers; in the middle of a fit, call this on all ranks to replace those that there are.

        The algorithm goes on with the slow state of the parameters that stay, see
        :meth:`~lightning_slowmo.core.StrategyCore.replace_optimizers`.

        Example::

            def on_train_epoch_start(self):  # of a LightningModule that grows
                if self.current_epoch == 3:
                    self.trainer.strategy.barrier()  # workers with more batches may still train the present layers
                    self.net.append(torch.nn.Linear(8, 8))
                    self.trainer.strategy.setup_optimizers(self.trainer)  # calls configure_optimizers
        """
        super().setup_optimizers(trainer)
        if self.core.training:
            assert self.lightning_module is not None
            with self._flags():
                self.core.replace_optimizers(self.optimizers, self.lightning_module)
            self._wrap_in_node()
            self._watch_optimizers()

    def _wrap_in_node(self) -> None:
        """Let DDP average the gradients of the model's present parameters inside nodes, if there are nodes."""
        node = self.core.node_group
        if node is not None:
            model = self.model.module if isinstance(self.model, DistributedDataParallel) else self.model
            assert model is not None
            devices = self.determine_ddp_device_ids()
            self.model = DistributedDataParallel(model, device_ids=devices, process_group=node, **self.ddp_kwargs)

    def _watch_optimizers(self) -> None:
        """Raise where one of the present optimizers is stepped without the strategy."""
        watch = refuse_steps(self.optimizers, lambda: self._fit.stepping or not self.core.training, ADVICE)
        self._fit.undo.append(watch)

    def _index_of(self, optimizer: Optimizer) -> int:
        """Number of an optimizer that is about to step.

        Raises:
            RuntimeError: if the engine does not run on it.
        """
        for index, unit in enumerate(self.core.running.units):
            if unit.optimizer is optimizer:
                return index
        raise RuntimeError(
            f"{type(optimizer).__name__} was put in place of another during training, so its parameters would never "
            "be synced. Let configure_optimizers return it, and call trainer.strategy.setup_optimizers(trainer) in a "
            "hook such as on_train_epoch_start, on all ranks."
        )
