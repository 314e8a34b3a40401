"""Lightning's own collectives, each behind a meeting.

Callbacks and loggers call them whenever they like, while workers with more batches still train. The meeting lets those
finish first, helped by the ones that wait.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_slowmo.communication import Reason
from lightning_slowmo.trainer.base import StrategyPart


class CollectivesMixin(StrategyPart):
    """``barrier``, ``broadcast``, ``reduce`` and ``all_gather`` of the strategy."""

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all workers; nobody is waited for after an exception."""
        if self._failed:
            return
        self._meet(Reason.BARRIER)
        super().barrier(*args, **kwargs)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Broadcast an object."""
        self._meet(Reason.BROADCAST)
        return super().broadcast(obj, src)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce a tensor, such as a metric."""
        self._meet(Reason.REDUCE)
        if self.core.training:
            self._fit.reductions.reduced()
        return super().reduce(tensor, group, reduce_op)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Gather a tensor."""
        self._meet(Reason.GATHER)
        return super().all_gather(tensor, group, sync_grads)
