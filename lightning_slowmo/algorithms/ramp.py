"""Momenta that change as training goes on: warm-up and decay of the outer momentum.

Fan, Zhang, "Pier: Efficient Large Language Model Pretraining with Relaxed Global Communication", 2025,
https://arxiv.org/abs/2511.17849, lets the outer momentum of DiLoCo warm up, and decay towards the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from lightning_slowmo.algorithms.base import check_momentum, check_period
from lightning_slowmo.algorithms.schedules import FrozenMapping


@dataclass(frozen=True)
class Ramp:
    """A momentum on straight lines between points, constant before the first and after the last.

    Args:
        points: optimizer steps from the beginning of training, and the momentum then, in [0, 1). An outer step takes
            the momentum at the step after which it is made.

    Raises:
        ValueError: if there is no point, or one is out of its range.

    Example::

        DiLoCo(outer_momentum=Ramp({0: 0.0, 1000: 0.9, 9000: 0.9, 10_000: 0.5}))    # warm-up, then a decay at the end
    """

    points: Mapping[int, float]

    def __post_init__(self) -> None:
        pairs = self.points.items() if isinstance(self.points, Mapping) else self.points
        try:
            points = FrozenMapping(sorted((step, momentum) for step, momentum in pairs))
        except (TypeError, ValueError):
            raise ValueError(f"points must be a mapping such as {{0: 0.0, 1000: 0.9}}, got {self.points!r}.") from None
        if not points:
            raise ValueError(f"points must be a mapping such as {{0: 0.0, 1000: 0.9}}, got {self.points!r}.")
        for step, momentum in points.items():
            check_period("the step of a point", step, least=0)
            check_momentum(f"the momentum at step {step}", momentum)
        object.__setattr__(self, "points", points)

    def at(self, step: int) -> float:
        """The momentum after an optimizer step, counted from 1."""
        steps = list(self.points)
        if step <= steps[0] or step >= steps[-1]:
            return self.points[steps[0] if step <= steps[0] else steps[-1]]
        low, high = next((low, high) for low, high in pairwise(steps) if step <= high)
        share = (step - low) / (high - low)
        return (1 - share) * self.points[low] + share * self.points[high]


def check_momentum_or_ramp(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is a number in [0, 1), or a :class:`Ramp` of such numbers."""
    if not isinstance(value, Ramp):
        check_momentum(name, value)


def momentum_at(value: float | Ramp, step: int) -> float:
    """The momentum after an optimizer step."""
    return value.at(step) if isinstance(value, Ramp) else value
