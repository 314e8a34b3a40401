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

from lightning_slowmo import traffic
from lightning_slowmo.algorithms import inner_buffers
from lightning_slowmo.algorithms.base import (
    Algorithm,
    Running,
    check_momentum,
    check_period,
    check_rate,
)
from lightning_slowmo.algorithms.inner_buffers import InnerBuffers
from lightning_slowmo.algorithms.local_sgd import local_steps
from lightning_slowmo.algorithms.outer_loop import RunningOuterLoop, Scalars
from lightning_slowmo.algorithms.post_local import RunningPostLocal
from lightning_slowmo.algorithms.schedules import (
    PostLocal,
    Schedule,
    check_streaming,
    check_sync_every,
    divided,
    header,
    usual,
)
from lightning_slowmo.arithmetic import add, multiply, subtract
from lightning_slowmo.communication.meeting import Round
from lightning_slowmo.communication.workers import Workers
from lightning_slowmo.parameters import Layout


@dataclass(frozen=True)
class BMUF(Algorithm):
    """Block momentum over local steps. At a constant learning rate the classical form is SlowMo's.

    Args:
        sync_every: optimizer steps in a block, or a schedule, see :class:`~lightning_slowmo.LocalSGD`.
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

    is_outer_loop = True
    elementwise = True

    sync_every: int | Schedule = 50
    block_momentum: float | None = None
    block_lr: float = 1.0
    nesterov: bool = False
    warmup_steps: int = 0
    inner_buffers: InnerBuffers = "auto"
    overlap: int = 0
    fragments: int = 1

    def __post_init__(self) -> None:
        check_sync_every(self.sync_every)
        if self.block_momentum is not None:
            check_momentum("block_momentum", self.block_momentum)
        check_rate("block_lr", self.block_lr)
        check_period("warmup_steps", self.warmup_steps, least=0)
        inner_buffers.check(self.inner_buffers)
        check_streaming(self.sync_every, self.overlap, self.fragments)

    def bind(self, optimizer: Optimizer, workers: Workers) -> Running:
        """Make the running state for one optimizer."""
        if isinstance(self.sync_every, PostLocal):
            return RunningPostLocal(self, self.sync_every, optimizer, workers)
        return RunningBMUF(self, optimizer, workers)

    def syncs(self, layout: Layout, workers: int) -> list[traffic.Sync]:
        """An average of the parameters at the end of each block, and of the optimizer's buffers if so configured."""
        mean = self.average_sync(layout, workers)
        whole = traffic.together(1, *([mean, mean] if self.inner_buffers == "average" else [mean]))
        head = header(self.sync_every, workers)
        return traffic.averages(usual(self.sync_every), head, whole, self.overlap, self.fragments)

    def state_numel(self, layout: Layout, workers: int) -> float:
        """Anchor and block momentum."""
        return layout.numel * (2 + traffic.copies_in_flight(self.overlap, self.fragments))


def block_update(
    anchor: Tensor,
    start: Tensor,
    total: Tensor,
    momentum: Tensor,
    *,
    share: float,
    block_momentum: float,
    block_lr: float,
    nesterov: bool,
    warming_up: bool,
) -> tuple[Tensor, Tensor]:
    """Filter the update of one block of local steps.

    Args:
        anchor: W_g.
        start: W_g as the parameters could hold it.
        total: a sum over the workers.
        momentum: -D.
        share: what makes the mean of the W_i of the sum.
        block_momentum: eta.
        block_lr: zeta.
        nesterov: whether the next block starts from where the momentum will take it.
        warming_up: whether the block is averaged without momentum.

    Returns:
        The new W_g and -D.
    """
    difference = subtract(start, total, share, out=total)  # -G = W_g - mean_i W_i
    if warming_up:
        return subtract(anchor, difference, out=anchor), momentum
    momentum = multiply(momentum, block_momentum, out=momentum)
    momentum = add(momentum, difference, block_lr, out=momentum)  # -D = eta (-D) + zeta (-G)
    if nesterov:
        anchor = subtract(anchor, difference, block_lr, out=anchor)  # W_g = W_g + zeta G + eta D
        return subtract(anchor, momentum, block_momentum, out=anchor), momentum
    return subtract(anchor, momentum, out=anchor), momentum  # W_g = W = W_g + D


class RunningBMUF(RunningOuterLoop):
    """BMUF at work. ``anchor`` is W_g and ``momentum`` is -D.

    Attributes:
        block_momentum: eta.
        blocks: blocks done, or with fragments, their parts.
    """

    rule = staticmethod(block_update)

    def __init__(self, config: BMUF, optimizer: Optimizer, workers: Workers) -> None:
        base = local_steps(optimizer, workers, config.sync_every, config.overlap, config.fragments)
        every = divided(config.sync_every, config.fragments)
        super().__init__(base, every, config.inner_buffers, optimizer, workers)
        self.config = config
        self.block_momentum = 1 - 1 / workers.size if config.block_momentum is None else config.block_momentum
        self.blocks = 0

    def scalars(self, round: Round) -> list[Scalars]:
        """The numbers of the filter, the same for all parameter groups; counts the block."""
        self.blocks += 1
        numbers = {
            "block_momentum": self.block_momentum,
            "block_lr": self.config.block_lr,
            "nesterov": self.config.nesterov,
            "warming_up": self._steps_done() <= self.config.warmup_steps,
        }
        return [numbers] * len(self.optimizer.param_groups)

    def _steps_done(self) -> int:
        """Optimizer steps until the end of this block."""
        every = self.clock.schedule
        return self.blocks * every if isinstance(every, int) else self.clock.taken

    def slow_state(self) -> dict[str, object]:
        """Anchor, momentum, and the number of blocks done."""
        return super().slow_state() | {"blocks": self.blocks}

    def load_slow_state(self, state: dict[str, object]) -> None:
        """Restore what :meth:`slow_state` returned."""
        super().load_slow_state(state)
        self.blocks = int(state["blocks"])  # type: ignore[call-overload]
