"""AllReduce: gradients averaged at every step, as DistributedDataParallel does it.

The SlowMo paper's AR-SGD and AR-Adam, and a base for tests: it makes the models of all workers equal at all times.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.optim import Optimizer

from lightning_slowmo import traffic
from lightning_slowmo.algorithms.base import NOT_DUE, Algorithm, Round, Running, SyncReport
from lightning_slowmo.communication.collectives import average_tensors
from lightning_slowmo.communication.workers import Workers
from lightning_slowmo.parameters import Layout


@dataclass(frozen=True)
class AllReduce(Algorithm):
    """Average the gradients after every backward pass whose gradients are to be used."""

    def bind(self, optimizer: Optimizer, workers: Workers) -> Running:
        """Make the running state for one optimizer."""
        return RunningAllReduce(optimizer, workers)

    def syncs(self, layout: Layout, workers: int) -> list[traffic.Sync]:
        """At every step a header, which parameters have gradients, and the gradients."""
        used = traffic.header(workers, len(layout.parameters))
        mean = traffic.together(1, traffic.header(workers), used, traffic.all_reduce(layout, workers))
        return [replace(mean, gradients=True)]

    def state_numel(self, layout: Layout, workers: int) -> float:
        """Nothing."""
        return 0


class RunningAllReduce(Running):
    """Averaged gradients; the parameters then need no sync."""

    exchanges_gradients = True

    def after_step(self) -> None:
        """Nothing to count: a step is on common ground."""

    def due(self) -> int:
        """Never: equal gradients keep equal parameters equal."""
        return NOT_DUE

    def sync(self, round: Round) -> SyncReport:
        """Average the parameters, which a wrapper around this algorithm may ask for."""
        return SyncReport(drift=self.average(round))

    def sync_gradients(self, round: Round) -> None:
        """Average the gradients over the workers that came with some.

        A parameter that only some workers used counts as a gradient of 0 on the others, as in DDP; one that nobody
        used keeps None.
        """
        parameters = self.layout.parameters
        mine = round.present[self.workers.rank]
        used = [float(mine and parameter.grad is not None) for parameter in parameters]
        used_anywhere = [any(column) for column in zip(*self.workers.gather(used, "used parameters"), strict=True)]
        gradients = []
        for parameter, used_by_any in zip(parameters, used_anywhere, strict=True):
            if used_by_any:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        weights = [float(present) for present in round.present]
        average_tensors(gradients, self.workers, weights)
        self.pending = int(mine)

    def regroup(self, round: Round) -> None:
        """Workers whose inputs ended earlier have missed steps, and catch up with those who took them."""
        if len(set(round.pending)) > 1:
            self.average(round)
