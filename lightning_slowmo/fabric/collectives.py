"""Fabric's collectives while workers train: behind a meeting each, so that workers with more batches can come to them.

Those that come through the strategy say what they are; all others (torchmetrics, ``torch.distributed.all_reduce`` in a
loop) are seen at the process group.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from lightning_slowmo import private
from lightning_slowmo.communication import Reason
from lightning_slowmo.fabric.base import StrategyPart


class CollectivesMixin(StrategyPart):
    """``barrier``, ``broadcast``, ``all_reduce`` and ``all_gather``, and what does not come through the strategy."""

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all workers; nobody is waited for after an exception."""
        if not self._run.failed:
            with self._met(Reason.BARRIER, "a barrier"):
                super().barrier(*args, **kwargs)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Broadcast an object."""
        with self._met(Reason.BROADCAST, "a broadcast"):
            return super().broadcast(obj, src)

    def all_reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce a tensor, such as a metric."""
        with self._met(Reason.REDUCE, "a reduction"):
            return super().all_reduce(tensor, group, reduce_op)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Gather a tensor."""
        with self._met(Reason.GATHER, "a gather"):
            return super().all_gather(tensor, group, sync_grads)

    @contextmanager
    def _met(self, reason: Reason, what: str) -> Iterator[None]:
        """The workers meet, and not again for the collectives inside this context, whose errors name ``what``."""
        with self.core.everyone.naming(what):
            if not self._run.met:
                self._meet(reason)
            before, self._run.met = self._run.met, True
            try:
                yield
            finally:
                self._run.met = before

    def _watch_default_group(self) -> None:
        """Let the workers meet before every collective on the default group that does not come through the strategy."""

        def meet() -> None:
            if not self._run.met:
                self._meet(Reason.COLLECTIVE)

        self._run.undo.append(private.before_collectives(meet))
