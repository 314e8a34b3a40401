"""The mean of compressed differences of which every worker gets everybody's, with an error that decays.

With x the last common point, y_i the parameters of worker i, C a compressor and e_i what worker i has not told yet::

    e_i = decay e_i + (x - y_i);    q_i = C(e_i);    e_i = e_i - q_i;    mean = x - mean_i q_i

Nothing is compressed a second time, as in two shots it is: what workers decode is the sum itself.
"""

from __future__ import annotations

from typing import Any

import torch

from lightning_slowmo.averaging.averager import OnSum, copy_state
from lightning_slowmo.averaging.compressed import CompressedAverager, generators
from lightning_slowmo.averaging.drift import Drift
from lightning_slowmo.communication.meeting import Round
from lightning_slowmo.communication.pipeline import Transfer, complete, pipeline
from lightning_slowmo.communication.workers import Workers
from lightning_slowmo.compression import Compressor
from lightning_slowmo.parameters import Bucket, Layout


class GatheredAverager(CompressedAverager):
    """Average what all workers tell of their differences.

    Args:
        layout: the parameters.
        workers: who takes part.
        compressor: how differences are compressed.
        decay: what is kept of the error from one sync to the next, in [0, 1].
        seed: of the compressor's randomness.

    Attributes:
        residual: e, one flat tensor per run.
    """

    def __init__(self, layout: Layout, workers: Workers, compressor: Compressor, decay: float, seed: int = 0) -> None:
        super().__init__(layout, workers, compressor, error_feedback=False, seed=seed)
        self.decay = decay
        self.residual = layout.zeros()

    def average(self, round: Round, on_sum: OnSum | None = None) -> float:
        """Average; ``on_sum`` gets the mean, with a weight of 1.

        A worker that does not count, as it took no step or is not healthy, keeps its error and tells zeros.
        """
        drift = Drift(self.layout.numel)
        generator_on = generators(self.seed, self.workers.rank, self.syncs)
        weights = round.weights

        def transfer(bucket: Bucket) -> Transfer[None]:
            flat = bucket.pack(self.scratch.take(bucket))
            local, reference, residual = drift.sample(flat), bucket.of(self.reference), bucket.of(self.residual)
            start = bucket.rounded(reference.to(flat.device))
            counts = weights[self.workers.rank] > 0
            message = residual.mul_(self.decay).add_(start - flat) if counts else torch.zeros_like(residual)
            payload = self.compressor.compress(message, bucket.segments, generator_on(bucket.device))
            if counts:
                self.compressor.decode(payload, bucket.segments, flat.dtype).add_to(residual, -1.0)
            everyones = payload.new_empty(self.workers.size * payload.numel())
            yield from self.workers.gather_pieces(everyones, payload)
            mean = flat.copy_(start)
            for told, weight in zip(everyones.view(self.workers.size, -1), weights, strict=True):
                if weight:
                    decoded = self.compressor.decode(told, bucket.segments, flat.dtype)
                    decoded.add_to(mean, -weight / sum(weights))
            drift.compare(local, mean, 1.0)
            if on_sum is not None:
                for block, values in bucket.blocks(mean):
                    on_sum(block, values, 1.0)
            reference.copy_(mean)
            bucket.unpack(mean)

        pipeline(map(transfer, self.layout.buckets))
        self.syncs += 1
        return drift.value()

    def adopt_layout(self, layout: Layout) -> None:
        """Take over a new layout; nothing has been left out of a parameter that joins."""
        residual = layout.zeros()
        layout.carry(self.layout, self.residual, residual)
        self.residual = residual
        super().adopt_layout(layout)

    # State ------------------------------------------------------------------------------------------------------------

    def shared_state(self) -> dict[str, Any]:
        """The common point, the number of averages, and the mean of all errors, for another number of workers."""
        total = [flat.clone() for flat in self.residual]
        for flat in total:
            flat.div_(complete(self.workers.sum(flat)))
        return super().shared_state() | {"residual": self.layout.per_parameter(total)}

    def local_state(self) -> dict[str, Any]:
        """What this worker has not told yet."""
        return {"residual": self.layout.per_parameter(self.residual)}

    def load_shared_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`shared_state` returned."""
        super().load_shared_state(state)
        copy_state(self.layout.per_parameter(self.residual), state["residual"], "error")

    def load_local_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`local_state` returned."""
        super().load_local_state(state)
        copy_state(self.layout.per_parameter(self.residual), state["residual"], "error")
