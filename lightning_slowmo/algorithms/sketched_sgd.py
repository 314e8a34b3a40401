"""SketchedSGD: a count-sketch of the gradients shows where the largest elements are, and these alone are exchanged.

Ivkin, Rothchild, Ullah, Braverman, Stoica, Arora, "Communication-efficient Distributed SGD with Sketching", 2019,
https://arxiv.org/abs/1903.04488, the listing of its experiments. With g_i the gradient of worker i, u_i its momentum,
v_i what it has not applied yet (the error), S a count-sketch, and P k candidates for the k elements that move::

    (1)  u_i = momentum u_i + g_i                                   momentum
    (2)  v_i = v_i + u_i                                            error accumulation
    (3)  candidates = the P k largest elements of sum_i S(v_i)      S is linear: this is S(sum_i v_i)
    (4)  g~ = the k largest elements of mean_i v_i[candidates]      exact values, a second exchange
    (5)  u_i = v_i = 0 where g~ is not 0                            momentum factor masking, and error feedback
    (6)  w = w - lr g~                                              the step of the user's SGD

``docs/compressed_sync.md`` lists which details are choices of ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_slowmo import traffic
from lightning_slowmo.algorithms.base import Algorithm, Running, check_momentum, check_period
from lightning_slowmo.algorithms.sparse_gradients import (
    RunningSparseSGD,
    amount,
    check_amount,
    dense_sync,
)
from lightning_slowmo.averaging.averager import copy_state
from lightning_slowmo.averaging.mean import average_tensors
from lightning_slowmo.communication.meeting import Round
from lightning_slowmo.communication.pipeline import complete
from lightning_slowmo.communication.workers import Workers
from lightning_slowmo.compression import CountSketch
from lightning_slowmo.compression.hashing import mix
from lightning_slowmo.compression.sparsify import top_indices
from lightning_slowmo.parameters import Layout


@dataclass(frozen=True)
class SketchedSGD(Algorithm):
    """Exchange the largest elements of the accumulated gradients at every step; a count-sketch says where they are.

    Args:
        k: elements of the model that move in a step: a number, or a share of the model as a float in (0, 1].
        rows: rows of the sketch, odd.
        columns: cells in a row: a number, or a share of the model as a float in (0, 1].
        candidates: the paper's P: exact values of P times ``k`` elements are exchanged, and the ``k`` largest move.
            With 1, the sketch alone decides which ones move.
        momentum: of the algorithm, in place of the optimizer's own.
        momentum_masking: whether momentum is set to zero where an element has moved (momentum factor masking), so that
            a gradient that has been applied does not go on acting through it.
        uncompressed_below: tensors with fewer elements are all-reduced uncompressed, with momentum.
        seed: of the sketch's hash functions, of which there are new ones at every step.

    Raises:
        ValueError: if an argument is out of its range. :meth:`bind` raises it unless the optimizer is SGD without
            momentum.

    Example::

        Trainer(strategy=SlowMoStrategy(SketchedSGD(k=0.005, columns=0.01)))    # over SGD(momentum=0)
    """

    k: int | float = 0.02
    rows: int = 5
    columns: int | float = 0.02
    candidates: int = 2
    momentum: float = 0.9
    momentum_masking: bool = True
    uncompressed_below: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        check_amount("k", self.k)
        check_period("rows", self.rows)
        if self.rows % 2 == 0:
            raise ValueError(f"rows must be odd, for the estimate is a median; got {self.rows}.")
        check_amount("columns", self.columns)
        check_period("candidates", self.candidates)
        check_momentum("momentum", self.momentum)
        check_period("uncompressed_below", self.uncompressed_below, least=0)

    def bind(self, optimizer: Optimizer, workers: Workers) -> Running:
        """Make the running state for one optimizer."""
        return RunningSketchedSGD(self, optimizer, workers)

    def kept(self, length: int) -> int:
        """How many elements of a vector of ``length`` move in a step, the paper's k."""
        return amount(self.k, length)

    def asked(self, length: int) -> int:
        """How many elements are candidates, the paper's P k; if it is all of them, no sketch is made."""
        return min(length, self.candidates * self.kept(length))

    def sketch(self, length: int, step: int, run: int = 0) -> CountSketch:
        """The sketch of a vector of ``length`` elements at a step, the same on all workers."""
        return CountSketch(self.rows, amount(self.columns, length), mix(self.seed, step, run))

    def syncs(self, layout: Layout, workers: int) -> list[traffic.Sync]:
        """At every step: small tensors, and for each run of large ones a sketch and the candidates' values."""
        dense, large = dense_sync(layout, workers, self.uncompressed_below)
        parts = [dense]
        for run in large.runs:
            numel, size = run.numel, run.dtype.itemsize
            asked = self.asked(numel)
            values = traffic.tensor_sum(asked, size, workers)
            parts.append(replace(values, handled=traffic.TWICE * numel))  # momentum and residual
            if asked < numel:
                sketch = self.sketch(numel, 0)
                table = traffic.tensor_sum(sketch.rows * sketch.columns, size, workers)
                parts.append(replace(table, compressed=numel, decompressed=numel, compressor=CountSketch()))
        return [replace(traffic.together(1, *parts), gradients=True)]

    def state_numel(self, layout: Layout, workers: int) -> float:
        """Momentum of all tensors, and of the large ones what has not been applied."""
        _, large = traffic.split_by_size(layout, self.uncompressed_below)
        return layout.numel + large.numel


