"""What the training loop and the tables have to know of a problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

Split = tuple[Tensor, ...]
"""Examples: tensors whose first dimension counts them, or workers and then their examples."""


@dataclass(frozen=True)
class Measure:
    """What a model is rated by.

    Attributes:
        name: of the figure, with its unit.
        digits: behind the point.
        lower: whether lower is better.
    """

    name: str
    digits: int
    lower: bool = False

    def merit(self, value: float | None) -> float:
        """A number that is higher if a value is better; minus infinity of a run that diverged.

        Example:
            >>> bits = Measure("bits per character", 3, lower=True)
            >>> bits.merit(2.5) > bits.merit(2.6) > bits.merit(None)
            True
        """
        if value is None:
            return float("-inf")
        return -value if self.lower else value


class Problem(Protocol):
    """Data and models. Those of all workers lie one after another in one tensor for each parameter."""

    @property
    def measure(self) -> Measure:
        """What :meth:`rating` returns."""

    @property
    def hidden(self) -> frozenset[int]:
        """Which parameters are matrices between hidden layers: those for Muon."""

    def data(self, held_out: bool) -> tuple[Split, Split]:
        """What is trained on, and what rates it: held-out examples of the training data, or the test data."""

    def initial(self, seed: int) -> list[Tensor]:
        """Parameters of one model."""

    def loss(self, values: Sequence[Tensor], examples: Split) -> Tensor:
        """Mean loss of each worker's model on its own examples, summed over workers.

        Args:
            values: parameters, [workers, ...].
            examples: [workers, examples, ...].
        """

    def rating(self, values: Sequence[Tensor], split: Split) -> float:
        """Of one model."""
