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

from torch import Tensor
from torch.optim import Optimizer

from lightning_slowmo import traffic
from lightning_slowmo.algorithms import inner_buffers
from lightning_slowmo.algorithms.base import (
    Algorithm,
    Running,
    agreed_rates,
    check_compressor,
    check_rate,
    learning_rates,
)
from lightning_slowmo.algorithms.inner_buffers import InnerBuffers
from lightning_slowmo.algorithms.local_sgd import LocalSGD, local_steps
from lightning_slowmo.algorithms.outer_loop import RunningOuterLoop, Scalars
from lightning_slowmo.algorithms.post_local import RunningPostLocal
from lightning_slowmo.algorithms.ramp import Ramp, check_momentum_or_ramp, momentum_at
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
from lightning_slowmo.compression import Compressor
from lightning_slowmo.parameters import Layout

BASES = {
    "allreduce": "AllReduce()",
    "local_sgd": "LocalSGD()",
    "sgp": "Gossip()",
    "osgp": "Gossip(overlap=1)",
    "dpsgd": 'Gossip("ring", push_sum=False, order="combine_while_adapt")',
    "qprsgd": "QPRSGD()",
}
"""What to write as ``base`` for the preset of a name."""


@dataclass(frozen=True)
class SlowMo(Algorithm):
    """Slow momentum over a base algorithm.

    Args:
        base: what happens between two slow updates; by default local steps alone, ``LocalSGD(sync_every)``. A
            configuration that is no outer loop itself.
        sync_every: optimizer steps between slow updates, the paper's tau; or a schedule, see
            :class:`~lightning_slowmo.LocalSGD`. A base with another period needs an integer.
        slow_momentum: the paper's beta, in [0, 1). The paper tuned 0.4 to 0.8 case by case; more for more workers.
            A :class:`~lightning_slowmo.Ramp` lets it change as training goes on.
        slow_lr: the paper's alpha. The paper always found 1 best.
        inner_buffers: the optimizer's own buffers at a slow update: ``"reset"`` to zero, ``"maintain"`` each worker's,
            ``"average"`` them (at the cost of more messages), or ``"auto"``: reset momentum, but maintain Adam's, as
            in the paper.
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

    is_outer_loop = True
    elementwise = True

    base: Algorithm | None = None
    sync_every: int | Schedule = 12
    slow_momentum: float | Ramp = 0.5
    slow_lr: float = 1.0
    inner_buffers: InnerBuffers = "auto"
    average: bool = True
    compressor: Compressor | None = None
    overlap: int = 0
    fragments: int = 1

    def __post_init__(self) -> None:
        check_sync_every(self.sync_every)
        check_momentum_or_ramp("slow_momentum", self.slow_momentum)
        check_rate("slow_lr", self.slow_lr)
        inner_buffers.check(self.inner_buffers)
        if self.base is None:
            object.__setattr__(self, "base", LocalSGD(self.sync_every))
        check_base(self.base)
        inside = getattr(self.base, "sync_every", None)
        if isinstance(inside, Schedule) and self.base != LocalSGD(self.sync_every):
            raise ValueError(
                "base must have an integer as sync_every, or be LocalSGD with SlowMo's own schedule: two that differ "
                f"would drift apart; got {self.base!r} inside sync_every={self.sync_every!r}."
            )
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
        if isinstance(self.sync_every, PostLocal):
            return RunningPostLocal(self, self.sync_every, optimizer, workers)
        return RunningSlowMo(self, optimizer, workers)

    def syncs(self, layout: Layout, workers: int) -> list[traffic.Sync]:
        """The base's syncs, and the average of line 6, which replaces the base's where both are due."""
        assert self.base is not None  # set by __post_init__
        inside = self.base.syncs(layout, workers)
        if not self.average:
            return inside
        if self.compressor is not None:
            parts = [traffic.compressed_mean(layout, workers, self.compressor, "two_shot", feedback=True)]
        else:
            parts = [self.base.average_sync(layout, workers)]
        if self.inner_buffers == "average":
            parts.append(traffic.all_reduce(layout, workers))
        head = header(self.sync_every, workers, isinstance(self.slow_momentum, Ramp))
        whole, every = traffic.together(1, *parts), usual(self.sync_every)
        outer = traffic.averages(every, head, whole, self.overlap, self.fragments)
        return [*traffic.between_averages(inside, every), *outer]

    def state_numel(self, layout: Layout, workers: int) -> float:
        """Anchor and slow momentum; what the base keeps, or for a compressor both residuals.

        If the base averages in between, a compressor also needs the common point of the base's last average.
        """
        assert self.base is not None  # set by __post_init__
        own = layout.numel * (2 + traffic.copies_in_flight(self.overlap, self.fragments))
        if self.compressor is not None:
            averages_between = self.base != LocalSGD(self.sync_every)
            return own + layout.numel * (1 + 1 / workers + averages_between)
        return own + self.base.state_numel(layout, workers)


def check_base(base: Any) -> None:
    """Raise ValueError unless ``base`` is a configuration that SlowMo can wrap."""
    if isinstance(base, str):
        known = f" For {base!r}, write base={BASES[base]}." if base in BASES else " Write base=Gossip(), for example."
        raise ValueError(f"base must be a configuration, and names are for Trainer(strategy=...); got {base!r}.{known}")
    kind = base if isinstance(base, type) else type(base)
    if issubclass(kind, Algorithm) and kind.is_outer_loop:
        raise ValueError(
            f"base must not be an outer loop itself, got {kind.__name__}: both would average and step from the mean. "
            f"Use {kind.__name__} alone, or SlowMo over an algorithm without outer steps, such as Gossip()."
        )
    if kind is base and issubclass(kind, Algorithm):
        raise ValueError(
            f"base must be a configuration, not a class: write base={kind.__name__}(), got {kind.__name__}."
        )
    if not isinstance(base, Algorithm):
        raise ValueError(f"base must be a configuration such as Gossip() or LocalSGD(), got {base!r}.")


def slow_update(
    anchor: Tensor,
    start: Tensor,
    total: Tensor,
    momentum: Tensor,
    *,
    share: float,
    slow_momentum: float,
    slow_lr: float,
    rate_ratio: float | None,
) -> tuple[Tensor, Tensor]:
    """Lines 6 to 8 of Algorithm 1, the slow update, with momentum in units of the parameters.

    Args:
        anchor: x[t,0].
        start: x[t,0] as the parameters could hold it.
        total: a sum over the workers.
        momentum: v = alpha gamma_{t-1} u[t].
        share: what makes the mean x[t,tau] of the sum.
        slow_momentum: beta.
        slow_lr: alpha.
        rate_ratio: gamma_t / gamma_{t-1}; None if gamma_t is 0, when alpha gamma_t u[t+1] is the difference alone.

    Returns:
        x[t+1,0] and v = alpha gamma_t u[t+1].
    """
    difference = subtract(start, total, share, out=total)  # x[t,0] - x[t,tau], with the mean of line 6
    if slow_lr != 1:
        difference = multiply(difference, slow_lr, out=difference)
    if rate_ratio is None:
        momentum = multiply(momentum, slow_momentum, out=momentum)
        return subtract(anchor, difference, out=anchor), momentum
    momentum = add(difference, momentum, slow_momentum * rate_ratio, out=momentum)  # line 7
    return subtract(anchor, momentum, out=anchor), momentum  # line 8


class RunningSlowMo(RunningOuterLoop):
    """SlowMo at work. ``anchor`` is x[t,0] and ``momentum`` is v.

    ``momentum_rates`` holds, by fragment and parameter group, the learning rate at which v is expressed. With overlap,
    gamma_t is the rate when x[t,tau] was sent.
    """

    rule = staticmethod(slow_update)

    def __init__(self, config: SlowMo, optimizer: Optimizer, workers: Workers) -> None:
        assert config.base is not None  # __post_init__ has set it
        if isinstance(config.base, LocalSGD):
            period = config.base.sync_every
            base: Running = local_steps(optimizer, workers, period, config.overlap, config.fragments, config.compressor)
        else:
            base = config.base.bind(optimizer, workers)
        every = divided(config.sync_every, config.fragments)
        counted = isinstance(config.slow_momentum, Ramp)
        super().__init__(base, every, config.inner_buffers, optimizer, workers, config.average, counted)
        self.config = config
        self.momentum_rates = [learning_rates(optimizer) for _ in range(config.fragments)]

    def scalars(self, round: Round) -> list[Scalars]:
        """The numbers of the slow update by parameter group; from now on v is expressed at the present rates."""
        fragment = self.averager.fragment
        rates, old_rates = agreed_rates(self.optimizer, self.workers, round), self._old_rates(fragment)
        # A rate of 0 leaves the momentum in its old units, for the next rate that is not.
        self.momentum_rates[fragment] = [new or old for new, old in zip(rates, old_rates, strict=True)]
        beta = momentum_at(self.config.slow_momentum, self.clock.taken)
        fixed = {"slow_momentum": beta, "slow_lr": self.config.slow_lr}
        ratios = [(new / old if old else 1.0) if new else None for new, old in zip(rates, old_rates, strict=True)]
        return [fixed | {"rate_ratio": ratio} for ratio in ratios]

    def _old_rates(self, fragment: int) -> list[float]:
        """The momentum's rates in one fragment; 0 for groups that have joined since, of which there is none."""
        rates = self.momentum_rates[fragment]
        return rates + [0.0] * (len(self.optimizer.param_groups) - len(rates))

    def adopt_layout(self, layout: Layout) -> None:
        """Take over a new layout, with all momentum in equal units: parameters may come to other fragments."""
        rates = [self._old_rates(fragment) for fragment in range(self.layout.fragments)]
        self._settle()
        common = [next(filter(None, column), 0.0) for column in zip(*rates, strict=True)]
        for v, run in zip(self.momentum, self.layout.runs, strict=True):
            old = rates[run.fragment][run.group]
            v.mul_(common[run.group] / old if old else 1.0)
        self.momentum_rates = [list(common) for _ in rates]
        super().adopt_layout(layout)

    def slow_state(self) -> dict[str, Any]:
        """Anchor, momentum, and the learning rates in which the momentum is expressed."""
        return super().slow_state() | {"momentum_rates": self.momentum_rates}

    def load_slow_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`slow_state` returned."""
        super().load_slow_state(state)
        self.momentum_rates = [list(rates) for rates in state["momentum_rates"]]
