"""SketchedSGD and SensedSGD: gradients in linear sketches, which add up, and a sparse step that is common to all.

Ivkin, Rothchild, Ullah, Braverman, Stoica, Arora, "Communication-efficient Distributed SGD with Sketching", 2019,
https://arxiv.org/abs/1903.04488. With S a count-sketch, and u_i and v_i the momentum and the error of worker i::

    u_i = momentum u_i + g_i;    v_i = v_i + u_i;    candidates: the largest elements that sum_i S(v_i) shows
    g~ = the k largest of mean_i v_i among them;     u_i = v_i = 0 there;    w = w - lr g~

Tang, Ramanathan, Zhang, Li, "Communication-Efficient Distributed SGD with Compressed Sensing", 2021,
https://arxiv.org/abs/2112.07836. With Phi a sensing matrix, and u and v what the server has of measurements::

    u = momentum u + mean_i Phi g_i;    v = v + u;    g~ = the sparse vector of which v may be a measurement
    v = v - Phi g~;                     w = w - lr g~

In both the exchange replaces each worker's gradient by g~, the same bits on all, and the user's plain SGD takes the
step. ``docs/compressed_sync.md`` lists which details are choices of ours.
"""

from __future__ import annotations

import math
import weakref
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from lightning_slowmo.algorithms.all_reduce import RunningAllReduce
from lightning_slowmo.algorithms.base import (
    Algorithm,
    Round,
    Running,
    are_finite,
    check_momentum,
    check_period,
    copy_state,
)
from lightning_slowmo.communication.collectives import average_tensors
from lightning_slowmo.communication.workers import SyncError, Workers
from lightning_slowmo.compression import CountSketch, Recovery, Sensing
from lightning_slowmo.compression.hashing import mix
from lightning_slowmo.compression.indices import decode_indices, encode_indices, index_bytes
from lightning_slowmo.compression.sparsify import top_indices
from lightning_slowmo.parameters import Layout, accumulation_dtype


@dataclass(frozen=True)
class SketchedSGD(Algorithm):
    """Exchange the largest elements of the accumulated gradients at every step; a count-sketch says where they are.

    Args:
        k: elements of the model that move in a step: a number, or a share of the model as a float in (0, 1].
        rows: rows of the sketch, odd.
        columns: cells in a row: a number, or a share of the model as a float in (0, 1].
        candidates: for how many times ``k`` elements the exact values are asked, the paper's P. 1 trusts the sketch.
        momentum: of the algorithm, in place of the optimizer's own.
        momentum_masking: whether momentum is zeroed where an element has moved (momentum factor masking), so that it
            does not push on for a gradient that has long been applied.
        uncompressed_below: tensors with fewer elements are all-reduced uncompressed, with momentum.
        seed: of the sketch's hash functions, which are other ones at every step.

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
        _check_amount("k", self.k)
        check_period("rows", self.rows)
        if self.rows % 2 == 0:
            raise ValueError(f"rows must be odd, for the estimate is a median; got {self.rows}.")
        _check_amount("columns", self.columns)
        check_period("candidates", self.candidates)
        check_momentum("momentum", self.momentum)
        check_period("uncompressed_below", self.uncompressed_below, least=0)

    def bind(self, optimizer: Optimizer, workers: Workers) -> Running:
        """Make the running state for one optimizer."""
        return RunningSketchedSGD(self, optimizer, workers)

    def kept(self, length: int) -> int:
        """Elements that move of a vector of ``length``."""
        return _amount(self.k, length)

    def asked(self, length: int) -> int:
        """Elements of which exact values are exchanged; if it is all of them, there is no sketch."""
        return min(length, self.candidates * self.kept(length))

    def sketch(self, length: int, step: int, run: int = 0) -> CountSketch:
        """The sketch of a vector of ``length`` elements at a step, the same on all workers."""
        return CountSketch(self.rows, _amount(self.columns, length), mix(self.seed, step, run))


@dataclass(frozen=True)
class SensedSGD(Algorithm):
    """Exchange random measurements of the gradients at every step, and recover a sparse one from their mean.

    The server is spread over the workers: each recovers some blocks and sends what it found to all. Errors stay with
    the server, as measurements, so no worker holds a model-sized buffer.

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
        _check_share("measurements", self.measurements)
        _check_share("sparsity", self.sparsity)
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
        """Elements that move in each block of a vector of ``length``."""
        return _amount(self.sparsity, self.sensing().height(length))


