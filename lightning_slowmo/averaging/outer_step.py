"""An outer step on its way into an average: the rule, its numbers, and the slow state that it moves.

The rule is a function of tensors made of the three operations in :mod:`lightning_slowmo.arithmetic`. On a CPU it is
called block by block. On a GPU its operations are traced, and one kernel makes them all in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_slowmo.averaging.kernels import available
from lightning_slowmo.averaging.kernels.trace import Trace, trace
from lightning_slowmo.parameters import Block, Bucket

if TYPE_CHECKING:
    from lightning_slowmo.averaging.drift import Drift
    from lightning_slowmo.averaging.kernels.table import Table

Rule = Callable[..., tuple[Tensor, Tensor]]
"""An outer rule, see :mod:`lightning_slowmo.algorithms.outer_loop`. The memory of what it is given may hold its
results."""

Scalars = dict[str, Any]
"""The numbers that a rule needs beside tensors."""


@dataclass(frozen=True)
class OuterStep:
    """Makes new parameters from sums over the workers, and moves anchor and momentum; a block may be moved once.

    Args:
        rule: makes the new anchor and momentum.
        scalars: the rule's numbers, by parameter group.
        anchor: the last common point, one flat tensor per run.
        momentum: the rule's, likewise.
    """

    rule: Rule
    scalars: Sequence[Scalars]
    anchor: list[Tensor]
    momentum: list[Tensor]

    def __call__(self, block: Block, total: Tensor, weight: float) -> None:
        """Move one block of the anchor, and overwrite the sum with it.

        Args:
            block: of anchor and momentum.
            total: the sum over the workers.
            weight: the sum of their weights.
        """
        anchor, momentum = block.of(self.anchor), block.of(self.momentum)
        if available(total.device) and anchor.device == total.device:
            from lightning_slowmo.averaging.kernels.table import move_flat

            traced = self._trace(block.group, weight)
            move_flat(total, weight, block.parameter_dtype, trace=traced, anchor=anchor, momentum=momentum)
            return
        here = total.to(anchor.device)  # total itself, unless slow state is offloaded
        self.rule(anchor, block.rounded(anchor), here, momentum, share=1 / weight, **self.scalars[block.group])
        total.copy_(anchor)

    def scatter(self, table: Table, bucket: Bucket, total: Tensor, weight: float, drift: Drift | None) -> None:
        """Move a bucket whose slow state is on the same GPU, and write the new values to the parameters.

        Args:
            table: of the bucket.
            bucket: of parameters, anchor and momentum.
            total: the sum over the workers.
            weight: the sum of their weights.
            drift: takes note of how far the parameters were from the mean.
        """
        traced = self._trace(bucket.group, weight)
        table.scatter(total, weight, drift, traced, bucket.of(self.anchor), bucket.of(self.momentum))

    def is_on(self, bucket: Bucket) -> bool:
        """Whether slow state lies where the parameters of a bucket do."""
        return self.anchor[bucket.run].device == bucket.device

    def _trace(self, group: int, weight: float) -> Trace:
        return trace(self.rule, self.scalars[group] | {"share": 1 / weight})
