"""QPRSGD: local steps, and averages of which quantized messages are sent.

Wu, He, Yang, Wang, Qu, Guo, Zhuang, "On the Convergence of Quantized Parallel Restarted SGD for Central Server Free
Distributed Training", 2020, https://arxiv.org/abs/2004.09125. With y_i the parameters of worker i after local steps
from the common point x, and Q an unbiased quantizer::

    ring, two-shot    x = x + mean_i Q(y_i - x)
    gossip            x_i = sum_j w_ij h_j,    h_j = h_j + Q(y_j - h_j)

where h_j is what everybody knows of worker j. ``docs/compressed_sync.md`` lists which details are choices of ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch.optim import Optimizer

from lightning_slowmo import traffic
from lightning_slowmo.algorithms.base import Algorithm, Running, Synced, check_compressor
from lightning_slowmo.algorithms.estimates import RunningEstimates
from lightning_slowmo.algorithms.local_sgd import RunningLocalSGD
from lightning_slowmo.algorithms.post_local import RunningPostLocal
from lightning_slowmo.algorithms.schedules import PostLocal, Schedule, check_sync_every, header, usual
from lightning_slowmo.averaging import Averager, CompressedAverager
from lightning_slowmo.averaging.compressed import Message, generators
from lightning_slowmo.averaging.drift import Drift
from lightning_slowmo.communication.meeting import Round
from lightning_slowmo.communication.workers import Workers
from lightning_slowmo.compression import QSGD, Compressor
from lightning_slowmo.parameters import Layout
from lightning_slowmo.topology import Mixing, make

Transport = Literal["ring", "two_shot", "gossip"]
"""How messages travel: along a ring, to owners of chunks and back, or to neighbours."""


def default_quantizer() -> QSGD:
    """4 bits relative to the largest magnitude of 512: 87 % less than float32, at an error of 4 % of the square."""
    return QSGD(bits=4, norm="max", bucket=512)


@dataclass(frozen=True)
class QPRSGD(Algorithm):
    """Average compressed messages every ``sync_every`` steps; optimizers' own buffers stay as they are.

    Args:
        sync_every: optimizer steps between averages, the paper's K; or a schedule, see
            :class:`~lightning_slowmo.LocalSGD`.
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

    sync_every: int | Schedule = 12
    compressor: Compressor = field(default_factory=default_quantizer)
    transport: Transport = "ring"
    topology: Any = "ring"
    mixing: Mixing = "uniform"
    message: Message = "difference"
    error_feedback: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_sync_every(self.sync_every)
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
        if isinstance(self.sync_every, PostLocal):
            return RunningPostLocal(self, self.sync_every, optimizer, workers)
        transport = self.transport
        if transport == "gossip":
            return RunningQuantizedGossip(self, optimizer, workers)

        def make_averager(layout: Layout) -> Averager:
            kind = (self.compressor, transport, self.message, self.error_feedback, self.seed)
            return CompressedAverager(layout, workers, *kind)

        return RunningLocalSGD(self.sync_every, optimizer, workers, make_averager)

    def syncs(self, layout: Layout, workers: int) -> list[traffic.Sync]:
        """A compressed mean, or compressed messages to the neighbours, every ``sync_every`` steps."""
        if self.transport == "gossip":
            sends = traffic.exchange(layout, workers, self.topology, self.mixing, self.compressor)
        else:
            sends = self.average_sync(layout, workers)
        return [traffic.together(usual(self.sync_every), header(self.sync_every, workers), sends)]

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

    def sync(self, round: Round) -> Synced:
        """Send this worker's message, and mix in what came."""
        self.clock.agree()
        if not all(round.healthy):  # what a worker lost, nobody else has: begin anew together
            self.pending = 0
            return Synced(self.averager.average(round))
        drift = Drift(self.layout.numel)
        generator_on = generators(self.config.seed, self.workers.rank, self.syncs)
        plan = self.schedule.exchange(self.workers.rank, self.syncs)
        everybody = [True] * self.workers.size
        for bucket in self.layout.buckets:
            x = bucket.pack(self.averager.scratch.take(bucket))
            local, estimate, mixed = drift.sample(x), bucket.of(self.estimate), bucket.of(self.mixed)
            if self.config.message == "model":  # nobody remembers anything
                estimate.zero_()
                mixed.zero_()
            self.tell(bucket, x, estimate, mixed, plan, everybody, generator_on(bucket.device))
            drift.compare(local, mixed, 1.0)
            bucket.unpack(mixed)
        self.syncs += 1
        self.pending = 0
        return Synced(drift.value())
