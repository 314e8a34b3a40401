"""The outer loop that SlowMo, BMUF and DiLoCo share: a base algorithm inside, an average, an outer step.

Every ``sync_every`` steps the workers' parameters x are averaged, and an *outer rule* makes a new common point from the
last one (the *anchor*), the mean, and a momentum that it keeps. All workers restart from there. The algorithms differ
in the rule alone, a function of tensors that knows nothing of workers::

    anchor, momentum = rule(anchor, start, total, momentum, share=..., and the algorithm's own numbers)

where ``share * total`` is the mean, and ``start`` the anchor as the parameters could hold it, from which the workers
started: in half precision, its rounded value.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_slowmo.algorithms import inner_buffers
from lightning_slowmo.algorithms.base import Running, Synced
from lightning_slowmo.algorithms.clock import Clock
from lightning_slowmo.algorithms.inner_buffers import InnerBuffers
from lightning_slowmo.algorithms.local_sgd import RunningLocalSGD
from lightning_slowmo.algorithms.schedules import Schedule
from lightning_slowmo.averaging.offload import Lift
from lightning_slowmo.averaging.outer_step import OuterStep, Rule, Scalars
from lightning_slowmo.communication.meeting import Level, Round
from lightning_slowmo.communication.workers import Workers
from lightning_slowmo.parameters import Layout


class RunningOuterLoop(Running):
    """A base algorithm inside an outer loop.

    Args:
        base: the algorithm inside, at work; it may communicate by itself between two outer steps.
        sync_every: optimizer steps between outer steps (of one fragment or another, if there are several), or a
            schedule.
        buffers: what becomes of the optimizer's buffers at an outer step.
        optimizer: the user's own.
        workers: who takes part.
        average: whether the parameters are averaged before the outer step.
        counted: whether the rule's numbers follow from the count of steps, so that workers must agree on it.

    Attributes:
        anchor: the last common point, one flat tensor per run; this worker's share of it if slow state is sharded.
        momentum: the rule's, likewise.
        steps: optimizer steps since the last outer step.
    """

    rule: Rule
    """Makes the new anchor and momentum of one block."""

    def __init__(
        self,
        base: Running,
        sync_every: int | Schedule,
        buffers: InnerBuffers,
        optimizer: Optimizer,
        workers: Workers,
        average: bool = True,
        counted: bool = False,
    ) -> None:
        super().__init__(optimizer, workers, base)
        self.base = base
        self._own_clock = not (isinstance(base, RunningLocalSGD) and base.clock.schedule == sync_every)
        self.clock: Clock = self._clock(base, sync_every, counted)
        self.buffers = buffers
        self.averages = average
        self.steps = 0
        self.anchor = self.layout.snapshot()
        self.momentum = self.layout.zeros()
        self.lifts: dict[torch.device, Lift] = {}
        self._share_reference()

    def _clock(self, base: Running, sync_every: int | Schedule, counted: bool) -> Clock:
        """That of local steps whose every average is an outer step, or one of its own."""
        if self._own_clock or base.clock is None:
            return Clock(sync_every, self.optimizer, self.workers, counted)
        base.clock.agrees |= counted
        return base.clock

    @abstractmethod
    def scalars(self, round: Round) -> Sequence[Scalars]:
        """The numbers that the rule needs in the outer step that begins now, by parameter group."""

    def place_slow_state(self, shard: bool, offload: bool) -> None:
        """Keep anchor and momentum in shares, or in the CPU's memory."""
        if shard:
            if not self.averages:
                raise ValueError("shard_slow_state needs average=True: without, workers have no common state.")
            self.averager = self.base.averager = self.averager.sharded()
            self.anchor, self.momentum = self.averager.cut(self.anchor), self.averager.cut(self.momentum)
        if offload:
            self.lifts = {flat.device: Lift(flat.device) for flat in self.anchor if flat.is_cuda}
            self.anchor, self.momentum = ([_on_cpu(flat) for flat in flats] for flats in (self.anchor, self.momentum))
            self._share_reference()

    def _share_reference(self) -> None:
        """Where every average of local steps is an outer step, the last common point is the anchor: one copy does."""
        if not isinstance(self.base, RunningLocalSGD):
            return
        inner, outer = self.base.clock.schedule, self.clock.schedule
        if not self._own_clock or (isinstance(inner, int) and isinstance(outer, int) and inner >= outer):
            self.averager.share_reference(self.anchor)

    def adopt_layout(self, layout: Layout) -> None:
        """Take over a new layout; a parameter that joins starts from its present value, without momentum."""
        self.base.adopt_layout(layout)
        self._settle()
        anchor, momentum = layout.snapshot(), layout.zeros()
        if self.lifts:
            anchor, momentum = ([_on_cpu(flat) for flat in flats] for flats in (anchor, momentum))
        layout.carry(self.layout, self.anchor, anchor)
        layout.carry(self.layout, self.momentum, momentum)
        self.anchor, self.momentum = anchor, momentum
        self.layout = layout
        self._share_reference()

    # Steps and syncs --------------------------------------------------------------------------------------------------

    def after_step(self) -> None:
        """Count a local step, here and in the base."""
        self.base.after_step()
        if self._own_clock:
            self.clock.tick(first=self.steps == 0)
        self.steps += 1

    def due(self) -> Level:
        """What is due in the base, and the outer step every ``sync_every`` steps."""
        return self.base.due() | (Level.OUTER if self.steps >= self.clock.period else Level.NONE)

    def sync(self, round: Round) -> Synced:
        """The base's own sync, an outer step, or both in one."""
        if not round.levels & Level.OUTER:
            return self.base.sync(round)
        if self._own_clock or self.averages:  # otherwise the base does
            self.clock.agree()
        if self.averages:  # one average serves the base and the outer step
            self.averager.drain()  # which may end the outer step before
            move = self._step(round)
            self._treat_buffers()
            agreed, drift = self.averager.agrees(round), self.averager.average(round, move)
            self.innermost.pending = 0
            synced = Synced(drift, agreed=agreed)
        else:
            move = self._step(round)
            self._treat_buffers()
            drift, skipped, _ = self.base.sync(round) if round.levels & Level.BASE else Synced()
            synced = Synced(drift, skipped)
            for bucket in self.layout.buckets:
                own = bucket.pack(self.averager.scratch.take(bucket))
                for block, values in bucket.blocks(own):
                    move(block, values, 1.0)
                bucket.unpack(own)
            self.base.moved()
        self.steps = 0
        return synced

    def _treat_buffers(self) -> None:
        """Line 2 of SlowMo's Algorithm 1, for the parameters that are averaged now.

        With overlap this is when they are sent, not when the mean has come: the period of which the next difference is
        taken begins here.
        """
        elsewhere = self.layout.outside(self.averager.fragment)
        inner_buffers.treat(self.buffers, self.optimizer, self.workers, elsewhere)

    def _step(self, round: Round) -> OuterStep:
        """The outer step that begins now."""
        for lift in self.lifts.values():
            lift.begin()
        return OuterStep(self.rule, self.scalars(round), self.anchor, self.momentum, self.lifts)

    def _settle(self) -> None:
        """Wait until slow state in host memory is what the last outer step has made of it."""
        for lift in self.lifts.values():
            lift.settle()

    def moved(self) -> None:
        """Let the base take note."""
        self.base.moved()

    # State ------------------------------------------------------------------------------------------------------------

    def slow_state(self) -> dict[str, Any]:
        """Anchor, momentum and whatever else a subclass carries from one outer step to the next."""
        self._settle()
        return {
            "anchor": self.averager.saved(self.anchor),
            "momentum": self.averager.saved(self.momentum),
        }

    def load_slow_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`slow_state` returned."""
        self.averager.load(self.anchor, state["anchor"], "anchor")
        self.averager.load(self.momentum, state["momentum"], "slow momentum")

    def shared_state(self) -> dict[str, Any]:
        """The slow state, which averaging keeps equal on all workers.

        Of sharded state these are this worker's pieces, from which any number of workers can go on together. An outer
        step whose average is under way is made.
        """
        self.averager.drain()
        clock = {"clock": self.clock.shared_state()} if self._own_clock else {}
        return {"base": self.base.shared_state()} | clock | ({"slow": self.slow_state()} if self.averages else {})

    def local_state(self) -> dict[str, Any]:
        """The counters, and without averaging the slow state too."""
        own = {} if self.averages else {"slow": self.slow_state()}
        own |= {"clock": self.clock.local_state()} if self._own_clock else {}
        return {"base": self.base.local_state(), "steps": self.steps} | own

    def load_shared_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`shared_state` returned."""
        self.base.load_shared_state(state["base"])
        if self._own_clock:
            self.clock.load_shared_state(state.get("clock", {}))
        if "slow" in state:
            self.load_slow_state(state["slow"])

    def load_local_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`local_state` returned."""
        self.base.load_local_state(state["base"])
        if self._own_clock:
            self.clock.load_local_state(state.get("clock", {}))
        self.steps = state["steps"]
        if "slow" in state:
            self.load_slow_state(state["slow"])


def _on_cpu(flat: Tensor) -> Tensor:
    """A copy in the CPU's memory, pinned if it comes from a GPU, so that transfers are quick."""
    return flat.cpu().pin_memory() if flat.is_cuda else flat
