"""SQuARM-SGD: gossip of sparse, quantized differences, sent only when they are worth it.

Singh, Data, George, Diggavi, "SQuARM-SGD: Communication-Efficient Momentum SGD for Decentralized Optimization", 2020,
https://arxiv.org/abs/2005.07041. Every ``sync_every`` steps, with x_i½ the parameters of worker i after local steps
(of any optimizer; in the paper SGD with Nesterov momentum), h_j what is known of worker j, and eta the learning rate::

    q_i = C(x_i½ - h_i) if |x_i½ - h_i|² > c_t eta² else 0, and nothing is sent
    h_j = h_j + q_j                                             for the neighbours j and i itself
    x_i = x_i½ + gamma sum_j w_ij (h_j - h_i)

Without momentum this is SPARQ-SGD (https://arxiv.org/abs/1910.14280), and without the trigger as well it is CHOCO-SGD
(https://arxiv.org/abs/1902.00340) up to the order of gossip and gradient. Momentum belongs to the optimizer and is
never communicated, so one implementation serves all three.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch.optim import Optimizer

from lightning_slowmo import traffic
from lightning_slowmo.algorithms.base import (
    Algorithm,
    Running,
    Synced,
    check_compressor,
    check_period,
    check_rate,
    learning_rates,
)
from lightning_slowmo.algorithms.consensus_step import largest_consensus_step, suggest_consensus_step, symmetric
from lightning_slowmo.algorithms.estimates import RunningEstimates
from lightning_slowmo.algorithms.post_local import RunningPostLocal
from lightning_slowmo.algorithms.schedules import PostLocal, Schedule, check_sync_every, header, usual
from lightning_slowmo.averaging.compressed import generators
from lightning_slowmo.averaging.drift import Drift
from lightning_slowmo.communication.meeting import Round
from lightning_slowmo.communication.workers import Workers
from lightning_slowmo.compression import Compressor, SignTopK
from lightning_slowmo.parameters import Layout
from lightning_slowmo.storage import as_real
from lightning_slowmo.topology import Mixing, make

InitialEstimate = Literal["model", "zero"]
"""What is known of every worker before the first message: the common start, or nothing."""


@dataclass(frozen=True)
class Threshold:
    """When a difference is worth a message: its square exceeds c eta², where c grows.

    Args:
        initial: c at first. 0 sends always, infinity never.
        growth: by how much c grows ...
        every: ... after so many syncs.
        until: syncs after which it grows no more; None: for ever.
    """

    initial: float = 0.0
    growth: float = 0.0
    every: int = 1
    until: int | None = None

    def __post_init__(self) -> None:
        for name in ("initial", "growth"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
                raise ValueError(f"{name} must be a number of at least 0, got {value!r}.")
        check_period("every", self.every)
        if self.until is not None:
            check_period("until", self.until, least=0)

    def at(self, sync: int) -> float:
        """The threshold c_t of the trigger at a sync, counted from 0."""
        grown = sync if self.until is None else min(sync, self.until)
        return self.initial + self.growth * (grown // self.every)


@dataclass(frozen=True)
class SQuARM(Algorithm):
    """Gossip compressed differences, when they exceed a threshold.

    Args:
        topology: who sends to whom, see :class:`~lightning_slowmo.Gossip`: symmetric, and the same at every step.
        sync_every: optimizer steps between syncs, the paper's H; or a schedule, as for
            :class:`~lightning_slowmo.LocalSGD`.
        compressor: how differences are compressed; it must contract. Shares are of each tensor.
        consensus_step: gamma; None takes :func:`suggest_consensus_step`. One that lets the workers drift apart gives a
            warning before training.
        trigger: when a message is sent.
        initial_estimate: ``"model"``: all know the common start. ``"zero"``: nothing is known, as in the paper's
            listing; the first messages then carry the model itself.
        mixing: how the topology's graph is weighted.
        seed: of the compressor's randomness.

    Raises:
        ValueError: if an argument is out of its range. :meth:`bind` raises it if the topology does not fit, or if the
            compressor loses more than it tells.

    Example::

        Trainer(strategy=SlowMoStrategy(SQuARM("ring", sync_every=5, trigger=Threshold(2.5, 1.5, every=100))))
    """

    topology: Any = "ring"
    sync_every: int | Schedule = 5
    compressor: Compressor = field(default_factory=lambda: SignTopK(0.01))
    consensus_step: float | None = None
    trigger: Threshold = field(default_factory=Threshold)
    initial_estimate: InitialEstimate = "model"
    mixing: Mixing = "uniform"
    seed: int = 0

    def __post_init__(self) -> None:
        check_sync_every(self.sync_every)
        check_compressor(self.compressor)
        if self.consensus_step is not None:
            check_rate("consensus_step", self.consensus_step)
        if not isinstance(self.trigger, Threshold):
            raise ValueError(f"trigger must be a Threshold, got {self.trigger!r}.")
        if self.initial_estimate not in get_args(InitialEstimate):
            raise ValueError(f"initial_estimate must be 'model' or 'zero', got {self.initial_estimate!r}.")
        graph = make(self.topology, self.mixing)
        if not isinstance(self.topology, str):
            object.__setattr__(self, "topology", graph)

    def bind(self, optimizer: Optimizer, workers: Workers) -> Running:
        """Make the running state for one optimizer."""
        if isinstance(self.sync_every, PostLocal):
            return RunningPostLocal(self, self.sync_every, optimizer, workers)
        return RunningSQuARM(self, optimizer, workers)

    def syncs(self, layout: Layout, workers: int) -> list[traffic.Sync]:
        """Every ``sync_every`` steps: flags that say who sends, and compressed differences to the neighbours."""
        sends = traffic.exchange(layout, workers, self.topology, self.mixing, self.compressor)
        sends = replace(sends, handled=traffic.TWICE * sends.handled)  # the trigger, and the mix of estimates
        heads = header(self.sync_every, workers), traffic.header(workers, 1)
        return [traffic.together(usual(self.sync_every), *heads, sends)]

    def state_numel(self, layout: Layout, workers: int) -> float:
        """The estimate of its own model, and the mix of its neighbours'."""
        return 2 * layout.numel


