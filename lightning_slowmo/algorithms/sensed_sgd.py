"""SensedSGD: random measurements of the gradients add up, and a sparse gradient is recovered from their mean.

Tang, Ramanathan, Zhang, Li, "Communication-Efficient Distributed SGD with Compressed Sensing", 2021,
https://arxiv.org/abs/2112.07836. With g_i the gradient of worker i, Phi a sensing matrix, and u and v the momentum and
the error, of measurements, at the server::

    (1)  y = mean_i Phi g_i                 measurements, which are linear: this is Phi mean_i g_i
    (2)  u = momentum u + y                 momentum
    (3)  v = v + u                          error accumulation
    (4)  g~ = the sparse vector whose measurements are nearest to v, by iterative hard thresholding
    (5)  v = v - Phi g~                     error feedback: what g~ does not explain
    (6)  w = w - lr g~                      the step of the user's SGD

``docs/compressed_sync.md`` lists which details are choices of ours.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_slowmo import traffic
from lightning_slowmo.algorithms.base import Algorithm, Running, check_momentum, check_period
from lightning_slowmo.algorithms.sparse_gradients import (
    RunningSparseSGD,
    amount,
    check_share,
    dense_sync,
)
from lightning_slowmo.communication.meeting import Round
from lightning_slowmo.communication.pipeline import complete
from lightning_slowmo.communication.workers import Workers
from lightning_slowmo.compression import Recovery, Sensing
from lightning_slowmo.compression.hashing import mix
from lightning_slowmo.compression.indices import decode_indices, encode_indices, index_bytes
from lightning_slowmo.parameters import Layout, accumulation_dtype

TRANSFORM = 4
"""Work of one transform on an element, in units of a plain sync's (additions in the cache)."""


