"""AllReduce: gradients averaged at every step, as DistributedDataParallel does it.

The SlowMo paper's AR-SGD and AR-Adam, and a base for tests: it makes the models of all workers equal at all times.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_slowmo import traffic
from lightning_slowmo.algorithms.base import Algorithm, Running, Synced
from lightning_slowmo.averaging.mean import average
from lightning_slowmo.averaging.sparse import average_sparse
from lightning_slowmo.communication.meeting import Level, Round
from lightning_slowmo.communication.workers import Workers
from lightning_slowmo.parameters import Layout
from lightning_slowmo.storage import gradient

NO_GRADIENT, DENSE, SPARSE = 0.0, 1.0, 2.0
"""What workers tell one another of the gradient that they have of a parameter."""


@dataclass(frozen=True)
class AllReduce(Algorithm):
    """Average the gradients after every backward pass whose gradients are to be used."""

    elementwise = True

    def bind(self, optimizer: Optimizer, workers: Workers) -> Running:
        """Make the running state for one optimizer."""
        return RunningAllReduce(optimizer, workers)

    def syncs(self, layout: Layout, workers: int) -> list[traffic.Sync]:
        """At every step a header, which parameters have gradients, and the gradients, none of which is sparse."""
        used = traffic.header(workers, len(layout.parameters))
        mean = traffic.together(1, traffic.header(workers), used, traffic.all_reduce(layout, workers))
        return [replace(mean, gradients=True)]

    def state_numel(self, layout: Layout, workers: int) -> float:
        """Nothing."""
        return 0


class RunningAllReduce(Running):
    """Averaged gradients; the parameters then need no sync."""

    exchanges_gradients = True

    def __init__(self, optimizer: Optimizer, workers: Workers) -> None:
        super().__init__(optimizer, workers)
        self._gradient_layout: tuple[list[bool], Layout] | None = None

    def after_step(self) -> None:
        """Nothing to count: a step is on common ground."""

    def due(self) -> Level:
        """Never: equal gradients keep equal parameters equal."""
        return Level.NONE

    def sync(self, round: Round) -> Synced:
        """Average the parameters, which an outer loop may ask for."""
        synced = Synced(self.averager.average(round), agreed=True)
        self.pending = 0
        return synced

    def sync_gradients(self, round: Round) -> None:
        """Average the gradients over the workers that came with some.

        A parameter that only some workers used counts as a gradient of 0 on the others, as in DDP; one that nobody
        used keeps None. Gradients of sparse layout stay sparse, unless a worker has a dense one.
        """
        parameters, mine = self.layout.parameters, round.present[self.workers.rank]
        weights = [float(present) for present in round.present]
        own = [_kind(parameter) if mine else NO_GRADIENT for parameter in parameters]
        kinds = [set(column) for column in zip(*self.workers.gather(own, "used parameters"), strict=True)]
        sparse = [SPARSE in kind and DENSE not in kind for kind in kinds]
        used = [any(kind) and not is_sparse for kind, is_sparse in zip(kinds, sparse, strict=True)]
        layout = self._layout_of_gradients(parameters, used)
        average(layout.buckets, self.workers, self.averager.scratch, weights)
        with_sparse = [parameter for parameter, is_sparse in zip(parameters, sparse, strict=True) if is_sparse]
        if with_sparse:
            average_sparse(with_sparse, self.workers, weights)
        self.pending = int(mine)

    def _layout_of_gradients(self, parameters: list[Tensor], used: list[bool]) -> Layout:
        """How the gradients of the parameters in use lie in messages; made anew only when other ones are in use."""
        if self._gradient_layout is None or self._gradient_layout[0] != used:
            in_use = [parameter for parameter, is_used in zip(parameters, used, strict=True) if is_used]
            self._gradient_layout = used, Layout([in_use], self.workers.sizes, storage=gradient)
        return self._gradient_layout[1]

    def adopt_layout(self, layout: Layout) -> None:
        """Take over a new layout; that of gradients is made anew."""
        super().adopt_layout(layout)
        self._gradient_layout = None

    def catch_up(self, round: Round) -> None:
        """Workers whose inputs ended earlier have missed steps, and catch up with those who took them."""
        if len(set(round.pending)) > 1:
            self.averager.average(round)
            self.pending = 0


def _kind(parameter: Tensor) -> float:
    """What kind of gradient a parameter has on this worker."""
    if parameter.grad is None:
        return NO_GRADIENT
    return DENSE if parameter.grad.layout is torch.strided else SPARSE