def _check_amount(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is a number of elements or a share."""
    if isinstance(value, float):
        _check_share(name, value)
    else:
        check_period(name, value)


def _check_share(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ValueError(f"{name} must be a share in (0, 1], got {value!r}.")


def _amount(value: int | float, length: int) -> int:
    """A number of elements, at most ``length``, from one or from a share."""
    return min(length, math.ceil(value * length)) if isinstance(value, float) else min(length, value)


class RunningSparseSGD(RunningAllReduce):
    """What both have in common: which gradients are new, and what is done with small tensors and infinities.

    Attributes:
        small: the tensors that are all-reduced uncompressed.
        small_momentum: their momentum, equal on all workers, one flat tensor per run.
        large: the others; one run for each type and device.
        steps: exchanges so far.
    """

    def __init__(self, config: SketchedSGD | SensedSGD, optimizer: Optimizer, workers: Workers) -> None:
        _check_plain_sgd(optimizer, type(config).__name__)
        super().__init__(optimizer, workers)
        self.config: Any = config
        self.steps = 0
        self.exchanged = Exchanged()
        self.small, self.large = self._split(self.layout)
        self.small_momentum = self.small.zeros()
        self._allocate()

    def _split(self, layout: Layout) -> tuple[Layout, Layout]:
        least = self.config.uncompressed_below
        small = [p for p in layout.parameters if p.numel() < least]
        return Layout([small]), Layout([[p for p in layout.parameters if p.numel() >= least]])

    @abstractmethod
    def _allocate(self) -> None:
        """Make buffers for :attr:`large`, of zeros."""

    @abstractmethod
    def _exchange(self, used: Layout, gradients: list[Tensor], round: Round) -> list[Tensor]:
        """Exchange gradients of large tensors.

        Args:
            used: those of which some worker has a gradient; :attr:`large` itself if all have.
            gradients: this worker's, laid out like ``used``; zeros if it has none.
            round: the circumstances.

        Returns:
            The common gradient in the same layout.
        """

    def after_step(self) -> None:
        """The next gradients are new ones."""
        self.exchanged.take_note(self.layout.parameters, stepped=True)

    @torch.no_grad()
    def sync_gradients(self, round: Round) -> None:
        """Replace the gradients by the common sparse one on the workers that came with some.

        A parameter that only some workers used counts as a gradient of 0 on the others; one that nobody used keeps
        None. If a gradient scaler is at work and any worker's gradients are not finite, they become NaN on all, so that
        all skip the step, and nothing else changes.

        Raises:
            SyncError: on all workers, if gradients are not finite and there is no scaler, or if gradients have been
                added to exchanged ones.
        """
        parameters, mine = self.layout.parameters, round.present[self.workers.rank]
        fresh = [mine and self.exchanged.is_new(p) for p in parameters]
        own = [p.grad for p, new in zip(parameters, fresh, strict=True) if new and p.grad is not None]
        broken, scaled = not are_finite(own), self.loss_scale is not None
        mixed = any(new and self.exchanged.was_added_to(p) for p, new in zip(parameters, fresh, strict=True))
        rows = self.workers.gather([broken, broken and not scaled, mixed, *fresh], "used parameters")
        all_broken, unscaled, all_mixed, *columns = zip(*rows, strict=True)
        self._refuse(unscaled, "gradients are NaN or infinite. Lower the learning rate, or clip gradients.")
        self._refuse(
            all_mixed,
            "gradients were added to such as had been exchanged already. Exchange once for each step: with manual "
            "optimization, accumulate inside `with trainer.strategy.block_backward_sync():`.",
        )
        used = [p for p, column in zip(parameters, columns, strict=True) if any(column)]
        if any(all_broken):
            self._write(used, [torch.full_like(p, math.nan) for p in used], mine)
        elif used:
            self._exchange_all(used, {id(p) for p, new in zip(parameters, fresh, strict=True) if new}, round)
            self.steps += 1
        if mine and used:
            self.exchanged.take_note(parameters)
        self.pending = int(mine)

    def _refuse(self, flags: Iterable[float], why: str) -> None:
        guilty = [name for name, flag in zip(self.workers.names, flags, strict=True) if flag]
        if guilty:
            raise SyncError(f"{type(self.config).__name__} cannot exchange gradients: on {', '.join(guilty)}, {why}")

    def _exchange_all(self, used: list[Tensor], fresh: set[int], round: Round) -> None:
        mine, weights = round.present[self.workers.rank], [float(present) for present in round.present]
        small, large = self._split(Layout([used]))
        if large.numel == self.large.numel:
            large = self.large
        gradients = self._gradients(large, fresh)
        update = self._exchange(large, gradients, round) if large.parameters else []
        self._write(large.parameters, large.per_parameter(update), mine)

        means = self._gradients(small, fresh)
        average_tensors(means, self.workers, weights)
        momentum = small.zeros()
        small.carry(self.small, self.small_momentum, momentum)
        for old, mean in zip(momentum, means, strict=True):
            old.mul_(self.config.momentum).add_(mean)
        self.small.carry(small, momentum, self.small_momentum)
        self._write(small.parameters, small.per_parameter(momentum), mine)

    def _gradients(self, layout: Layout, fresh: set[int]) -> list[Tensor]:
        """This worker's new gradients without the scaler's factor; zeros where there are none."""
        buffers = layout.zeros()
        for p, view in zip(layout.parameters, layout.per_parameter(buffers), strict=True):
            if id(p) in fresh and p.grad is not None:
                view.copy_(p.grad).div_(self.loss_scale or 1.0)
        return buffers

    def _write(self, parameters: Sequence[Tensor], values: Sequence[Tensor], mine: bool) -> None:
        """Let these be the gradients, times the scaler's factor; a worker that merely helps keeps its own."""
        for p, value in zip(parameters, values, strict=True) if mine else ():
            if p.grad is None:
                p.grad = torch.empty_like(p)
            p.grad.copy_(value).mul_(self.loss_scale or 1.0)

    def relayout(self, layout: Layout) -> None:
        """Take over a new layout."""
        _check_plain_sgd(self.optimizer, type(self.config).__name__)
        old, momentum = self.small, self.small_momentum
        self.small, large = self._split(layout)
        self.small_momentum = self.small.zeros()
        self.small.carry(old, momentum, self.small_momentum)
        if not large.covers([self.large.parameters]):
            self._move(large)
        super().relayout(layout)

    @abstractmethod
    def _move(self, large: Layout) -> None:
        """Carry the buffers of :attr:`large` over to a new one."""

    def shared_state(self) -> dict[str, Any]:
        """The number of exchanges, and the momentum of small tensors."""
        return {"steps": self.steps, "small_momentum": self.small.per_parameter(self.small_momentum)}

    def load_shared_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`shared_state` returned."""
        self.steps = state["steps"]
        copy_state(self.small.per_parameter(self.small_momentum), state["small_momentum"], "momentum")


class RunningSketchedSGD(RunningSparseSGD):
    """SketchedSGD at work.

    Attributes:
        momentum: u of this worker, one flat tensor per run of ``large``.
        residual: v of this worker, what has not been applied yet.
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
                v.add_(u.mul_(config.momentum).add_(gradient))
            candidates = self._candidates(v, run, weights)
            values = self.workers.sum(v.index_select(0, candidates), weights)
            means = values.wait().div_(values.weight)
            chosen = top_indices(means, config.kept(v.numel()))
            places = candidates.index_select(0, chosen)
            if mine:
                v.index_fill_(0, places, 0)
                if config.momentum_masking:
                    u.index_fill_(0, places, 0)
            updates.append(gradient.zero_().index_copy_(0, places, means.index_select(0, chosen)))
        return updates

    def _candidates(self, v: Tensor, run: int, weights: list[float]) -> Tensor:
        """Where the sum of the sketches shows the largest elements; equal bits give equal places on all workers."""
        length = v.numel()
        asked = self.config.asked(length)
        if asked == length:
            return torch.arange(length, device=v.device)
        sketch = self.config.sketch(length, self.steps, run)
        table = sketch.sketch(v)
        self.workers.sum(table.view(-1), weights).wait()
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


class RunningSensedSGD(RunningSparseSGD):
    """SensedSGD at work: this worker is the server for some of the blocks.

    Attributes:
        momentum: u of its blocks, a table for each run of ``large``: a row for each measurement, a column a block.
        residual: v of its blocks, likewise.
        inherited: measurements of all blocks, whose sum over the workers is a part of the residual that no server has
            yet; None if there is no such part.
    """

    def _allocate(self) -> None:
        self.momentum = [self._own(self._measurements(run)) for run in range(len(self.large.runs))]
        self.residual = [torch.zeros_like(table) for table in self.momentum]
        self.inherited: list[Tensor] | None = None

    def _measurements(self, run: int) -> Tensor:
        """A table of zeros for all blocks of a run."""
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
        return self._pieces(table)[self.workers.rank].clone()

    def _whole(self, own: Tensor, blocks: int) -> Tensor:
        """The table of all blocks. All workers must call this."""
        pieces = own.new_empty(self.workers.size, *own.shape)
        self.workers.gather_pieces(pieces.view(-1), own.view(-1))
        return pieces.transpose(0, 1).reshape(own.shape[0], -1)[:, :blocks].contiguous()

    def _exchange(self, used: Layout, gradients: list[Tensor], round: Round) -> list[Tensor]:
        allowed: list[Tensor | None] = [None] * len(self.large.runs)
        if used is not self.large:  # a parameter that nobody used must not move
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
        """Send the measurements of all blocks to their servers, and take in the mean of what came."""
        message = self._pieces(self.config.sensing(run).measure(gradient))
        weight = self.workers.weigh(message, weights)
        if self.inherited is not None:
            message.add_(self._pieces(self.inherited[run]), alpha=weight)
        momentum, residual = self.momentum[run], self.residual[run]
        own = torch.empty_like(momentum)
        self.workers.scatter_sum(message.view(-1), own.view(-1))
        residual.add_(momentum.mul_(self.config.momentum).add_(own.div_(weight)))

    def _answer(self, run: int, gradient: Tensor, mask: Tensor | None) -> None:
        """Recover the own blocks, and overwrite the gradient with what all servers have recovered."""
        sensing, residual, length = self.config.sensing(run), self.residual[run], gradient.numel()
        width, blocks, height = residual.shape[1], sensing.shape(length)[1], sensing.height(length)
        found = sensing.recover(
            residual, length, self.config.kept(length), self.config.iterations, self.workers.rank * width, mask
        )
        residual.copy_(found.rest)
        payload = self._packed(found, height)
        payloads = payload.new_empty(self.workers.size, payload.numel())
        self.workers.gather_pieces(payloads.view(-1), payload)
        whole = torch.zeros(height * blocks, dtype=gradient.dtype, device=gradient.device)
        for rank, bits in enumerate(payloads):
            places, values = self._unpacked(bits, found, height)
            block = places % width + rank * width
            inside = block < blocks
            whole[(places // width * blocks + block)[inside]] = values[inside]
        gradient.copy_(whole[:length])

    def _packed(self, found: Recovery, height: int) -> Tensor:
        """Values and places as bytes, as many for every worker."""
        kept, width = found.positions.shape
        places, order = (found.positions * width + torch.arange(width, device=found.positions.device)).view(-1).sort()
        values = found.values.view(-1).index_select(0, order).view(torch.uint8)
        code = values.new_empty(index_bytes(height * width, kept * width))
        encode_indices(places, height * width, code)
        return torch.cat([values, code])

    def _unpacked(self, payload: Tensor, like: Recovery, height: int) -> tuple[Tensor, Tensor]:
        """Places, row by row in the server's blocks, and values."""
        count, width = like.positions.numel(), like.positions.shape[1]
        values, code = payload.split([count * like.values.element_size(), index_bytes(height * width, count)])
        return decode_indices(code.clone(), height * width, count), values.clone().view(like.values.dtype)

    def _move(self, large: Layout) -> None:
        """The servers' residuals become messages of measurements by the new matrix; momentum begins anew."""
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
        """What all servers have. All workers must call this."""
        state: dict[str, Any] = {"sensing": [], "momentum": [], "residual": []}
        for run, flat in enumerate(self.large.runs):
            sensing = self.config.sensing(run)
            blocks = sensing.shape(flat.numel)[1]
            residual = self._whole(self.residual[run], blocks)
            if self.inherited is not None:
                inherited = self.inherited[run].clone()
                residual.add_(self.workers.sum(inherited.view(-1)).wait().view_as(inherited))
            state["sensing"].append(asdict(sensing) | {"length": flat.numel})
            state["momentum"].append(self._whole(self.momentum[run], blocks))
            state["residual"].append(residual)
        return super().shared_state() | state

    def load_shared_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`shared_state` returned; what another matrix measured is measured anew."""
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


class Exchanged:
    """Remembers which gradients have been exchanged, to tell them from new ones.

    A backward pass of one optimizer's loss leaves the gradients of the others as they are. Were they exchanged once
    more, they would count twice.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._stepped = True

    def take_note(self, parameters: Iterable[Tensor], stepped: bool = False) -> None:
        """Remember the present gradients, and whether the optimizer has made its step with them."""
        self._known = {id(p): (weakref.ref(p.grad), p.grad._version) for p in parameters if p.grad is not None}
        self._stepped = stepped

    def is_new(self, parameter: Tensor) -> bool:
        """Whether there is a gradient that was not there, or not as it is now."""
        gradient, known = parameter.grad, self._known.get(id(parameter))
        if gradient is None or known is None:
            return gradient is not None
        return known[0]() is not gradient or known[1] != gradient._version

    def was_added_to(self, parameter: Tensor) -> bool:
        """Whether a gradient that was exchanged for a step still to come has been changed."""
        known = self._known.get(id(parameter))
        return not self._stepped and known is not None and known[0]() is parameter.grad and self.is_new(parameter)


def _check_plain_sgd(optimizer: Optimizer, name: str) -> None:
    """Raise ValueError unless the optimizer steps along the gradient that it is given."""
    momenta = {group.get("momentum", 0) for group in optimizer.param_groups}
    if not isinstance(optimizer, SGD) or momenta - {0}:
        found = type(optimizer).__name__ + (f" with momentum {max(momenta)}" if isinstance(optimizer, SGD) else "")
        raise ValueError(
            f"{name} keeps momentum itself and needs torch.optim.SGD without any, got {found}. Use "
            f"SGD(parameters, lr=...) and {name}(momentum=0.9)."
        )
