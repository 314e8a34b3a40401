"""Error feedback of a compressed mean in two shots: what workers' messages, and owners' sums, have left out so far."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_slowmo.averaging.averager import copy_state
from lightning_slowmo.communication.compressed import Chunk, chunks
from lightning_slowmo.communication.pipeline import complete
from lightning_slowmo.communication.workers import Workers
from lightning_slowmo.parameters import Layout


class Feedback:
    """The residuals of this worker.

    In a mean over n workers, a worker's residual counts 1 / n and an owner's counts whole. So *the* residual of the
    mean, what is still to come, is ``mean_i worker_i + owners``; it is this that is kept when the number of workers
    changes.

    Args:
        layout: the parameters, or what is laid out as they are.
        workers: who takes part.

    Attributes:
        worker: what this worker's messages have left out, one flat tensor per run.
        owner: what the sums of the chunks that this worker owns have left out, one tensor per bucket.
    """

    def __init__(self, layout: Layout, workers: Workers) -> None:
        self.layout = layout
        self.workers = workers
        self.worker = layout.zeros()
        self.owner = [
            torch.zeros(chunk.stop - chunk.start, dtype=bucket.dtype, device=bucket.device)
            for bucket, chunk in zip(layout.buckets, self._owned(), strict=True)
        ]

    def _owned(self) -> list[Chunk]:
        return [chunks(bucket.segments, self.workers.size)[self.workers.rank] for bucket in self.layout.buckets]

    def _spread(self) -> list[Tensor]:
        """The owner's residuals laid out as the parameters are, zero in what others own."""
        buffers = self.layout.zeros()
        for bucket, chunk, own in zip(self.layout.buckets, self._owned(), self.owner, strict=True):
            chunk.of(bucket.of(buffers)).copy_(own)
        return buffers

    def contribution(self) -> list[Tensor]:
        """This worker's part of the residual of the mean, whose mean over the workers is the whole of it."""
        parts = zip(self.worker, self._spread(), strict=True)
        return [own.add(spread, alpha=self.workers.size) for own, spread in parts]

    def moved_to(self, layout: Layout) -> Feedback:
        """The same in a new layout, whose chunks have other owners: workers take over what owners had."""
        new = Feedback(layout, self.workers)
        layout.carry(self.layout, self.contribution(), new.worker)
        return new

    def total(self) -> list[Tensor]:
        """The residual of the mean, in the shapes of the parameters. All workers must call this."""
        buffers = self.contribution()
        for flat in buffers:
            flat.div_(complete(self.workers.sum(flat)))
        return self.layout.per_parameter(buffers)

    def set_total(self, total: list[Tensor]) -> None:
        """Let the residual of the mean be what :meth:`total` returned, also with another number of workers."""
        copy_state(self.layout.per_parameter(self.worker), total, "residual")
        for own in self.owner:
            own.zero_()

    def state_dict(self) -> dict[str, Any]:
        """This worker's residuals."""
        return {
            "worker": self.layout.per_parameter(self.worker),
            "owner": self.layout.per_parameter(self._spread()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned on this worker, with as many workers."""
        copy_state(self.layout.per_parameter(self.worker), state["worker"], "residual")
        buffers = self.layout.zeros()
        copy_state(self.layout.per_parameter(buffers), state["owner"], "residual of sums")
        for bucket, chunk, own in zip(self.layout.buckets, self._owned(), self.owner, strict=True):
            own.copy_(chunk.of(bucket.of(buffers)))
