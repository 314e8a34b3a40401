"""What Lightning and DDP communicate: each of Lightning's collectives behind a meeting, and errors that say who failed.

Callbacks and loggers call them whenever they like, while workers with more batches still train. The meeting lets those
finish first, helped by the ones that wait.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_slowmo.communication import Reason
from lightning_slowmo.trainer.base import StrategyPart


class CollectivesMixin(StrategyPart):
    """``barrier``, ``broadcast``, ``reduce`` and ``all_gather`` of the strategy, and what DDP does inside nodes."""

    def setup_environment(self) -> None:
        """From now on another worker's failure ends whatever this one waits for."""
        super().setup_environment()
        self.core.everyone.listen(True)

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all workers; nobody is waited for after an exception."""
        if self._failed:
            return
        self._meet(Reason.BARRIER)
        with self.core.everyone.naming("a barrier"):
            super().barrier(*args, **kwargs)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Broadcast an object."""
        self._meet(Reason.BROADCAST)
        with self.core.everyone.naming("a broadcast"):
            return super().broadcast(obj, src)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce a tensor, such as a metric."""
        self._meet(Reason.REDUCE)
        if self.core.training:
            self._fit.reductions.reduced()
        with self.core.everyone.naming("a reduction"):
            return super().reduce(tensor, group, reduce_op)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Gather a tensor."""
        self._meet(Reason.GATHER)
        with self.core.everyone.naming("a gather"):
            return super().all_gather(tensor, group, sync_grads)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The user's step; DDP broadcasts buffers in it."""
        with self.core.everyone.naming("a training step"):
            return super().training_step(*args, **kwargs)

    def backward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute gradients, which DDP averages inside nodes."""
        with self.core.everyone.naming("the average of the gradients in a node"):
            return super().backward(*args, **kwargs)

    def teardown(self) -> None:
        """From now on nobody waits for anybody."""
        self.core.everyone.listen(False)
        super().teardown()

    def _explain(self, exception: BaseException) -> None:
        """Name who failed in an error of torch.distributed that came by another way, such as a metric's own gather.

        Lightning raises the exception itself afterwards, so its text is what can be changed.
        """
        explained = self.core.everyone.explained(exception, "a collective")
        if explained is not None:
            exception.args = (str(explained),)