@dataclass(frozen=True)
class SensedSGD(Algorithm):
    """Exchange random measurements of the gradients at every step, and recover a sparse one from their mean.

    The paper's server is divided among the workers: gradients are cut into blocks, and each worker is the server of
    some blocks. It keeps their momentum and error, recovers them, and sends the result to all. Both are kept as
    measurements, so no worker holds a buffer as large as the model.

    Args:
        measurements: share of the model's size that is measured, in (0, 1].
        sparsity: share of the elements that move in a step, in (0, 1]; a fifth of ``measurements`` is a good choice.
        iterations: improvements of the recovered vector, each of which costs seven transforms.
        momentum: of the algorithm, in place of the optimizer's own.
        block: length of the blocks that are measured, a power of two.
        uncompressed_below: tensors with fewer elements are all-reduced uncompressed, with momentum.
        seed: of the sensing matrix, which is the same at all steps.

    Raises:
        ValueError: if an argument is out of its range. :meth:`bind` raises it unless the optimizer is SGD without
            momentum.

    Example::

        Trainer(strategy=SlowMoStrategy(SensedSGD(measurements=0.2, sparsity=0.04)))    # over SGD(momentum=0)
    """

    measurements: float = 0.1
    sparsity: float = 0.02
    iterations: int = 3
    momentum: float = 0.9
    block: int = 4096
    uncompressed_below: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        check_share("measurements", self.measurements)
        check_share("sparsity", self.sparsity)
        check_period("iterations", self.iterations, least=0)
        check_momentum("momentum", self.momentum)
        check_period("block", self.block)
        self.sensing()
        check_period("uncompressed_below", self.uncompressed_below, least=0)

    def bind(self, optimizer: Optimizer, workers: Workers) -> Running:
        """Make the running state for one optimizer."""
        return RunningSensedSGD(self, optimizer, workers)

    def sensing(self, run: int = 0) -> Sensing:
        """The sensing matrix, the same on all workers."""
        return Sensing(self.measurements, self.block, mix(self.seed, run))

    def kept(self, length: int) -> int:
        """How many elements move in a step in each block of a vector of ``length``."""
        return amount(self.sparsity, self.sensing().height(length))

    def syncs(self, layout: Layout, workers: int) -> list[traffic.Sync]:
        """At every step: small tensors, and for each run of large ones measurements and what was recovered."""
        dense, large = dense_sync(layout, workers, self.uncompressed_below)
        parts = [dense]
        for run in large.runs:
            rows, width = self._own_shape(run.numel, workers)
            height, size = self.sensing().height(run.numel), run.dtype.itemsize
            found = width * self.kept(run.numel)
            payload = found * size + index_bytes(height * width, found)
            sent = (workers - 1) * (rows * width * size + payload)
            transforms = 1 + (7 * self.iterations + 2) / workers  # to measure everything, and to recover a share
            handled = round(TRANSFORM * transforms * run.numel)
            parts.append(traffic.Sync(1, sent, sent, 2 * (workers - 1), handled=handled))
        return [replace(traffic.together(1, *parts), gradients=True)]

    def state_numel(self, layout: Layout, workers: int) -> float:
        """Momentum of small tensors, and measurements of the momentum and the error of its blocks."""
        small, large = traffic.split_by_size(layout, self.uncompressed_below)
        tables = (self._own_shape(run.numel, workers) for run in large.runs)
        return small.numel + sum(2 * rows * width for rows, width in tables)

    def _own_shape(self, length: int, workers: int) -> tuple[int, int]:
        """Measurements of a block, and blocks of one worker, of a vector of ``length`` elements."""
        rows, blocks = self.sensing().shape(length)
        return rows, -(-blocks // workers)


class RunningSensedSGD(RunningSparseSGD):
    """SensedSGD at work: this worker is the server for some of the blocks.

    Attributes:
        momentum: u of its blocks, one table for each run of ``large``, with a row for each measurement and a column for
            each block.
        residual: v of its blocks, likewise.
        inherited: after parameters have joined, the residual from before, measured with the matrices of the new layout:
            a table of all blocks for each run, to be summed over the workers. Added to the next messages, which bring
            it to the blocks' new servers; None when that is done.
    """

    def _allocate(self) -> None:
        self.momentum = [self._own(self._measurements(run)) for run in range(len(self.large.runs))]
        self.residual = [torch.zeros_like(table) for table in self.momentum]
        self.inherited: list[Tensor] | None = None

    def _measurements(self, run: int) -> Tensor:
        """A table of zeros with room for the measurements of all blocks of a run."""
        flat = self.large.runs[run]
        shape = self.config.sensing(run).shape(flat.numel)
        return torch.zeros(shape, dtype=accumulation_dtype(flat.dtype), device=flat.device)

    def _pieces(self, table: Tensor) -> Tensor:
        """A table of all blocks cut into one for each worker, by rank, with zeros where there are too few blocks."""
        rows, blocks = table.shape
        width = -(-blocks // self.workers.size)
        padded = torch.nn.functional.pad(table, (0, width * self.workers.size - blocks))
        return padded.view(rows, self.workers.size, width).transpose(0, 1).contiguous()

    def _own(self, table: Tensor) -> Tensor:
        """This worker's columns of a table of all blocks."""
        return self._pieces(table)[self.workers.rank].clone()

    def _whole(self, own: Tensor, blocks: int) -> Tensor:
        """The table of all blocks. All workers must call this."""
        pieces = own.new_empty(self.workers.size, *own.shape)
        complete(self.workers.gather_pieces(pieces.view(-1), own.view(-1)))
        return pieces.transpose(0, 1).reshape(own.shape[0], -1)[:, :blocks].contiguous()

    def _exchange(self, used: Layout, gradients: list[Tensor], round: Round) -> list[Tensor]:
        allowed: list[Tensor | None] = [None] * len(self.large.runs)
        if used is not self.large:  # a parameter that nobody used must not move: its elements may not be recovered
            some, gradients = gradients, self.large.zeros()
            self.large.carry(used, some, gradients)
            masks = self.large.zeros()
            self.large.carry(used, [torch.ones_like(flat) for flat in some], masks)
            allowed = [mask.bool() for mask in masks]
        weights = [float(present) for present in round.present]
        for run, (gradient, mask) in enumerate(zip(gradients, allowed, strict=True)):
            self._receive(run, gradient, weights)
            self._answer(run, gradient, mask)
        self.inherited = None
        if used is self.large:
            return gradients
        update = used.zeros()
        used.carry(self.large, gradients, update)
        return update

    def _receive(self, run: int, gradient: Tensor, weights: list[float]) -> None:
        """Equations (1) to (3): send measurements of all blocks to their servers, and update the own u and v."""
        message = self._pieces(self.config.sensing(run).measure(gradient))  # Phi g_i
        weight = self.workers.weigh(message, weights)
        if self.inherited is not None:
            message.add_(self._pieces(self.inherited[run]), alpha=weight)
        momentum, residual = self.momentum[run], self.residual[run]
        own = torch.empty_like(momentum)
        complete(self.workers.scatter_sum(message.view(-1), own.view(-1)))
        mean = own.div_(weight)  # (1)
        residual.add_(momentum.mul_(self.config.momentum).add_(mean))  # (2), (3)

    def _answer(self, run: int, gradient: Tensor, mask: Tensor | None) -> None:
        """Equations (4) and (5): recover the own blocks, and overwrite the gradient with g~ of all servers."""
        sensing, residual, length = self.config.sensing(run), self.residual[run], gradient.numel()
        width, blocks, height = residual.shape[1], sensing.shape(length)[1], sensing.height(length)
        found = sensing.recover(  # (4)
            residual, length, self.config.kept(length), self.config.iterations, self.workers.rank * width, mask
        )
        residual.copy_(found.rest)  # (5)
        payload = self._packed(found, height)
        payloads = payload.new_empty(self.workers.size, payload.numel())
        complete(self.workers.gather_pieces(payloads.view(-1), payload))
        whole = torch.zeros(height * blocks, dtype=gradient.dtype, device=gradient.device)
        for rank, bits in enumerate(payloads):
            places, values = self._unpacked(bits, found, height)
            block = places % width + rank * width
            inside = block < blocks
            whole[(places // width * blocks + block)[inside]] = values[inside]
        gradient.copy_(whole[:length])

    def _packed(self, found: Recovery, height: int) -> Tensor:
        """Values and positions as bytes, the same number on every worker."""
        kept, width = found.positions.shape
        places, order = (found.positions * width + torch.arange(width, device=found.positions.device)).view(-1).sort()
        values = found.values.view(-1).index_select(0, order).view(torch.uint8)
        code = values.new_empty(index_bytes(height * width, kept * width))
        encode_indices(places, height * width, code)
        return torch.cat([values, code])

    def _unpacked(self, payload: Tensor, like: Recovery, height: int) -> tuple[Tensor, Tensor]:
        """What :meth:`_packed` packed: positions row by row in the server's blocks, and values."""
        count, width = like.positions.numel(), like.positions.shape[1]
        values, code = payload.split([count * like.values.element_size(), index_bytes(height * width, count)])
        return decode_indices(code.clone(), height * width, count), values.clone().view(like.values.dtype)

    def _move(self, large: Layout) -> None:
        """Carry the residuals over to another layout; momentum starts from zero.

        Blocks of the new layout have other elements. So each server turns its residual back into a vector, carries that
        over, and measures it with the new matrices: that is :attr:`inherited`.
        """
        residual = self.large.zeros()
        for run, (flat, own) in enumerate(zip(residual, self.residual, strict=True)):
            table = self._measurements(run)
            first = self.workers.rank * own.shape[1]
            mine = table[:, first : first + own.shape[1]]
            mine.copy_(own[:, : mine.shape[1]])
            if self.inherited is not None:
                table.add_(self.inherited[run])
            flat.copy_(self.config.sensing(run).adjoint(table, flat.numel()))
        old, self.large = self.large, large
        self._allocate()
        carried = large.zeros()
        large.carry(old, residual, carried)
        self.inherited = [self.config.sensing(run).measure(flat) for run, flat in enumerate(carried)]

    # State ------------------------------------------------------------------------------------------------------------

    def shared_state(self) -> dict[str, Any]:
        """Momentum and residual of all blocks, gathered from all servers. All workers must call this."""
        state: dict[str, Any] = {"sensing": [], "momentum": [], "residual": []}
        for run, flat in enumerate(self.large.runs):
            sensing = self.config.sensing(run)
            blocks = sensing.shape(flat.numel)[1]
            residual = self._whole(self.residual[run], blocks)
            if self.inherited is not None:
                inherited = self.inherited[run].clone()
                complete(self.workers.sum(inherited.view(-1)))
                residual.add_(inherited)
            state["sensing"].append(asdict(sensing) | {"length": flat.numel})
            state["momentum"].append(self._whole(self.momentum[run], blocks))
            state["residual"].append(residual)
        return super().shared_state() | state

    def load_shared_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`shared_state` returned; measurements of another matrix are converted to this one's."""
        lengths = [made["length"] for made in state["sensing"]]
        if lengths != [run.numel for run in self.large.runs]:
            raise ValueError(
                f"The checkpoint has measurements of {lengths} elements, but the optimizer has parameters of "
                f"{[run.numel for run in self.large.runs]}; is it the same model, with the same uncompressed_below?"
            )
        super().load_shared_state(state)
        self.inherited = None
        for run, made in enumerate(state["sensing"]):
            length = made["length"]
            old = Sensing(**{name: value for name, value in made.items() if name != "length"})
            new = self.config.sensing(run)
            for name in ("momentum", "residual"):
                own = getattr(self, name)[run]
                table = state[name][run].to(own.device)
                own.copy_(self._own(table if old == new else new.measure(old.adjoint(table, length))))
