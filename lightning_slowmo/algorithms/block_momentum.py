"""BMUF: blockwise model-update filtering.

Chen, Huo, "Scalable Training of Deep Learning Machines by Incremental Block Training with Intra-Block Parallel
Optimization and Blockwise Model-Update Filtering", ICASSP 2016. With block momentum eta and block learning rate zeta,
after each block of local steps from the common point W_g::

    G = mean_i W_i - W_g;    D = eta D + zeta G;    W = W + D
    classical block momentum:  W_g = W              Nesterov block momentum:  W_g = W + eta D

The momentum is kept as v = -D. W is not stored: for the Nesterov form, W_g = W + eta D gives
W_g <- W_g + zeta G + eta D, which is the same recursion.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.optim import Optimizer

from lightning_slowmo.algorithms import inner_buffers
from lightning_slowmo.algorithms.base import (
    Algorithm,
    Round,
    Running,
    check_momentum,
    check_period,
    check_rate,
    check_streaming,
)
from lightning_slowmo.algorithms.inner_buffers import InnerBuffers
from lightning_slowmo.algorithms.local_sgd import LocalSGD
from lightning_slowmo.algorithms.outer_loop import RunningOuterLoop
from lightning_slowmo.communication.workers import Workers
from lightning_slowmo.parameters import Block


@dataclass(frozen=True)
class BMUF(Algorithm):
    """Block momentum over local steps. At a constant learning rate the classical form is SlowMo's.

    Args:
        sync_every: optimizer steps in a block.
        block_momentum: eta, in [0, 1); None is the paper's rule 1 - 1/n for n workers.
        block_lr: zeta.
        nesterov: Nesterov block momentum instead of the classical one.
        warmup_steps: optimizer steps at the start during which blocks are averaged without momentum.
        inner_buffers: the optimizer's own buffers at the end of a block, as for SlowMo.
        overlap: for how many steps of the next block an average is on its way, as for SlowMo.
        fragments: number of parts of the parameters of which one at a time ends its block, as for SlowMo.

    Raises:
        ValueError: if an argument is out of its range.
    """

    sync_every: int = 50
    block_momentum: float | None = None
    block_lr: float = 1.0
    nesterov: bool = False
    warmup_steps: int = 0
    inner_buffers: InnerBuffers = "auto"
    overlap: int = 0
    fragments: int = 1

    def __post_init__(self) -> None:
        check_period("sync_every", self.sync_every)
        if self.block_momentum is not None:
            check_momentum("block_momentum", self.block_momentum)
        check_rate("block_lr", self.block_lr)
        check_period("warmup_steps", self.warmup_steps, least=0)
        inner_buffers.check(self.inner_buffers)
        check_streaming(self.sync_every, self.overlap, self.fragments)

    def bind(self, optimizer: Optimizer, workers: Workers) -> Running:
        """Make the running state for one optimizer."""
        return RunningBMUF(self, optimizer, workers)


class RunningBMUF(RunningOuterLoop):
    """BMUF at work. ``anchor`` is W_g and ``momentum`` is -D."""

    def __init__(self, config: BMUF, optimizer: Optimizer, workers: Workers) -> None:
        base = LocalSGD(config.sync_every, config.overlap, config.fragments)
        super().__init__(base, config.sync_every // config.fragments, config.inner_buffers, True, optimizer, workers)
        self.config = config
        self.block_momentum = 1 - 1 / workers.size if config.block_momentum is None else config.block_momentum
        self.blocks = 0

    def begin_outer_step(self, round: Round) -> None:
        """Count the block, or the fragment's part of one."""
        self.blocks += 1

    def outer_step(self, block: Block, difference: Tensor) -> None:
        """Filter the block's update."""
        if self.blocks * self.sync_every <= self.config.warmup_steps:
            block.of(self.anchor).sub_(difference)
            return
        eta, zeta = self.block_momentum, self.config.block_lr
        anchor, v = block.of(self.anchor), block.of(self.momentum)
        v.mul_(eta).add_(difference, alpha=zeta)
        if self.config.nesterov:
            anchor.sub_(difference, alpha=zeta).sub_(v, alpha=eta)
        else:
            anchor.sub_(v)

    def slow_state(self) -> dict[str, object]:
        """Anchor, momentum, and the number of blocks done."""
        return super().slow_state() | {"blocks": self.blocks}

    def load_slow_state(self, state: dict[str, object]) -> None:
        """Restore what :meth:`slow_state` returned."""
        super().load_slow_state(state)
        self.blocks = int(state["blocks"])  # type: ignore[call-overload]
