"""A linear sketch: small tables that add up as the vectors do, and from which large elements can be read."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lightning_slowmo.compression import kernels
from lightning_slowmo.compression.base import Compressor, Layout, compute_dtype
from lightning_slowmo.compression.finite import FiniteCheck
from lightning_slowmo.compression.hashing import mix
from lightning_slowmo.compression.segments import block_length
from lightning_slowmo.compression.sparsify import top_indices


@dataclass(frozen=True)
class CountSketch(Compressor):
    """Count-Sketch of a whole vector; segments play no role, and all workers must share the seed.

    The vector is cut into blocks as long as the table is wide. Each row of the table is the sum of all blocks, each
    rotated by a random offset and multiplied by a random sign. Two elements thus share a cell with probability at most
    ``1 / columns``, never within a block, and their signs are independent: all that the analysis of Count-Sketch
    asks of its hash functions. The sums, unlike a hash for each element, run at the speed of memory.

    An element is estimated by the median over rows of the cells it lies in; each cell is unbiased over seeds, with
    variance at most ``|x|_2^2 / columns``.

    Args:
        rows: rows of the table, odd. Default: 5.
        columns: cells in a row. Default: 100,000. Elements of magnitude well above ``|x|_2 / sqrt(columns)`` can be
            told from noise.
        seed: seed of offsets and signs.

    Example:
        >>> sketch = CountSketch(rows=3, columns=50)
        >>> x = torch.zeros(1000)
        >>> x[123] = 7.0
        >>> indices, values = sketch.heavy_hitters(sketch.sketch(x) + sketch.sketch(x), length=1000, k=1)
        >>> indices.item(), values.item()
        (123, 14.0)

    References:
        Charikar, Chen and Farach-Colton 2002; Ivkin et al. 2019 (arXiv 1903.04488).
    """

    rows: int = 5
    columns: int = 100_000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rows < 1 or self.rows % 2 == 0:
            raise ValueError(f"rows is {self.rows}; it must be odd, for the estimate is a median")
        if self.columns < 1:
            raise ValueError(f"columns is {self.columns}; it must be at least 1")

    def contraction(self, length: int) -> float | None:
        """None: an estimate may be worse than zero. Keep the heavy hitters only, and the rest as error feedback."""
        return None

    def layout(self, segments: Sequence[int], dtype: torch.dtype) -> Layout:
        """The table, whatever the length of the vector."""
        return [(compute_dtype(dtype), self.rows * self.columns)]

    def sketch(self, flat: Tensor) -> Tensor:
        """Make the table of a vector; tables add up, to rounding, as vectors do.

        Args:
            flat: 1-D float tensor.

        Returns:
            Table of shape (rows, columns), float64 for a float64 vector, else float32.
        """
        table = torch.empty(self.rows, self.columns, dtype=compute_dtype(flat.dtype), device=flat.device)
        return self._sketch(flat, table)

    def _sketch(self, flat: Tensor, table: Tensor) -> Tensor:
        """Fill ``table``."""
        if kernels.available(flat):
            from lightning_slowmo.compression.kernels.sketch import sketch

            sketch(flat.detach(), _moves_table(self, flat.numel(), flat.device), table)
            return table
        for row, moves in zip(table, _moves(self, flat.numel()), strict=True):
            wrapped = table.new_zeros(2 * self.columns)
            for block, (offset, sign) in zip(flat.detach().split(self.columns), moves, strict=False):
                wrapped[offset : offset + block.numel()].add_(block, alpha=sign)
            torch.add(wrapped[: self.columns], wrapped[self.columns :], out=row)
        return table

    def estimate(self, table: Tensor, length: int) -> Tensor:
        """Estimate every element of the sketched vector.

        Args:
            table: what :meth:`sketch` returned, or a sum of such tables.
            length: length of the vector.

        Returns:
            1-D tensor of ``length`` elements, of the table's type.
        """
        return self._estimate(table, table.new_empty(length))

    def _estimate(self, table: Tensor, out: Tensor) -> Tensor:
        """Fill ``out``."""
        length = out.numel()
        if kernels.available(table):
            from lightning_slowmo.compression.kernels.sketch import estimate

            if length:
                estimate(table.contiguous(), _moves_table(self, length, table.device), out)
            return out
        wrapped = torch.cat([table, table], dim=1)
        moves = _moves(self, length)
        block = block_length(table.device) // 4  # several rows have to share the cache
        cells = list(table.new_empty(self.rows + 1, min(block, self.columns, length)))
        for begin in range(0, length, self.columns):
            end = min(begin + self.columns, length)
            for start in range(begin, end, block):
                size = min(block, end - start)
                for cell, row, move in zip(cells, wrapped, moves, strict=False):
                    offset, sign = move[begin // self.columns]
                    first = offset + start - begin
                    torch.mul(row[first : first + size], sign, out=cell[:size])
                median = _median([cell[:size] for cell in cells])
                torch.add(median, 0.0, out=out[start : start + size])  # makes -0 a 0: which one wins is left open
        return out

    def heavy_hitters(self, table: Tensor, length: int, k: int) -> tuple[Tensor, Tensor]:
        """The ``k`` elements of largest estimated magnitude.

        Args:
            table: a sketch or a sum of sketches.
            length: length of the vector.
            k: number of elements, at most ``length``.

        Returns:
            Their indices, increasing, and their estimates.

        Raises:
            ValueError: if ``k`` is negative or above ``length``.
        """
        if not 0 <= k <= length:
            raise ValueError(f"k is {k}; it must be 0 to {length}, the length of the vector")
        values = self.estimate(table, length)
        indices = top_indices(values, k)
        return indices, values.index_select(0, indices)

    def _encode(
        self,
        flat: Tensor,
        segments: tuple[int, ...],
        generator: torch.Generator | None,
        fields: list[Tensor],
        check: FiniteCheck,
    ) -> None:
        self._sketch(flat, fields[0].view(self.rows, self.columns))
        check.require(fields[0], self)

    def _decode(self, fields: list[Tensor], segments: tuple[int, ...], dtype: torch.dtype, out: Tensor) -> None:
        self._estimate(fields[0].view(self.rows, self.columns), out)


@lru_cache(maxsize=8)
def _moves(sketch: CountSketch, length: int) -> list[list[tuple[int, int]]]:
    """Offset and sign of every block, row by row."""
    blocks = -(-length // sketch.columns)

    def move(row: int, block: int) -> tuple[int, int]:
        number = mix(sketch.seed, row, block)
        return (number >> 1) % sketch.columns, 1 if number & 1 else -1

    return [[move(row, block) for block in range(blocks)] for row in range(sketch.rows)]


@lru_cache(maxsize=8)
def _moves_table(sketch: CountSketch, length: int, device: torch.device) -> Tensor:
    """:func:`_moves` on a device, as int64 of shape (rows, blocks, 2)."""
    return torch.tensor(_moves(sketch, length), dtype=torch.int64, device=device).view(sketch.rows, -1, 2)


def _median(rows: list[Tensor]) -> Tensor:
    """Elementwise median of all but the last tensor, which is scratch: odd-even sorting of whole tensors, in place."""
    *rows, spare = rows
    for turn in range(len(rows)):
        for low in range(turn % 2, len(rows) - 1, 2):
            torch.minimum(rows[low], rows[low + 1], out=spare)
            torch.maximum(rows[low], rows[low + 1], out=rows[low + 1])
            rows[low], spare = spare, rows[low]
    return rows[len(rows) // 2]
