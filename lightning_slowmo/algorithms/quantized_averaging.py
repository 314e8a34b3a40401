"""QPRSGD: local steps, and averages of which quantized messages are sent.

Wu, He, Yang, Wang, Qu, Guo, Zhuang, "On the Convergence of Quantized Parallel Restarted SGD for Central Server Free
Distributed Training", 2020, https://arxiv.org/abs/2004.09125. With y_i the parameters of worker i after local steps
from the common point x, and Q an unbiased quantizer::

    ring, two-shot    x = x + mean_i Q(y_i - x)
    gossip            x_i = sum_j w_ij h_j,    h_j = h_j + Q(y_j - h_j)

where h_j is what everybody knows of worker j. ``docs/compressed_sync.md`` lists which details are choices of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_slowmo import traffic
from lightning_slowmo.algorithms.base import NOT_DUE, Algorithm, Round, Running, SyncReport, check_period, copy_state
from lightning_slowmo.algorithms.estimates import RunningEstimates
from lightning_slowmo.algorithms.feedback import Feedback
from lightning_slowmo.algorithms.local_sgd import LocalSGD
from lightning_slowmo.communication import compressed
from lightning_slowmo.communication.collectives import Drift
from lightning_slowmo.communication.pipeline import Exchange, pipeline
from lightning_slowmo.communication.workers import Workers
from lightning_slowmo.compression import QSGD, Compressor, seeded_generator
from lightning_slowmo.parameters import Block, Bucket, Layout
from lightning_slowmo.topology import Mixing, make

Transport = Literal["ring", "two_shot", "gossip"]
"""How messages travel: along a ring, to owners of chunks and back, or to neighbours."""

Message = Literal["difference", "model"]
"""What is compressed: the difference to what the receivers know already, or the model itself."""


def default_quantizer() -> QSGD:
    """4 bits relative to the largest magnitude of 512: 87 % less than float32, at an error of 4 % of the square."""
    return QSGD(bits=4, norm="max", bucket=512)


@dataclass(frozen=True)
class QPRSGD(Algorithm):
    """Average compressed messages every ``sync_every`` steps; optimizers' own buffers stay as they are.

    Args:
        sync_every: optimizer steps between averages, the paper's K.
        compressor: how messages are compressed; unbiased, unless ``error_feedback``.
        transport: ``"ring"``, ``"two_shot"`` or ``"gossip"``.
        topology: who sends to whom with gossip, see :class:`~lightning_slowmo.Gossip`; doubly stochastic, and the same
            at every step unless ``message="model"``.
        mixing: how its graph is weighted.
        message: ``"difference"`` to what receivers know already (which vanishes as training converges), or ``"model"``.
        error_feedback: whether what a message leaves out is added to the next one, on workers and on owners of chunks;
            for two-shot differences.
        seed: of the compressors' randomness.

    Raises:
        ValueError: if an argument is out of its range, or they are at odds with one another.

    Example::

        Trainer(strategy=SlowMoStrategy(QPRSGD(sync_every=12, compressor=QSGD(bits=3, norm="max", bucket=512))))
    """

    sync_every: int = 12
    compressor: Compressor = field(default_factory=default_quantizer)
    transport: Transport = "ring"
    topology: Any = "ring"
    mixing: Mixing = "uniform"
    message: Message = "difference"
    error_feedback: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_period("sync_every", self.sync_every)
        check_compressor(self.compressor)
        for name, choices in (("transport", Transport), ("message", Message)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {getattr(self, name)!r}.")
        graph = make(self.topology, self.mixing)
        if not isinstance(self.topology, str):
            object.__setattr__(self, "topology", graph)
        if self.error_feedback and (self.transport, self.message) != ("two_shot", "difference"):
            raise ValueError("error_feedback needs transport='two_shot' and message='difference'.")
        if not (self.error_feedback or self.compressor.unbiased):
            raise ValueError(
                f"{self.compressor} is biased, and what it loses would be lost for good. Use an unbiased one such as "
                "QSGD(bits=4, norm='max', bucket=512), or error_feedback=True with transport='two_shot'."
            )

    @property
    def kind(self) -> str:
        """Gossip, averages, and averages with error feedback keep different state."""
        gossips = self.transport == "gossip"
        return super().kind + (" by gossip" if gossips else " and error feedback" if self.error_feedback else "")

    def bind(self, optimizer: Optimizer, workers: Workers) -> Running:
        """Make the running state for one optimizer."""
        return (RunningQuantizedGossip if self.transport == "gossip" else RunningQPRSGD)(self, optimizer, workers)

    def syncs(self, layout: Layout, workers: int) -> list[traffic.Sync]:
        """A compressed mean, or compressed messages to the neighbours, every ``sync_every`` steps."""
        if self.transport == "gossip":
            sends = traffic.exchange(layout, workers, self.topology, self.mixing, self.compressor)
        else:
            sends = self.average_sync(layout, workers)
        return [traffic.together(self.sync_every, traffic.header(workers), sends)]

    def average_sync(self, layout: Layout, workers: int) -> traffic.Sync:
        """The compressed mean; gossip has none, so an outer loop over it averages uncompressed."""
        if self.transport == "gossip":
            return super().average_sync(layout, workers)
        return traffic.compressed_mean(layout, workers, self.compressor, self.transport, self.error_feedback)

    def state_numel(self, layout: Layout, workers: int) -> float:
        """Anchor and residuals of the worker and of its chunk; with gossip, two estimates of models."""
        if self.transport == "gossip":
            return 2 * layout.numel
        return layout.numel * (1 + (1 + 1 / workers if self.error_feedback else 0))


def check_compressor(value: Any) -> None:
    """Raise ValueError unless ``value`` is a compressor."""
    if not isinstance(value, Compressor):
        raise ValueError(f"compressor must be a compressor such as QSGD(bits=4), got {value!r}.")


class RunningQPRSGD(Running):
    """QPRSGD with an average of all workers.

    Attributes:
        anchor: the common point x, one flat tensor per run, equal on all workers.
        feedback: what messages have left out; None without error feedback.
        syncs: averages so far, from which compressors' random numbers follow.
    """

    def __init__(self, config: QPRSGD, optimizer: Optimizer, workers: Workers) -> None:
        super().__init__(optimizer, workers)
        self.config = config
        self.anchor = self.layout.snapshot()
        self.feedback = Feedback(self.layout, workers) if config.error_feedback else None
        self.syncs = 0

    def agrees_after(self, round: Round) -> bool:
        """Always: all decode the same bits."""
        return True

    def due(self) -> int:
        """Level 1 after every ``sync_every`` local steps."""
        return 1 if self.pending >= self.config.sync_every else NOT_DUE

    def sync(self, round: Round) -> SyncReport:
        """Average."""
        return SyncReport(drift=self.average(round))

    def average(self, round: Round, then: Callable[[Block, Tensor, float], None] | None = None) -> float:
        """Average as well as the compressor can, the same on all workers to the last bit."""
        drift = Drift(self.layout.numel)
        generator_on = generators(self.config.seed, self.workers.rank, self.syncs)

        def exchange(index: int, bucket: Bucket) -> Exchange[None]:
            flat = bucket.pack(self.scratch.take(bucket))
            local, anchor = drift.sample(flat), bucket.of(self.anchor)
            differs = self.config.message == "difference"
            message = flat - bucket.rounded(anchor) if differs else flat
            mean = yield from self._mean(index, bucket, message, generator_on(bucket.device), round.weights)
            if differs:
                mean.add_(anchor)
            drift.compare(local, mean, 1.0)
            if then is not None:
                for block, values in bucket.blocks(mean):
                    then(block, values, 1.0)
            anchor.copy_(mean)
            bucket.unpack(mean)

        pipeline(exchange(index, bucket) for index, bucket in enumerate(self.layout.buckets))
        self.syncs += 1
        self.pending = 0
        return drift.value()

    def _mean(
        self, index: int, bucket: Bucket, message: Tensor, generator: torch.Generator, weights: list[float]
    ) -> Exchange[Tensor]:
        arguments = (self.workers, message, bucket.segments, self.config.compressor, generator, weights)
        if self.config.transport == "ring":
            return compressed.ring(*arguments)
        if self.feedback is None:
            return compressed.two_shot(*arguments)
        return compressed.two_shot(*arguments, bucket.of(self.feedback.worker), self.feedback.owner[index])

    def finish(self, round: Round) -> None:
        """End with an exact average, from which whoever trains on starts."""
        self.consensus(round)
        self.anchor = self.layout.snapshot()

    def relayout(self, layout: Layout) -> None:
        """Take over a new layout; a parameter that joins starts from its present value."""
        anchor = layout.snapshot()
        layout.carry(self.layout, self.anchor, anchor)
        self.anchor = anchor
        if self.feedback is not None:
            self.feedback = self.feedback.moved_to(layout)
        super().relayout(layout)

    # State ------------------------------------------------------------------------------------------------------------

    def shared_state(self) -> dict[str, Any]:
        """The common point, the number of averages, and the residual of the mean, for another number of workers."""
        residual = self.feedback.total() if self.feedback is not None else []
        return {"anchor": self.layout.per_parameter(self.anchor), "syncs": self.syncs, "residual": residual}

    def local_state(self) -> dict[str, Any]:
        """What this worker's messages have left out."""
        own = {"feedback": self.feedback.state_dict()} if self.feedback is not None else {}
        return super().local_state() | own

    def load_shared_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`shared_state` returned."""
        copy_state(self.layout.per_parameter(self.anchor), state["anchor"], "common point")
        self.syncs = state["syncs"]
        if self.feedback is not None:
            self.feedback.set_total(state["residual"])

    def load_local_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`local_state` returned."""
        super().load_local_state(state)
        if self.feedback is not None:
            self.feedback.load_state_dict(state["feedback"])


