"""Gossip of differences in its memory form: what is known of this worker, and the mix of what is known of all.

A worker tells its neighbours C(x - h), with h what they know of it already, and all who hear it have the same estimate
h of it. Of its neighbours' estimates a worker needs sum_j w_ij h_j alone, and so keeps no copy of each. That takes
weights that never change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_slowmo.algorithms.base import Running
from lightning_slowmo.algorithms.clock import Clock
from lightning_slowmo.algorithms.schedules import Schedule
from lightning_slowmo.averaging import Contributor, ExactAverager
from lightning_slowmo.averaging.averager import copy_state
from lightning_slowmo.communication.meeting import Level
from lightning_slowmo.communication.pipeline import start
from lightning_slowmo.communication.workers import Workers
from lightning_slowmo.compression import Compressor
from lightning_slowmo.parameters import Bucket, Layout
from lightning_slowmo.topology import Exchange


class RunningEstimates(Running, Contributor):
    """Gossip that keeps estimates; a subclass says when a worker speaks and what becomes of the mix.

    Args:
        sync_every: optimizer steps between syncs, or a schedule.
        compressor: how differences are compressed.
        optimizer: the user's own.
        workers: who takes part.

    Attributes:
        estimate: h_i, what the neighbours know of this worker; one flat tensor per run.
        mixed: sum_j w_ij h_j over the neighbours and the worker itself.
        syncs: rounds so far.
    """

    def __init__(
        self, sync_every: int | Schedule, compressor: Compressor, optimizer: Optimizer, workers: Workers
    ) -> None:
        super().__init__(optimizer, workers)
        self.averager = ExactAverager(self.layout, workers, self)
        self.clock: Clock = Clock(sync_every, optimizer, workers)
        self.compressor = compressor
        self.syncs = 0
        self.restart()
        if not workers.alone:  # NCCL wants all workers in the first communication of a group
            workers.broadcast(torch.zeros(1, device=self.layout.runs[0].device))

    def restart(self) -> None:
        """Reset the estimates of all workers to the parameters, which are the same on all of them now."""
        self.estimate, self.mixed = self.layout.snapshot(), self.layout.snapshot()

    def after_step(self) -> None:
        """Count a local step."""
        self.clock.tick(first=self.pending == 0)
        super().after_step()

    def due(self) -> Level:
        """After every ``sync_every`` local steps."""
        return Level.BASE if self.pending >= self.clock.period else Level.NONE

    def tell(
        self,
        bucket: Bucket,
        x: Tensor,
        estimate: Tensor,
        mixed: Tensor,
        plan: Exchange,
        speaks: Sequence[bool],
        generator: torch.Generator,
    ) -> None:
        """Send the neighbours what they do not know of this worker, and take in what they say.

        Args:
            bucket: where ``x`` belongs.
            x: this worker's values.
            estimate: what is known of them; afterwards, what is known then.
            mixed: the mix of the estimates of all; afterwards, with what came.
            plan: who sends to whom.
            speaks: which workers send anything, by rank.
            generator: source of the compressor's randomness.
        """
        compressor, segments, rank = self.compressor, bucket.segments, self.workers.rank
        if speaks[rank]:
            payload = compressor.compress(x - estimate, segments, generator)
        else:
            size = compressor.payload_bytes(segments, x.dtype)
            payload = torch.empty(size, dtype=torch.uint8, device=x.device)
        receivers = [peer for peer, _ in plan.sends] if speaks[rank] else []
        senders = [(peer, weight) for peer, weight in plan.receives if speaks[peer]]
        under_way = start(self.workers.send_and_receive(payload, receivers, [peer for peer, _ in senders]))
        if speaks[rank]:  # what the others decode, while it travels
            own = compressor.decode(payload, segments, x.dtype)
            own.add_to(estimate)
            own.add_to(mixed, plan.self_weight)
        for message, (_, weight) in zip(under_way.wait(), senders, strict=True):
            compressor.decode(message, segments, x.dtype).add_to(mixed, weight)

    def adopt_layout(self, layout: Layout) -> None:
        """Take over a new layout; a parameter that joins must be equal on all workers, as at the start."""
        estimate, mixed = layout.snapshot(), layout.snapshot()
        layout.carry(self.layout, self.estimate, estimate)
        layout.carry(self.layout, self.mixed, mixed)
        self.estimate, self.mixed = estimate, mixed
        super().adopt_layout(layout)

    # State ------------------------------------------------------------------------------------------------------------

    def shared_state(self) -> dict[str, Any]:
        """The number of rounds, and of steps."""
        return {"syncs": self.syncs, "clock": self.clock.shared_state()}

    def local_state(self) -> dict[str, Any]:
        """What neighbours know of this worker, and it of them."""
        return super().local_state() | {
            "estimate": self.layout.per_parameter(self.estimate),
            "mixed": self.layout.per_parameter(self.mixed),
            "clock": self.clock.local_state(),
        }

    def load_shared_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`shared_state` returned. By itself it lets gossip begin from equal models."""
        self.syncs = state["syncs"]
        self.clock.load_shared_state(state.get("clock", {}))
        self.restart()

    def load_local_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`local_state` returned."""
        super().load_local_state(state)
        self.clock.load_local_state(state.get("clock", {}))
        copy_state(self.layout.per_parameter(self.estimate), state["estimate"], "estimate")
        copy_state(self.layout.per_parameter(self.mixed), state["mixed"], "mix of estimates")
