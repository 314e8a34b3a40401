"""An outer step on its way into an average: the rule, its numbers, and the slow state that it moves.

The rule is a function of tensors made of the three operations in :mod:`lightning_slowmo.arithmetic`. On a CPU it is
called block by block. On a GPU its operations are traced, and one kernel makes them all in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_slowmo.averaging.kernels.trace import Trace, trace
from lightning_slowmo.averaging.offload import Lift
from lightning_slowmo.parameters import Block, Bucket
from lightning_slowmo.triton_support import works_on

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
        lifts: bring slow state that is in host memory to the device of a sum.
    """

    rule: Rule
    scalars: Sequence[Scalars]
    anchor: list[Tensor]
    momentum: list[Tensor]
    lifts: Mapping[torch.device, Lift] = field(default_factory=dict)

    def __call__(self, block: Block, total: Tensor, weight: float) -> None:
        """Move one block of the anchor, and overwrite the sum with it.

        Args:
            block: of anchor and momentum.
            total: the sum over the workers.
            weight: the sum of their weights.
        """
        anchor, momentum = block.of(self.anchor), block.of(self.momentum)
        if anchor.device == total.device:
            self._move(block, anchor, momentum, total, weight)
            return

        def move(start: int, stop: int, pieces: list[Tensor]) -> None:
            self._move(block, pieces[0], pieces[1], total[start:stop], weight)

        self.lifts[total.device].change([anchor, momentum], move)

    def _move(self, block: Block, anchor: Tensor, momentum: Tensor, total: Tensor, weight: float) -> None:
        """Move a piece of anchor and momentum that lies where the sum does."""
        if works_on(total.device):
            from lightning_slowmo.averaging.kernels.table import move_flat

            traced = self._trace(block.group, weight)
            move_flat(total, weight, block.parameter_dtype, trace=traced, anchor=anchor, momentum=momentum)
            return
        self.rule(anchor, block.rounded(anchor), total, momentum, share=1 / weight, **self.scalars[block.group])
        total.copy_(anchor)

    def state(self, bucket: Bucket, weight: float) -> dict[str, Any]:
        """What the kernels need to move a bucket whose slow state is on its device: arguments of ``Table.scatter``."""
        traced = self._trace(bucket.group, weight)
        return {"trace": traced, "anchor": bucket.of(self.anchor), "momentum": bucket.of(self.momentum)}

    def is_on(self, bucket: Bucket) -> bool:
        """Whether slow state lies where the parameters of a bucket do."""
        return self.anchor[bucket.run].device == bucket.device

    def _trace(self, group: int, weight: float) -> Trace:
        return trace(self.rule, self.scalars[group] | {"share": 1 / weight})
