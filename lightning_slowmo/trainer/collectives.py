"""All collectives on the default process group while workers train: behind a meeting each, and failing by name.

Callbacks, loggers and metrics communicate whenever they like, while workers with more batches still train. The meeting
lets those finish first, helped by the ones that wait. Those that come through the strategy say what they are; all
others (torchmetrics, ``torch.distributed.all_reduce`` in a hook, the backward pass of ``all_gather``) are seen at the
process group.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lightning_slowmo import private
from lightning_slowmo.communication import Reason
from lightning_slowmo.communication.reduction import operation_name, reduce_present
from lightning_slowmo.trainer.base import StrategyPart


class CollectivesMixin(StrategyPart):
    """``barrier``, ``broadcast``, ``reduce`` and ``all_gather`` of the strategy, and what does not come through it."""

    def setup_environment(self) -> None:
        """From now on another worker's failure ends whatever this one waits for."""
        super().setup_environment()
        self.core.everyone.listen(True)

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all workers; nobody is waited for after an exception."""
        if self._failed:
            return
        with self._met(Reason.BARRIER, "a barrier"):
            super().barrier(*args, **kwargs)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Broadcast an object."""
        with self._met(Reason.BROADCAST, "a broadcast"):
            return super().broadcast(obj, src)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce a tensor, such as a metric.

        Workers that have no batches left in the present epoch have no share in what is reduced in a step.
        """
        with self._met(Reason.REDUCE, "a reduction"):
            if not self.core.training:
                return super().reduce(tensor, group, reduce_op)
            self._fit.reductions.reduced()
            if not isinstance(tensor, Tensor):
                return super().reduce(tensor, group, reduce_op)
            name = operation_name(reduce_op)
            if name in ("mean", "avg") and not (tensor.is_floating_point() or tensor.is_complex()):
                tensor = tensor.double()  # else Lightning rounds down the number of examples that it divides by
            meeting = self.core.running.last_meeting
            if meeting is None or meeting.wanted is None:
                return super().reduce(tensor, group, reduce_op)
            if group not in (None, dist.group.WORLD):
                name = "in a group of processes"
            return reduce_present(tensor, name, meeting, self.core.everyone, self.root_device)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Gather a tensor."""
        with self._met(Reason.GATHER, "a gather"):
            return super().all_gather(tensor, group, sync_grads)

    @contextmanager
    def _met(self, reason: Reason, what: str) -> Iterator[None]:
        """The workers meet, and not again for the collectives inside this context, whose errors name ``what``."""
        with self._uninterrupted(), self.core.everyone.naming(what):
            self._meet(reason)
            before, self._fit.met = self._fit.met, True
            try:
                yield
            finally:
                self._fit.met = before

    def _watch_default_group(self) -> None:
        """Let the workers meet before every collective on the default group that does not come through the strategy."""

        def meet() -> None:
            if not self._fit.met:
                self._meet(Reason.COLLECTIVE)

        self._fit.undo.append(private.before_collectives(meet))

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