class RunningSQuARM(RunningEstimates):
    """SQuARM at work."""

    def __init__(self, config: SQuARM, optimizer: Optimizer, workers: Workers) -> None:
        self.config = config
        self.schedule = symmetric(config.topology, config.mixing, workers.size)
        super().__init__(config.sync_every, config.compressor, optimizer, workers)
        if config.initial_estimate == "zero":
            self.estimate, self.mixed = self.layout.zeros(), self.layout.zeros()
        self.consensus_step = self._checked_step()

    def _checked_step(self) -> float:
        """The consensus step; a warning if it lets the workers drift apart.

        Raises:
            ValueError: if every step would.
        """
        config = self.config
        lengths = tuple(as_real(parameter.detach()).numel() for parameter in self.layout.parameters)
        setting = (config.topology, config.compressor, self.workers.size, config.mixing, lengths)
        largest, suggested = largest_consensus_step(*setting), suggest_consensus_step(*setting)
        if not largest:
            raise ValueError(
                f"{config.compressor} loses more than it tells, so what is known of a worker never comes near it. Use "
                "a compressor that contracts, such as SignTopK(0.01) or QSGD(bits=4, norm='max', bucket=512)."
            )
        if config.consensus_step is None:
            return suggested
        if config.consensus_step >= largest and self.workers.rank == 0:
            warnings.warn(
                f"consensus_step={config.consensus_step:.3g} is in the region that diverges: with {config.compressor}, "
                f"gossip on {config.topology!r} between {self.workers.size} workers drives them apart, or keeps them "
                f"apart, from about {largest:.3g} on. Use consensus_step={suggested:.3g}, or None for just that.",
                stacklevel=2,
            )
        return config.consensus_step

    def sync(self, round: Round) -> Synced:
        """Tell the neighbours what changed, if it is worth it, and move towards what is known of them."""
        self.clock.agree()
        if not all(round.healthy):  # what a worker lost, nobody else has: begin anew together
            self.pending = 0
            return Synced(self.averager.average(round))
        rank = self.workers.rank
        speaks = [bool(row[0]) for row in self.workers.gather([self._triggers()], "who has something to say")]
        plan = self.schedule.exchange(rank, 0)
        generator_on = generators(self.config.seed, rank, self.syncs)
        drift = Drift(self.layout.numel)
        for bucket in self.layout.buckets:
            x = bucket.pack(self.averager.scratch.take(bucket))
            local, estimate, mixed = drift.sample(x), bucket.of(self.estimate), bucket.of(self.mixed)
            self.tell(bucket, x, estimate, mixed, plan, speaks, generator_on(bucket.device))
            x.add_(mixed - estimate, alpha=self.consensus_step)
            drift.compare(local, x, 1.0)
            bucket.unpack(x)
        self.syncs += 1
        self.pending = 0
        return Synced(drift.value(), skipped=int(not speaks[rank]))

    def _triggers(self) -> bool:
        """Whether the whole model's difference, in units of the learning rate, exceeds the threshold."""
        c = self.config.trigger.at(self.syncs)
        if c == 0 or math.isinf(c):
            return c == 0
        rates, squares = learning_rates(self.optimizer), 0.0
        for bucket in self.layout.buckets:
            difference = bucket.pack(self.averager.scratch.take(bucket)) - bucket.of(self.estimate)
            rate = rates[bucket.group]
            square = float(torch.linalg.vector_norm(difference, dtype=torch.float64)) ** 2
            squares += square / rate**2 if rate else (math.inf if square else 0.0)
        return squares > c
