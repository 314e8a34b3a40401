"""Compressed sensing: few linear measurements of a vector, from which a sparse one can be recovered."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_slowmo.compression.base import compute_dtype
from lightning_slowmo.compression.hashing import hashed, mix
from lightning_slowmo.compression.segments import block_length

CORRECTIONS = 2
"""Steps in which the values of an estimate are corrected, at their places. With one only, some blocks never settle."""


class Recovery(NamedTuple):
    """A sparse vector that explains measurements: ``sparsity`` elements of each block.

    Attributes:
        positions: places in the blocks, int64 of shape (sparsity, blocks), different ones in each block.
        values: the elements there, some of which may be 0.
        rest: the measurements less those of the recovered vector.
    """

    positions: Tensor
    values: Tensor
    rest: Tensor


@dataclass(frozen=True)
class Sensing:
    r"""A sensing matrix with orthonormal rows that needs no memory, and recovery from its measurements.

    The vector is dealt out to blocks as cards are: of b blocks, block j has the elements j, j + b, j + 2b, ... So each
    has its share of every tensor, and about as many large elements as the others. All are measured by the same matrix
    :math:`\Phi = R H D`: random signs D, the orthonormal Walsh-Hadamard transform H, which consists of additions only,
    and R, a random choice of rows. All workers must share the seed.

    Args:
        measurements: share of the vector's length that is measured, in (0, 1]; at 1 the matrix is orthogonal.
        block: length of a block, a power of two; a shorter vector is one block. Longer ones recover better, at a cost
            that grows with their logarithm.
        seed: seed of signs and rows.

    Example:
        >>> sensing = Sensing(measurements=0.25)
        >>> x = torch.zeros(1000)
        >>> x[123] = 7.0
        >>> table = sensing.measure(x) + sensing.measure(x)
        >>> table.shape, sensing.recover(table, length=1000, sparsity=1).positions.item()
        (torch.Size([256, 1]), 123)

    References:
        Candes and Tao 2006; Do, Gan, Nguyen and Tran 2012 (arXiv 1106.5037), for structured matrices.
    """

    measurements: float = 0.1
    block: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.measurements <= 1:
            raise ValueError(f"measurements is {self.measurements}; it must be above 0 and at most 1")
        if self.block < 1 or self.block & (self.block - 1):
            raise ValueError(f"block is {self.block}; it must be a power of two")

    def height(self, length: int) -> int:
        """Elements in each block of a vector of ``length`` elements; the last ones of some may lie beyond its end."""
        return min(self.block, 1 << max(0, length - 1).bit_length())

    def shape(self, length: int) -> tuple[int, int]:
        """Measurements of each block, and number of blocks, of a vector of ``length`` elements."""
        height = self.height(length)
        return ceil(self.measurements * height), -(-length // height)

    def measure(self, flat: Tensor) -> Tensor:
        """Measure a vector; measurements add up, to rounding, as vectors do.

        Args:
            flat: 1-D float tensor.

        Returns:
            Table of :meth:`shape`, one column a block; float64 for a float64 vector, else float32.
        """
        length = flat.numel()
        flat = flat.detach().to(compute_dtype(flat.dtype))
        table = flat.new_empty(self.shape(length))
        matrix = _matrix(self, self.height(length), flat.device)
        blocks = _dealt(flat, matrix.height, table.shape[1])
        for panel in matrix.panels(table.shape[1]):
            table[:, panel] = matrix.measure(blocks[:, panel])
        return table

    def adjoint(self, table: Tensor, length: int) -> Tensor:
        """Apply the transposed matrix, which is its pseudoinverse: the shortest vector with these measurements.

        Args:
            table: what :meth:`measure` returned, or as large.
            length: length of the vector.
        """
        matrix = _matrix(self, self.height(length), table.device)
        blocks = table.new_empty(matrix.height, table.shape[1])
        for panel in matrix.panels(table.shape[1]):
            blocks[:, panel] = matrix.adjoint(table[:, panel])
        return blocks.view(-1)[:length]

    def recover(
        self,
        table: Tensor,
        length: int,
        sparsity: int,
        iterations: int = 5,
        first: int = 0,
        candidates: Tensor | None = None,
    ) -> Recovery:
        """Recover sparse blocks by fast iterative hard thresholding.

        Each iteration extrapolates from the last two estimates, takes a gradient step, keeps the largest elements and
        corrects their values; steps have the length that is best for the elements that matter. Of all estimates the one
        is returned whose measurements are nearest; the first is already nearer than 0, so the rest is never larger than
        ``table``.

        Args:
            table: measurements, or a sum of some; perhaps of some neighbouring blocks only.
            length: length of the vector.
            sparsity: elements to recover in each block, at most :meth:`height`.
            iterations: improvements of the first estimate.
            first: block that the first column of ``table`` belongs to. Columns beyond the last block must be 0.
            candidates: bool for each element of the vector, whether it may differ from 0. Default: all may.

        Returns:
            Places, values, and what they do not explain.

        Raises:
            ValueError: if ``sparsity`` is not between 0 and the length of a block.

        References:
            Wei 2015, "Fast iterative hard thresholding algorithm for compressed sensing"; Blumensath and Davies 2010,
            "Normalized iterative hard thresholding".
        """
        matrix = _matrix(self, self.height(length), table.device)
        if not 0 <= sparsity <= matrix.height:
            raise ValueError(f"sparsity is {sparsity}; it must be 0 to {matrix.height}, the length of a block")
        columns, blocks = table.shape[1], self.shape(length)[1]
        allowed = _allowed(matrix.height, blocks, length, candidates, table.device)
        positions = torch.empty(sparsity, columns, dtype=torch.int64, device=table.device)
        values, rest = table.new_empty(sparsity, columns), torch.empty_like(table)
        for panel in matrix.panels(columns):
            part, scale = table[:, panel], table[:, panel].abs().amax(0)
            mask = _columns(allowed, first + panel.start, first + panel.stop)
            # Squares of very small or large gradients would leave the range of float32.
            scaled = part / torch.where(scale > 0, scale, 1)
            positions[:, panel], found = matrix.recover(scaled, sparsity, iterations, mask)
            values[:, panel] = found * scale
            rest[:, panel] = part - matrix.measure(matrix.placed(positions[:, panel], values[:, panel]))
        return Recovery(positions, values, rest)


class _Matrix:
    """The matrix of one block, applied to many blocks at once: to the columns of a tensor.

    Args:
        rows: chosen rows of the transform, increasing.
        signs: 1 and -1 in random order, as a column.
    """

    def __init__(self, rows: Tensor, signs: Tensor) -> None:
        self.rows, self.signs = rows, signs
        self.height = signs.shape[0]

    def panels(self, columns: int) -> Iterator[slice]:
        """Cut columns into groups that are worked on at once, and on a CPU in the cache."""
        width = max(1, block_length(self.rows.device) // self.height)
        return (slice(start, min(start + width, columns)) for start in range(0, columns, width))

    def measure(self, blocks: Tensor) -> Tensor:
        return _transform(blocks * self.signs).index_select(0, self.rows).mul_(self.height**-0.5)

    def adjoint(self, table: Tensor) -> Tensor:
        blocks = table.new_zeros(self.height, table.shape[1])
        return _transform(blocks.index_copy_(0, self.rows, table * self.height**-0.5)).mul_(self.signs)

    def placed(self, positions: Tensor, values: Tensor) -> Tensor:
        return values.new_zeros(self.height, values.shape[1]).scatter_(0, positions, values)

    def recover(self, table: Tensor, sparsity: int, iterations: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Positions and values; see :meth:`Sensing.recover`."""

        def gradient(rest: Tensor) -> Tensor:
            blocks = self.adjoint(rest)
            return blocks if mask is None else blocks.mul_(mask)

        def largest(blocks: Tensor) -> Tensor:
            return blocks.abs().topk(sparsity, dim=0, sorted=False).indices

        def best_step(direction: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """The rate that is best for a step on these positions alone, that step, and its measurements."""
            step = self.placed(positions, direction.gather(0, positions))
            measured = self.measure(step)
            rate = _ratio(_square(step), _square(measured))
            return rate, rate * step, rate * measured

        direction = gradient(table)
        positions = largest(direction)
        _, estimate, measured = best_step(direction, positions)
        best = [positions, estimate.gather(0, positions), _square(table - measured)]
        before, measured_before = torch.zeros_like(estimate), torch.zeros_like(measured)
        tie = 1 + 16 * torch.finfo(table.dtype).eps  # of equally good estimates the last one, whatever rounding says
        for _ in range(iterations):
            change = measured - measured_before
            # Near the end a change is rounding error, whose best multiple may be huge: never more than once.
            momentum = _ratio(((table - measured) * change).sum(0), _square(change)).clamp_(0, 1)
            ahead, measured_ahead = estimate + momentum * (estimate - before), measured + momentum * change
            before, measured_before = estimate, measured
            direction = gradient(table - measured_ahead)
            # Of the present positions nothing but rounding errors may be left in the gradient: no measure for a step.
            rate, _, _ = best_step(direction, largest(direction))
            moved = ahead + rate * direction
            positions = largest(moved)
            estimate = self.placed(positions, moved.gather(0, positions))
            measured = self.measure(estimate)
            for _ in range(CORRECTIONS):
                _, step, change = best_step(gradient(table - measured), positions)
                estimate, measured = estimate + step, measured + change
            found = [positions, estimate.gather(0, positions), _square(table - measured)]
            nearer = found[2] <= best[2] * tie
            best = [torch.where(nearer, new, old) for new, old in zip(found, best, strict=True)]
        return best[0], best[1]


@lru_cache(maxsize=16)
def _matrix(sensing: Sensing, height: int, device: torch.device) -> _Matrix:
    places = torch.arange(height)
    signs = 1 - 2 * (hashed(_seed(sensing, 0), places) & 1)
    order = torch.argsort(hashed(_seed(sensing, 1), places), stable=True)
    rows = order[: ceil(sensing.measurements * height)].sort().values
    return _Matrix(rows.to(device), signs.float().view(-1, 1).to(device))


def _seed(sensing: Sensing, purpose: int) -> Tensor:
    return torch.tensor(mix(sensing.seed, purpose) >> 1)  # as int64 has room for


def _transform(blocks: Tensor) -> Tensor:
    """The Walsh-Hadamard transform of every column, in place, times the square root of their length."""
    height, columns = blocks.shape
    half = 1
    while half < height:
        pairs = blocks.view(height // (2 * half), 2, half, columns)
        low, high = pairs[:, 0], pairs[:, 1]
        total = low + high
        torch.sub(low, high, out=high)
        low.copy_(total)
        half *= 2
    return blocks


def _dealt(flat: Tensor, height: int, blocks: int) -> Tensor:
    """The vector as a matrix with a column for each block; zeros where it is too short."""
    return torch.nn.functional.pad(flat, (0, height * blocks - flat.numel())).view(height, blocks)


def _allowed(height: int, blocks: int, length: int, candidates: Tensor | None, device: torch.device) -> Tensor | None:
    """Which elements of the blocks may differ from 0; None if all may."""
    if candidates is None:
        if length == height * blocks:
            return None
        candidates = torch.ones(length, dtype=torch.bool, device=device)
    return _dealt(candidates, height, blocks)


def _columns(allowed: Tensor | None, start: int, stop: int) -> Tensor | None:
    if allowed is None:
        return None
    part = allowed[:, start:stop]
    return torch.nn.functional.pad(part, (0, stop - start - part.shape[1]))


def _square(blocks: Tensor) -> Tensor:
    """Squared norm of each column."""
    return blocks.square().sum(0)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """0 where the denominator is."""
    return torch.where(denominator > 0, numerator / denominator, 0)