class RunningSketchedSGD(RunningSparseSGD):
    """SketchedSGD at work.

    Attributes:
        momentum: u_i of this worker, one flat tensor per run of ``large``.
        residual: v_i of this worker, likewise.
    """

    def _allocate(self) -> None:
        self.momentum, self.residual = self.large.zeros(), self.large.zeros()

    def _move(self, large: Layout) -> None:
        old, buffers = self.large, (self.momentum, self.residual)
        self.large = large
        self._allocate()
        for source, target in zip(buffers, (self.momentum, self.residual), strict=True):
            large.carry(old, source, target)

    def _exchange(self, used: Layout, gradients: list[Tensor], round: Round) -> list[Tensor]:
        if used is self.large:
            return self._exchange_runs(self.momentum, self.residual, gradients, round)
        momentum, residual = used.zeros(), used.zeros()
        used.carry(self.large, self.momentum, momentum)
        used.carry(self.large, self.residual, residual)
        update = self._exchange_runs(momentum, residual, gradients, round)
        self.large.carry(used, momentum, self.momentum)
        self.large.carry(used, residual, self.residual)
        return update

    def _exchange_runs(
        self, momentum: list[Tensor], residual: list[Tensor], gradients: list[Tensor], round: Round
    ) -> list[Tensor]:
        config, mine = self.config, round.present[self.workers.rank]
        weights, updates = [float(present) for present in round.present], []
        for run, (u, v, gradient) in enumerate(zip(momentum, residual, gradients, strict=True)):
            if mine:
                v.add_(u.mul_(config.momentum).add_(gradient))  # (1), (2)
            candidates = self._candidates(v, run, weights)  # (3)
            means = v.index_select(0, candidates)
            means.div_(complete(self.workers.sum(means, weights)))  # (4): the exact values
            chosen = top_indices(means, config.kept(v.numel()))  # (4): the k largest
            places = candidates.index_select(0, chosen)
            if mine:
                v.index_fill_(0, places, 0)  # (5)
                if config.momentum_masking:
                    u.index_fill_(0, places, 0)  # (5)
            updates.append(gradient.zero_().index_copy_(0, places, means.index_select(0, chosen)))
        return updates

    def _candidates(self, v: Tensor, run: int, weights: list[float]) -> Tensor:
        """Equation (3): where the sum of the sketches shows the largest elements.

        All workers have the same bits of the sum, so they find the same places, and no indices are sent.
        """
        length = v.numel()
        asked = self.config.asked(length)
        if asked == length:
            return torch.arange(length, device=v.device)
        sketch = self.config.sketch(length, self.steps, run)
        table = sketch.sketch(v)
        complete(self.workers.sum(table.view(-1), weights))
        return sketch.heavy_hitters(table, length, asked)[0]

    # State ------------------------------------------------------------------------------------------------------------

    def shared_state(self) -> dict[str, Any]:
        """The number of exchanges, and the means of momentum and residual, for another number of workers to go on with.

        All workers must call this.
        """
        means = [buffer.clone() for buffer in (*self.momentum, *self.residual)]
        average_tensors(means, self.workers)
        runs = len(self.momentum)
        return super().shared_state() | {
            "momentum": self.large.per_parameter(means[:runs]),
            "residual": self.large.per_parameter(means[runs:]),
        }

    def local_state(self) -> dict[str, Any]:
        """This worker's momentum and residual."""
        return super().local_state() | {
            "momentum": self.large.per_parameter(self.momentum),
            "residual": self.large.per_parameter(self.residual),
        }

    def load_shared_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`shared_state` returned: every worker begins with the means."""
        super().load_shared_state(state)
        self._load(state)

    def load_local_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`local_state` returned."""
        super().load_local_state(state)
        self._load(state)

    def _load(self, state: dict[str, Any]) -> None:
        for name in ("momentum", "residual"):
            copy_state(self.large.per_parameter(getattr(self, name)), state[name], name)
