"""SlowMo: slow momentum on top of any communication-efficient base optimizer.

Wang, Tantia, Ballas, Rabbat, "SlowMo: Improving Communication-Efficient Distributed SGD with Slow Momentum",
ICLR 2020, https://arxiv.org/abs/1910.00643, Algorithm 1. With base steps x, slow momentum u, inner learning rate
gamma, slow learning rate alpha and m workers, after every tau base steps::

    line 6    x[t,tau] = 1/m sum_i x_i[t,tau]                       exact average
    line 7    u[t+1]   = beta u[t] + (x[t,0] - x[t,tau]) / gamma_t
    line 8    x[t+1,0] = x[t,0] - alpha gamma_t u[t+1]

Here the momentum is stored in units of the parameters, v = alpha gamma u, so that nothing is divided by a learning
rate, which is 0 at the start of many warm-ups::

    lines 7, 8    v = (gamma_t / gamma_{t-1}) beta v + alpha (x[t,0] - x[t,tau]);    x[t+1,0] = x[t,0] - v
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
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
from lightning_slowmo.algorithms.quantized_averaging import check_compressor, local_steps
from lightning_slowmo.communication.workers import Workers
from lightning_slowmo.compression import Compressor
from lightning_slowmo.parameters import Block, Layout


@dataclass(frozen=True)
class SlowMo(Algorithm):
    """Slow momentum over a base algorithm.

    Args:
        base: what happens between two slow updates; by default local steps alone, ``LocalSGD(sync_every)``.
        sync_every: optimizer steps between slow updates, the paper's tau.
        slow_momentum: the paper's beta, in [0, 1). The paper tuned 0.4 to 0.8 case by case; more for more workers.
        slow_lr: the paper's alpha. The paper always found 1 best.
        inner_buffers: the optimizer's own buffers at a slow update: ``"reset"`` to zero, ``"maintain"`` each worker's,
            ``"average"`` them (at the cost of more messages), or ``"auto"``: reset momentum, but maintain what adapts
            step sizes and the momentum beside it, as in the paper.
        average: False is the paper's no-average variant, which skips line 6 and relies on the base to mix.
        compressor: how the differences to the last common point are compressed in line 6, with error feedback; None
            sends them in full. For ``LocalSGD`` as base.
        overlap: for how many of the next steps the average of line 6 is on its way before lines 7 and 8 are taken in,
            less than the steps between two syncs; 0 waits for it. See :class:`~lightning_slowmo.LocalSGD`.
        fragments: number of parts of the parameters of which one at a time is averaged and updated, every
            ``sync_every / fragments`` steps.

    Raises:
        ValueError: if an argument is out of its range.

    Example::

        Trainer(strategy=SlowMoStrategy(SlowMo(sync_every=12, slow_momentum=0.7)))
    """

    base: Algorithm | None = None
    sync_every: int = 12
    slow_momentum: float = 0.5
    slow_lr: float = 1.0
    inner_buffers: InnerBuffers = "auto"
    average: bool = True
    compressor: Compressor | None = None
    overlap: int = 0
    fragments: int = 1

    def __post_init__(self) -> None:
        check_period("sync_every", self.sync_every)
        check_momentum("slow_momentum", self.slow_momentum)
        check_rate("slow_lr", self.slow_lr)
        inner_buffers.check(self.inner_buffers)
        if self.base is None:
            object.__setattr__(self, "base", LocalSGD(self.sync_every))
        if self.compressor is not None:
            check_compressor(self.compressor)
            if not (self.average and isinstance(self.base, LocalSGD)):
                raise ValueError("compressor needs LocalSGD as base and average=True: it compresses the average.")
        check_streaming(self.sync_every, self.overlap, self.fragments)
        if isinstance(self.base, LocalSGD) and (self.base.overlap or self.base.fragments > 1):
            raise ValueError("overlap and fragments belong to SlowMo, not to its base.")
        plain = self.average and self.compressor is None and self.base == LocalSGD(self.sync_every)
        if (self.overlap or self.fragments > 1) and not plain:
            raise ValueError(
                "overlap and fragments need average=True, no compressor, and LocalSGD with the same sync_every as "
                "base: what they delay and divide is the average of line 6."
            )

    @property
    def kind(self) -> str:
        """Without averaging, each worker has a slow state of its own."""
        return super().kind + ("" if self.average else " without averaging")

    def bind(self, optimizer: Optimizer, workers: Workers) -> Running:
        """Make the running state for one optimizer."""
        return RunningSlowMo(self, optimizer, workers)


class RunningSlowMo(RunningOuterLoop):
    """SlowMo at work. ``anchor`` is x[t,0] and ``momentum`` is v.

    ``momentum_rates`` holds, by fragment and parameter group, the learning rate at which v is expressed. With overlap,
    gamma_t is the rate when x[t,tau] was sent.
    """

    def __init__(self, config: SlowMo, optimizer: Optimizer, workers: Workers) -> None:
        base = config.base
        assert base is not None  # __post_init__ has set it
        if isinstance(base, LocalSGD):
            base = local_steps(base.sync_every, config.compressor, config.overlap, config.fragments)
        every = config.sync_every // config.fragments
        super().__init__(base, every, config.inner_buffers, config.average, optimizer, workers)
        self.config = config
        self.momentum_rates = [self.rates() for _ in range(config.fragments)]

    def begin_outer_step(self, round: Round) -> None:
        """Line 7's factor of the old momentum, beta gamma_t / gamma_{t-1}, by parameter group."""
        rates, fragment = self.agreed_rates(round), self.base.fragment
        old_rates = self._old_rates(fragment)
        self.resting = [rate == 0 for rate in rates]
        beta = self.config.slow_momentum
        self.carry = [beta * (new / old if new and old else 1.0) for new, old in zip(rates, old_rates, strict=True)]
        # A rate of 0 leaves the momentum in its old units, for the next rate that is not.
        self.momentum_rates[fragment] = [new or old for new, old in zip(rates, old_rates, strict=True)]

    def _old_rates(self, fragment: int) -> list[float]:
        """The momentum's rates in one fragment; 0 for groups that have joined since, of which there is none."""
        rates = self.momentum_rates[fragment]
        return rates + [0.0] * (len(self.optimizer.param_groups) - len(rates))

    def outer_step(self, block: Block, difference: Tensor) -> None:
        """Lines 7 and 8."""
        anchor, v = block.of(self.anchor), block.of(self.momentum)
        if self.config.slow_lr != 1:
            difference.mul_(self.config.slow_lr)
        if self.resting[block.group]:  # gamma_t = 0: of alpha gamma_t u[t+1] only the difference remains
            v.mul_(self.config.slow_momentum)
            anchor.sub_(difference)
        else:
            torch.add(difference, v, alpha=self.carry[block.group], out=v)
            anchor.sub_(v)

    def relayout(self, layout: Layout) -> None:
        """Take over a new layout, with all momentum in equal units: parameters may come to other fragments."""
        rates = [self._old_rates(fragment) for fragment in range(self.layout.fragments)]
        common = [next(filter(None, column), 0.0) for column in zip(*rates, strict=True)]
        for v, run in zip(self.momentum, self.layout.runs, strict=True):
            old = rates[run.fragment][run.group]
            v.mul_(common[run.group] / old if old else 1.0)
        self.momentum_rates = [list(common) for _ in rates]
        super().relayout(layout)

    def slow_state(self) -> dict[str, Any]:
        """Anchor, momentum, and the learning rates in which the momentum is expressed."""
        return super().slow_state() | {"momentum_rates": self.momentum_rates}

    def load_slow_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`slow_state` returned."""
        super().load_slow_state(state)
        self.momentum_rates = [list(rates) for rates in state["momentum_rates"]]
