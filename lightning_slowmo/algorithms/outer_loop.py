"""The outer loop that SlowMo, BMUF and DiLoCo share: a base algorithm inside, an exact average, an outer step.

Every ``sync_every`` steps the workers' parameters x are averaged and the difference of the last common point (the
*anchor*) to that average is treated as a gradient: anchor <- anchor - step(anchor - mean(x)). All workers restart from
the new anchor. The algorithms differ in ``step`` alone.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_slowmo.algorithms import inner_buffers
from lightning_slowmo.algorithms.base import NOT_DUE, Algorithm, Round, Running, SyncReport, copy_state
from lightning_slowmo.algorithms.inner_buffers import InnerBuffers
from lightning_slowmo.communication.collectives import gather_shards
from lightning_slowmo.communication.workers import Workers
from lightning_slowmo.parameters import Block, Layout, Shards


class RunningOuterLoop(Running):
    """A base algorithm inside an outer loop.

    Args:
        base: the algorithm inside; it may communicate by itself between two outer steps.
        sync_every: optimizer steps between outer steps.
        buffers: what becomes of the optimizer's buffers at an outer step.
        average: whether the parameters are averaged before the outer step.
        optimizer: the user's own.
        workers: who takes part.
    """

    def __init__(
        self,
        base: Algorithm,
        sync_every: int,
        buffers: InnerBuffers,
        average: bool,
        optimizer: Optimizer,
        workers: Workers,
    ) -> None:
        self.base = base.bind(optimizer, workers)
        super().__init__(optimizer, workers, self.base)
        self.sync_every = sync_every
        self.buffers = buffers
        self.averages = average
        self.level = self.base.level << 1
        self.steps = 0
        self.anchor = self.layout.snapshot()
        self.momentum = self.layout.zeros()

    def place_slow_state(self, shard: bool, offload: bool) -> None:
        """Keep anchor and momentum in pieces, or in the CPU's memory."""
        if shard:
            if type(self.base).average is not Running.average or not self.averages:
                raise ValueError(
                    "shard_slow_state needs an outer loop that averages over LocalSGD or AllReduce, all parameters at "
                    "once and without overlap or a compressor: gossip has no common state to share out."
                )
            self.base.shards = Shards(self.layout, self.workers.rank, self.workers.size)
            self.anchor, self.momentum = self.base.shards.cut(self.anchor), self.base.shards.cut(self.momentum)
        if offload:
            self.anchor, self.momentum = ([_on_cpu(flat) for flat in flats] for flats in (self.anchor, self.momentum))

    @abstractmethod
    def outer_step(self, block: Block, difference: Tensor) -> None:
        """Move the anchor of one block.

        Args:
            block: which one.
            difference: the anchor less the mean of the workers (without averaging: less this worker's parameters);
                may be overwritten.
        """

    def begin_outer_step(self, round: Round) -> None:
        """Prepare what is common to all buckets of an outer step."""

    # The base's life goes on inside -----------------------------------------------------------------------------------

    @property
    def pending(self) -> int:
        """Local steps since the base's parameters were last averaged."""
        return self.base.pending

    @pending.setter
    def pending(self, steps: int) -> None:
        self.base.pending = steps

    @property
    def exchanges_gradients(self) -> bool:  # type: ignore[override]
        """Whether the base does."""
        return self.base.exchanges_gradients

    def sync_gradients(self, round: Round) -> None:
        """Let the base exchange gradients."""
        self.base.loss_scale = self.loss_scale
        self.base.sync_gradients(round)

    def relayout(self, layout: Layout) -> None:
        """Take over a new layout; a parameter that joins starts from its present value, without momentum."""
        if self.base.shards is not None:
            raise ValueError(
                "Parameters joined the optimizer, or were frozen, after the start, which does not go with "
                "shard_slow_state=True. Leave it out, or train all parameters from the start."
            )
        device = self.anchor[0].device
        anchor, momentum = ([flat.to(device) for flat in flats] for flats in (layout.snapshot(), layout.zeros()))
        layout.carry(self.layout, self.anchor, anchor)
        layout.carry(self.layout, self.momentum, momentum)
        self.anchor, self.momentum = anchor, momentum
        self.base.relayout(layout)
        super().relayout(layout)

    def after_step(self) -> None:
        """Count a local step, here and in the base."""
        self.base.after_step()
        self.steps += 1

    def due(self) -> int:
        """The base's levels, and the outer step's own every ``sync_every`` steps."""
        return self.base.due() | (self.level if self.steps >= self.sync_every else NOT_DUE)

    # The outer step ---------------------------------------------------------------------------------------------------

    def sync(self, round: Round) -> SyncReport:
        """The base's own sync, an outer step, or both in one."""
        if not round.levels & self.level:
            return self.base.sync(round)
        if self.averages:
            self.base.drain()  # which may end the outer step before
        self.begin_outer_step(round)
        self._treat_buffers()
        if self.averages:  # one all-reduce serves the base and the outer step
            report = SyncReport(drift=self.base.average(round, then=self._move))
        else:
            report = self.base.sync(round) if round.levels & (self.level - 1) else SyncReport()
            for bucket in self.layout.buckets:
                own = bucket.pack(self.scratch.take(bucket))
                for block, values in bucket.blocks(own):
                    self._move(block, values, 1.0)
                bucket.unpack(own)
            self.base.moved()
        self.steps = 0
        return report

    def _treat_buffers(self) -> None:
        """Line 2 of SlowMo's Algorithm 1, for the parameters that are averaged now.

        With overlap this is when they are sent, not when the mean has come: the period of which the next difference is
        taken begins here.
        """
        elsewhere = self.layout.outside(self.base.fragment)
        inner_buffers.treat(self.buffers, self.optimizer, self.workers, elsewhere)

    def agrees_after(self, round: Round) -> bool:
        """After an outer step from the average, and between outer steps when the base does."""
        if round.levels & self.level:
            return self.averages and self.base.average_agrees(round)
        return self.base.agrees_after(round)

    def _move(self, block: Block, total: Tensor, weight: float) -> None:
        anchor = block.of(self.anchor)
        here = total.to(anchor.device)  # total itself, unless slow state is offloaded
        # The memory of the sum serves for the difference too: a new buffer would cost more than the arithmetic.
        difference = torch.sub(block.rounded(anchor), here, alpha=1 / weight, out=here)
        self.outer_step(block, difference)
        total.copy_(anchor)

    def drain(self) -> None:
        """Take in the base's messages that are still in flight."""
        self.base.drain()

    def regroup(self, round: Round) -> None:
        """Let the base's workers catch up with one another."""
        self.base.regroup(round)

    def consensus(self, round: Round) -> None:
        """The base's consensus."""
        self.base.consensus(round)

    def finish(self, round: Round) -> None:
        """The base's end."""
        self.base.finish(round)

    # State ------------------------------------------------------------------------------------------------------------

    def slow_state(self) -> dict[str, Any]:
        """Anchor, momentum and whatever else a subclass carries from one outer step to the next."""
        return {
            "anchor": self.layout.per_parameter(self._whole(self.anchor)),
            "momentum": self.layout.per_parameter(self._whole(self.momentum)),
        }

    def load_slow_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`slow_state` returned."""
        self._load(self.anchor, state["anchor"], "anchor")
        self._load(self.momentum, state["momentum"], "slow momentum")

    def _whole(self, buffers: list[Tensor]) -> list[Tensor]:
        """Slow state in the whole layout; collected from the workers if it is sharded."""
        return buffers if self.base.shards is None else gather_shards(self.base.shards, buffers, self.workers)

    def _load(self, buffers: list[Tensor], saved: list[Tensor], what: str) -> None:
        """Copy checkpointed tensors into buffers, or into this worker's pieces."""
        shards = self.base.shards
        whole = buffers if shards is None else self.layout.empty()
        copy_state(self.layout.per_parameter(whole), saved, what)
        if shards is not None:
            for own, piece in zip(buffers, shards.cut(whole), strict=True):
                own.copy_(piece)

    def shared_state(self) -> dict[str, Any]:
        """The slow state, which exact averaging keeps equal on all workers.

        Sharded state is collected from the workers, so that any number of workers can go on from it. An outer step
        whose average is in flight is made.
        """
        self.drain()
        return {"base": self.base.shared_state()} | ({"slow": self.slow_state()} if self.averages else {})

    def local_state(self) -> dict[str, Any]:
        """The counters, and without averaging the slow state too."""
        own = {} if self.averages else {"slow": self.slow_state()}
        return {"base": self.base.local_state(), "steps": self.steps} | own

    def load_shared_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`shared_state` returned."""
        self.base.load_shared_state(state["base"])
        if "slow" in state:
            self.load_slow_state(state["slow"])

    def load_local_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`local_state` returned."""
        self.base.load_local_state(state["base"])
        self.steps = state["steps"]
        if "slow" in state:
            self.load_slow_state(state["slow"])


def _on_cpu(flat: Tensor) -> Tensor:
    """A copy in the CPU's memory, pinned if it comes from a GPU, so that transfers are quick."""
    return flat.cpu().pin_memory() if flat.is_cuda else flat
