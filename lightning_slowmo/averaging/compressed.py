"""The mean of compressed messages, the same on all workers to the last bit.

With y_i the parameters of worker i, x the *reference* (the last common point, which all know), and C a compressor::

    difference    x = x + mean_i C(y_i - x)        vanishes as training converges
    model         x = mean_i C(y_i)

where the mean is computed along a ring or in two shots (:mod:`~lightning_slowmo.communication.compressed`), and in two
shots perhaps with error feedback.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_slowmo.averaging.averager import Averager, OnSum, copy_state
from lightning_slowmo.averaging.drift import Drift
from lightning_slowmo.averaging.feedback import Feedback
from lightning_slowmo.averaging.mean import average
from lightning_slowmo.communication import compressed
from lightning_slowmo.communication.meeting import Round
from lightning_slowmo.communication.pipeline import Transfer, pipeline
from lightning_slowmo.communication.workers import Workers
from lightning_slowmo.compression import Compressor, seeded_generator
from lightning_slowmo.parameters import Bucket, Layout

Message = Literal["difference", "model"]
"""What is compressed: the difference to what the receivers know already, or the model itself."""


class CompressedAverager(Averager):
    """Average as well as the compressor can.

    Args:
        layout: the parameters.
        workers: who takes part.
        compressor: how messages are compressed.
        transport: ``"ring"`` or ``"two_shot"``.
        message: what is compressed.
        error_feedback: whether what a message leaves out is added to the next one.
        seed: of the compressor's randomness.

    Attributes:
        reference: the common point x, one flat tensor per run, equal on all workers.
        feedback: what messages have left out; None without error feedback.
        syncs: averages so far, from which the compressor's random numbers follow.
    """

    def __init__(
        self,
        layout: Layout,
        workers: Workers,
        compressor: Compressor,
        transport: Literal["ring", "two_shot"] = "two_shot",
        message: Message = "difference",
        error_feedback: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(layout, workers)
        self.compressor = compressor
        self.transport = transport
        self.message = message
        self.seed = seed
        self.reference = layout.snapshot()
        self.feedback = Feedback(layout, workers) if error_feedback else None
        self.syncs = 0

    def average(self, round: Round, on_sum: OnSum | None = None) -> float:
        """Average compressed messages; ``on_sum`` gets the mean, with a weight of 1."""
        drift = Drift(self.layout.numel)
        generator_on = generators(self.seed, self.workers.rank, self.syncs)

        def transfer(index: int, bucket: Bucket) -> Transfer[None]:
            flat = bucket.pack(self.scratch.take(bucket))
            local, reference = drift.sample(flat), bucket.of(self.reference)
            known = reference.to(flat.device)  # reference itself, unless slow state is offloaded
            differs = self.message == "difference"
            message = flat - bucket.rounded(known) if differs else flat
            mean = yield from self._mean(index, bucket, message, generator_on(bucket.device), round.weights)
            if differs:
                mean.add_(known)
            drift.compare(local, mean, 1.0)
            if on_sum is not None:
                for block, values in bucket.blocks(mean):
                    on_sum(block, values, 1.0)
            reference.copy_(mean)
            bucket.unpack(mean)

        pipeline(transfer(index, bucket) for index, bucket in enumerate(self.layout.buckets))
        self.syncs += 1
        return drift.value()

    def _mean(
        self, index: int, bucket: Bucket, message: Tensor, generator: torch.Generator, weights: list[float]
    ) -> Transfer[Tensor]:
        arguments = (self.workers, message, bucket.segments, self.compressor, generator, weights)
        if self.transport == "ring":
            return compressed.ring(*arguments)
        if self.feedback is None:
            return compressed.two_shot(*arguments)
        return compressed.two_shot(*arguments, bucket.of(self.feedback.worker), self.feedback.owner[index])

    def consensus(self, round: Round) -> None:
        """Overwrite the parameters with their exact mean."""
        average(self.layout.buckets, self.workers, self.scratch, round.weights)

    def share_reference(self, anchor: list[Tensor]) -> None:
        """Let x be the anchor of an outer loop, which makes it the new parameters itself."""
        self.reference = anchor

    def finish(self, round: Round) -> None:
        """End with an exact mean, from which whoever trains on starts."""
        self.consensus(round)
        self.reference = self.layout.snapshot()

    def adopt_layout(self, layout: Layout) -> None:
        """Take over a new layout; a parameter that joins starts from its present value."""
        reference = layout.snapshot()
        layout.carry(self.layout, self.reference, reference)
        self.reference = reference
        if self.feedback is not None:
            self.feedback = self.feedback.moved_to(layout)
        super().adopt_layout(layout)

    # State ------------------------------------------------------------------------------------------------------------

    def shared_state(self) -> dict[str, Any]:
        """The common point, the number of averages, and the residual of the mean, for another number of workers."""
        residual = self.feedback.total() if self.feedback is not None else []
        return {"anchor": self.layout.per_parameter(self.reference), "syncs": self.syncs, "residual": residual}

    def local_state(self) -> dict[str, Any]:
        """What this worker's messages have left out."""
        return {"feedback": self.feedback.state_dict()} if self.feedback is not None else {}

    def load_shared_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`shared_state` returned."""
        super().load_shared_state(state)
        copy_state(self.layout.per_parameter(self.reference), state["anchor"], "common point")
        self.syncs = state["syncs"]
        if self.feedback is not None:
            self.feedback.set_total(state["residual"])

    def load_local_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`local_state` returned."""
        super().load_local_state(state)
        if self.feedback is not None:
            self.feedback.load_state_dict(state["feedback"])


def generators(seed: int, rank: int, round: int) -> Callable[[torch.device], torch.Generator]:
    """One generator per device for one worker and round, made when first asked for."""
    return cache(lambda device: seeded_generator(seed, rank, round, device))
