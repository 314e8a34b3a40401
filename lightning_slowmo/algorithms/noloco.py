"""NoLoCo: the outer step of DiLoCo between two workers at a time, without any collective.

Kolehmainen et al., "NoLoCo: No-all-reduce Low Communication Training Method for Large Models", 2025,
https://arxiv.org/abs/2506.10911. With slow weights phi_i and momentum m_i of each worker, x_i after its local steps,
and a random group G of two workers at each sync::

    m_i = mu m_i + eta mean_G(x_j - phi_j) + eta (mean_G phi_j - phi_i);    phi_i = phi_i + m_i;    x_i = phi_i

as in the authors' code, where one eta weighs the outer gradient and the pull to the group's slow weights. These add
up to

    m_i = mu m_i + eta (mean_G x_j - phi_i)

so only x_j need travel, which is half of what the code sends. It has the form of heavy-ball momentum, as SlowMo.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_slowmo import traffic
from lightning_slowmo.algorithms.base import Algorithm, Running, Synced, check_momentum, check_period, check_rate
from lightning_slowmo.algorithms.clock import Clock
from lightning_slowmo.algorithms.post_local import RunningPostLocal
from lightning_slowmo.algorithms.schedules import PostLocal, Schedule, check_sync_every, header, usual
from lightning_slowmo.averaging import Contributor, ExactAverager
from lightning_slowmo.averaging.averager import copy_state
from lightning_slowmo.averaging.drift import Drift
from lightning_slowmo.communication.meeting import Level, Round
from lightning_slowmo.communication.pipeline import Transfer, pipeline
from lightning_slowmo.communication.workers import Workers
from lightning_slowmo.parameters import Bucket, Layout
from lightning_slowmo.topology import Exchange, RandomMatching


@dataclass(frozen=True)
class NoLoCo(Algorithm):
    """Local steps, then an outer step towards the mean of a random pair; optimizers' buffers stay each worker's own.

    Workers come near one another and never agree: what is evaluated and saved is their exact mean, as for gossip.

    Args:
        sync_every: optimizer steps between outer steps, or a schedule, see :class:`~lightning_slowmo.LocalSGD`.
        outer_lr: eta.
        outer_momentum: mu, in [0, 1).
        seed: of the pairs, afresh at each sync; of an odd number of workers, one makes its step alone.

    Raises:
        ValueError: if an argument is out of its range.

    Example::

        Trainer(strategy=SlowMoStrategy(NoLoCo(sync_every=50)))
    """

    sync_every: int | Schedule = 50
    outer_lr: float = 0.7
    outer_momentum: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        check_sync_every(self.sync_every)
        check_rate("outer_lr", self.outer_lr)
        check_momentum("outer_momentum", self.outer_momentum)
        check_period("seed", self.seed, least=0)

    def bind(self, optimizer: Optimizer, workers: Workers) -> Running:
        """Make the running state for one optimizer."""
        if isinstance(self.sync_every, PostLocal):
            return RunningPostLocal(self, self.sync_every, optimizer, workers)
        return RunningNoLoCo(self, optimizer, workers)

    def syncs(self, layout: Layout, workers: int) -> list[traffic.Sync]:
        """The model to one other worker, every ``sync_every`` steps."""
        sends = traffic.exchange(layout, workers, RandomMatching(self.seed))
        return [traffic.together(usual(self.sync_every), header(self.sync_every, workers), sends)]

    def state_numel(self, layout: Layout, workers: int) -> float:
        """Slow weights and momentum."""
        return 2 * layout.numel


class RunningNoLoCo(Running, Contributor):
    """NoLoCo at work.

    Attributes:
        anchor: phi_i, one flat tensor per run.
        momentum: m_i, likewise.
        syncs: outer steps so far, from which the pairs follow.
    """

    def __init__(self, config: NoLoCo, optimizer: Optimizer, workers: Workers) -> None:
        super().__init__(optimizer, workers)
        self.averager = ExactAverager(self.layout, workers, self)
        self.config = config
        self.clock: Clock = Clock(config.sync_every, optimizer, workers)
        self.syncs = 0
        self.anchor, self.momentum = self.layout.snapshot(), self.layout.zeros()
        if not workers.alone:
            self.schedule = RandomMatching(config.seed).on(workers.size)
            # NCCL wants all workers in the first communication of a group, and of an odd number one has no peer.
            workers.broadcast(torch.zeros(1, device=self.layout.runs[0].device))

    def after_step(self) -> None:
        """Count a local step."""
        self.clock.tick(first=self.pending == 0)
        super().after_step()

    def due(self) -> Level:
        """After every ``sync_every`` local steps."""
        return Level.BASE if self.pending >= self.clock.period else Level.NONE

    def sync(self, round: Round) -> Synced:
        """Exchange models with this sync's peer, and make the outer step.

        The drift is the distance from the pair's mean, as that of all is not known.
        """
        self.clock.agree()
        self.pending = 0
        if not all(round.healthy):  # what a worker lost, nobody else has: begin anew together
            return Synced(self.averager.average(round))
        plan = Exchange(1.0, (), ())
        if not self.workers.alone:
            plan = self.schedule.exchange(self.workers.rank, self.syncs)
        drift = Drift(self.layout.numel)
        transfers = (self._outer_step(bucket, plan, drift) for bucket in self.layout.buckets)
        pipeline(transfers, depth=self.averager.scratch.count)
        self.syncs += 1
        return Synced(drift.value())

    def _outer_step(self, bucket: Bucket, plan: Exchange, drift: Drift) -> Transfer[None]:
        x = bucket.pack(self.averager.scratch.take(bucket))
        peers, senders = [peer for peer, _ in plan.sends], [peer for peer, _ in plan.receives]
        messages = yield from self.workers.send_and_receive(x, peers, senders)
        local = drift.sample(x)
        mean = x.mul(plan.self_weight)
        for message, (_, share) in zip(messages, plan.receives, strict=True):
            mean.add_(message, alpha=share)  # mean_G x_j
        drift.compare(local, mean, 1.0)
        anchor, momentum = bucket.of(self.anchor), bucket.of(self.momentum)
        momentum.mul_(self.config.outer_momentum).add_(mean.sub_(anchor), alpha=self.config.outer_lr)
        anchor.add_(momentum)
        bucket.unpack(mean.copy_(anchor))

    def restart(self) -> None:
        """All workers stand at one point; each keeps its momentum."""
        self.anchor = self.layout.snapshot()

    def moved(self) -> None:
        """The slow weights are where the parameters are now."""
        self.restart()

    def adopt_layout(self, layout: Layout) -> None:
        """Take over a new layout; a parameter that joins starts from its present value, without momentum."""
        anchor, momentum = layout.snapshot(), layout.zeros()
        layout.carry(self.layout, self.anchor, anchor)
        layout.carry(self.layout, self.momentum, momentum)
        self.anchor, self.momentum = anchor, momentum
        super().adopt_layout(layout)

    # State ------------------------------------------------------------------------------------------------------------

    def shared_state(self) -> dict[str, Any]:
        """The number of outer steps, and of steps."""
        return {"syncs": self.syncs, "clock": self.clock.shared_state()}

    def local_state(self) -> dict[str, Any]:
        """This worker's slow weights and momentum."""
        return super().local_state() | {
            "anchor": self.layout.per_parameter(self.anchor),
            "momentum": self.layout.per_parameter(self.momentum),
            "clock": self.clock.local_state(),
        }

    def load_shared_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`shared_state` returned. By itself it lets all begin from equal models, at rest."""
        self.syncs = state["syncs"]
        self.clock.load_shared_state(state["clock"])
        self.anchor, self.momentum = self.layout.snapshot(), self.layout.zeros()

    def load_local_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`local_state` returned."""
        super().load_local_state(state)
        self.clock.load_local_state(state["clock"])
        copy_state(self.layout.per_parameter(self.anchor), state["anchor"], "slow weights")
        copy_state(self.layout.per_parameter(self.momentum), state["momentum"], "outer momentum")