class RunningQuantizedGossip(RunningEstimates):
    """QPRSGD with neighbours: a worker restarts from the mix of what is known of all."""

    def __init__(self, config: QPRSGD, optimizer: Optimizer, workers: Workers) -> None:
        super().__init__(config.sync_every, config.compressor, optimizer, workers)
        self.config = config
        self.schedule = make(config.topology, config.mixing).on(workers.size)
        if not self.schedule.doubly_stochastic:
            raise ValueError(f"The mixing weights of {config.topology!r} are not doubly stochastic.")
        if config.message == "difference" and self.schedule.period != 1:
            raise ValueError(
                f"Differences need the same neighbours at every sync, which {config.topology!r} does not give. Use a "
                "static topology such as 'ring', or message='model'."
            )

    def sync(self, round: Round) -> SyncReport:
        """Send this worker's message, and mix in what came."""
        if not all(round.healthy):  # what a worker lost, nobody else has: begin anew together
            return SyncReport(drift=self.average(round))
        drift = Drift(self.layout.numel)
        generator_on = generators(self.config.seed, self.workers.rank, self.syncs)
        plan = self.schedule.exchange(self.workers.rank, self.syncs)
        everybody = [True] * self.workers.size
        for bucket in self.layout.buckets:
            x = bucket.pack(self.scratch.take(bucket))
            local, estimate, mixed = drift.sample(x), bucket.of(self.estimate), bucket.of(self.mixed)
            if self.config.message == "model":  # nobody remembers anything
                estimate.zero_()
                mixed.zero_()
            self.tell(bucket, x, estimate, mixed, plan, everybody, generator_on(bucket.device))
            drift.compare(local, mixed, 1.0)
            bucket.unpack(mixed)
        self.syncs += 1
        self.pending = 0
        return SyncReport(drift=drift.value())

    def moved(self) -> None:
        """The next message tells the neighbours, as it is the difference to what they know."""


def generators(seed: int, rank: int, round: int) -> Callable[[torch.device], torch.Generator]:
    """One generator per device for one worker and round, made when first asked for."""
    return cache(lambda device: seeded_generator(seed, rank, round, device))


def local_steps(sync_every: int, compressor: Compressor | None, overlap: int = 0, fragments: int = 1) -> Algorithm:
    """The base of an outer loop: local steps, and an average that is exact or compressed with error feedback."""
    if compressor is None:
        return LocalSGD(sync_every, overlap, fragments)
    return QPRSGD(sync_every, compressor, transport="two_shot", error_feedback=True)
