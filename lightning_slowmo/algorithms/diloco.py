"""DiLoCo: many local AdamW steps, then one step of an outer optimizer on the averaged difference.

Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models", 2023,
https://arxiv.org/abs/2311.08105. The outer gradient is the anchor less the mean of the workers; the paper's outer
optimizer is SGD with Nesterov momentum, whose closed form is::

    v = mu v + delta;    theta = theta - eta (delta + mu v)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_slowmo import traffic
from lightning_slowmo.algorithms.base import (
    Algorithm,
    Running,
    Synced,
    check_compressor,
    check_rate,
)
from lightning_slowmo.algorithms.local_sgd import local_steps
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
from lightning_slowmo.arithmetic import add, subtract
from lightning_slowmo.communication.meeting import Level, Round
from lightning_slowmo.communication.workers import Workers
from lightning_slowmo.compression import Compressor
from lightning_slowmo.parameters import Layout

OuterOptimizer = Callable[[Iterable[Tensor]], Optimizer]
"""Anything that makes an optimizer of parameters, such as ``functools.partial(torch.optim.Adam, lr=1e-3)``."""


@dataclass(frozen=True)
class DiLoCo(Algorithm):
    """Local steps with an outer optimizer; the inner optimizer's buffers stay each worker's own.

    Unlike SlowMo, the outer momentum is not rescaled when the inner learning rate changes.

    Args:
        sync_every: optimizer steps between outer steps, the paper's H; or a schedule, see
            :class:`~lightning_slowmo.LocalSGD`.
        outer_lr: learning rate of the outer Nesterov SGD.
        outer_momentum: its momentum, in [0, 1); a :class:`~lightning_slowmo.Ramp` lets it change, as in Pier.
        outer_optimizer: another optimizer of ``torch.optim`` instead: a callable that takes parameters, for example
            ``functools.partial(torch.optim.Adam, lr=1e-3)``. ``outer_lr`` and ``outer_momentum`` then do not apply.
        compressor: how outer gradients are compressed, with error feedback; None sends them in full.
        overlap: for how many of the next steps an outer gradient is on its way before the outer step is taken in, less
            than the steps between two syncs; 0 waits for it. See :class:`~lightning_slowmo.LocalSGD`.
        fragments: number of parts of the parameters of which one at a time makes an outer step, every
            ``sync_every / fragments`` steps, as in Streaming DiLoCo.

    Raises:
        ValueError: if an argument is out of its range.
    """

    is_outer_loop = True
    elementwise = True

    sync_every: int | Schedule = 500
    outer_lr: float = 0.7
    outer_momentum: float | Ramp = 0.9
    outer_optimizer: OuterOptimizer | None = None
    compressor: Compressor | None = None
    overlap: int = 0
    fragments: int = 1

    def __post_init__(self) -> None:
        check_sync_every(self.sync_every)
        check_rate("outer_lr", self.outer_lr)
        check_momentum_or_ramp("outer_momentum", self.outer_momentum)
        if self.compressor is not None:
            check_compressor(self.compressor)
        if self.outer_optimizer is not None and not callable(self.outer_optimizer):
            raise ValueError(
                "outer_optimizer must be a callable that makes an optimizer of parameters, such as "
                f"functools.partial(torch.optim.Adam, lr=1e-3), got {self.outer_optimizer!r}."
            )
        check_streaming(self.sync_every, self.overlap, self.fragments)
        plain = self.compressor is None and self.outer_optimizer is None
        if (self.overlap or self.fragments > 1) and not plain:
            raise ValueError("overlap and fragments do not go with a compressor or an outer_optimizer of one's own.")

    @property
    def fits_shards(self) -> bool:
        """An optimizer of the user's may take norms of its tensors, as Muon does."""
        return super().fits_shards and self.outer_optimizer is None

    @property
    def kind(self) -> str:
        """An outer optimizer of the user's has state of its own."""
        return super().kind + (" and outer optimizer" if self.outer_optimizer is not None else "")

    def bind(self, optimizer: Optimizer, workers: Workers) -> Running:
        """Make the running state for one optimizer."""
        if isinstance(self.sync_every, PostLocal):
            return RunningPostLocal(self, self.sync_every, optimizer, workers)
        if self.outer_optimizer is not None:
            return RunningOuterOptimizer(self, self.outer_optimizer, optimizer, workers)
        return RunningDiLoCo(self, optimizer, workers)

    def syncs(self, layout: Layout, workers: int) -> list[traffic.Sync]:
        """An average of the outer gradients every ``sync_every`` steps."""
        if self.compressor is not None:
            mean = traffic.compressed_mean(layout, workers, self.compressor, "two_shot", feedback=True)
        else:
            mean = self.average_sync(layout, workers)
        head = header(self.sync_every, workers, isinstance(self.outer_momentum, Ramp))
        return traffic.averages(usual(self.sync_every), head, mean, self.overlap, self.fragments)

    def state_numel(self, layout: Layout, workers: int) -> float:
        """Anchor and outer momentum; for a compressor an anchor and both residuals."""
        compressed = 1 + 1 / workers if self.compressor is not None else 0
        return layout.numel * (2 + traffic.copies_in_flight(self.overlap, self.fragments) + compressed)


def nesterov_step(
    anchor: Tensor,
    start: Tensor,
    total: Tensor,
    momentum: Tensor,
    *,
    share: float,
    outer_lr: float,
    outer_momentum: float,
) -> tuple[Tensor, Tensor]:
    """One step of SGD with Nesterov momentum along the outer gradient.

    Args:
        anchor: theta.
        start: theta as the parameters could hold it.
        total: a sum over the workers.
        momentum: v.
        share: what makes the mean of the sum.
        outer_lr: eta.
        outer_momentum: mu.

    Returns:
        The new theta and v.
    """
    delta = subtract(start, total, share, out=total)  # the outer gradient, theta - mean_i theta_i
    momentum = add(delta, momentum, outer_momentum, out=momentum)  # v = mu v + delta
    delta = add(delta, momentum, outer_momentum, out=delta)
    return subtract(anchor, delta, outer_lr, out=anchor), momentum  # theta = theta - eta (delta + mu v)


def outer_gradient(
    anchor: Tensor, start: Tensor, total: Tensor, momentum: Tensor, *, share: float
) -> tuple[Tensor, Tensor]:
    """Collect the outer gradient in place of a momentum; a step of the user's own optimizer needs all of it."""
    return anchor, subtract(start, total, share, out=momentum)


class RunningDiLoCo(RunningOuterLoop):
    """DiLoCo with the paper's outer optimizer, in closed form. ``anchor`` is theta and ``momentum`` is v."""

    rule = staticmethod(nesterov_step)

    def __init__(self, config: DiLoCo, optimizer: Optimizer, workers: Workers) -> None:
        base = local_steps(optimizer, workers, config.sync_every, config.overlap, config.fragments, config.compressor)
        every, counted = divided(config.sync_every, config.fragments), isinstance(config.outer_momentum, Ramp)
        super().__init__(base, every, "maintain", optimizer, workers, counted=counted)
        self.config = config

    def scalars(self, round: Round) -> list[Scalars]:
        """Outer learning rate and momentum."""
        momentum = momentum_at(self.config.outer_momentum, self.clock.taken)
        numbers = {"outer_lr": self.config.outer_lr, "outer_momentum": momentum}
        return [numbers] * len(self.optimizer.param_groups)


class RunningOuterOptimizer(RunningOuterLoop):
    """DiLoCo with an outer optimizer of the user's.

    The outer optimizer sees the anchor as parameters of the model's shapes. ``momentum`` holds the outer gradients
    between the average and the step.
    """

    rule = staticmethod(outer_gradient)

    def __init__(self, config: DiLoCo, make: OuterOptimizer, optimizer: Optimizer, workers: Workers) -> None:
        base = local_steps(optimizer, workers, config.sync_every, compressor=config.compressor)
        super().__init__(base, config.sync_every, "maintain", optimizer, workers)
        self.make = make
        self.outer = make(self._outer_parameters())

    def scalars(self, round: Round) -> list[Scalars]:
        """None."""
        return [{}] * len(self.optimizer.param_groups)

    def place_slow_state(self, shard: bool, offload: bool) -> None:
        """Not possible: the outer optimizer holds the anchor."""
        raise ValueError("shard_slow_state and offload_slow_state do not go with an outer_optimizer of one's own.")

    def _outer_parameters(self) -> list[Parameter]:
        """The anchor as parameters, with the outer gradients as their gradients; both are views, not copies."""
        parameters = []
        anchors, gradients = self.layout.per_parameter(self.anchor), self.layout.per_parameter(self.momentum)
        for anchor, gradient in zip(anchors, gradients, strict=True):
            parameter = Parameter(anchor)
            parameter.grad = gradient
            parameters.append(parameter)
        return parameters

    def adopt_layout(self, layout: Layout) -> None:
        """Take over a new layout, and the outer optimizer's state of the parameters that stay."""
        old = dict(zip(map(id, self.layout.parameters), self.outer.param_groups[0]["params"], strict=True))
        states = self.outer.state
        super().adopt_layout(layout)
        self.outer = self.make(self._outer_parameters())
        for parameter, outer in zip(layout.parameters, self.outer.param_groups[0]["params"], strict=True):
            if id(parameter) in old and old[id(parameter)] in states:
                self.outer.state[outer] = states[old[id(parameter)]]

    def sync(self, round: Round) -> Synced:
        """Average, then step the outer optimizer and restart from where it went."""
        synced = super().sync(round)
        if round.levels & Level.OUTER:
            with torch.no_grad():
                self.outer.step()
            self.layout.restore(self.anchor)
        return synced

    def slow_state(self) -> dict[str, Any]:
        """Anchor and the outer optimizer's state."""
        return {"anchor": self.layout.per_parameter(self.anchor), "outer": self.outer.state_dict()}

    def load_slow_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`slow_state` returned."""
        super().load_slow_state(state | {"momentum": self.layout.per_parameter(self.momentum)})
        self.outer.load_state_dict(state["outer"])
