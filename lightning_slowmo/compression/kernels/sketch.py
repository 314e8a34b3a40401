"""Count-Sketch: all rows of the table, or all elements of the estimate, in one launch."""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl
from torch import Tensor

from lightning_slowmo.compression.kernels.launch import launch
from lightning_slowmo.compression.kernels.tables import power_of_two

_UNROLLED = 8


@triton.jit
def _sketch(
    flat, table, moves, length, columns, blocks, strips,
    BLOCK: tl.constexpr, UNROLLED: tl.constexpr,
):  # fmt: skip
    """Some neighbouring cells of one row.

    What lies before and after the point where a rotated block begins anew is summed apart, block after block: the
    order of the torch code, and so its bits.
    """
    program = tl.program_id(0).to(tl.int64)
    row, strip = program // strips, program % strips
    column = strip * BLOCK + tl.arange(0, BLOCK)
    kind = table.dtype.element_ty
    straight, wrapped = tl.zeros([BLOCK], kind), tl.zeros([BLOCK], kind)
    for first in range(0, blocks, UNROLLED):
        for step in tl.static_range(UNROLLED):
            block = program * 0 + first + step  # int64, as a tensor
            move = moves + (row * blocks + block) * 2
            offset = tl.load(move, mask=block < blocks, other=0)
            sign = tl.load(move + 1, mask=block < blocks, other=0)
            place = column - offset
            wraps = place < 0
            source = block * columns + tl.where(wraps, place + columns, place)
            inside = (column < columns) & (source < tl.where(block < blocks, length, 0))
            values = tl.load(flat + source, mask=inside, other=0).to(kind) * sign.to(kind)
            straight += tl.where(wraps, 0.0, values)
            wrapped += tl.where(wraps, values, 0.0)
    tl.store(table + row * columns + column, straight + wrapped, mask=column < columns)


@triton.jit
def _cell(table, moves, row, block, column, mask, columns, blocks):
    move = moves + (row * blocks + block) * 2
    place = column + tl.load(move)
    place = tl.where(place >= columns, place - columns, place)
    return tl.load(table + row * columns + place, mask=mask, other=0) * tl.load(move + 1).to(table.dtype.element_ty)


@triton.jit
def _estimate(table, moves, out, length, columns, blocks, strips, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The median over rows: the cell of which there are half as many smaller ones, of equals those of earlier rows."""
    program = tl.program_id(0).to(tl.int64)
    block, strip = program // strips, program % strips
    column = strip * BLOCK + tl.arange(0, BLOCK)
    place = block * columns + column
    mask = (column < columns) & (place < length)
    median = tl.zeros([BLOCK], table.dtype.element_ty)
    for row in tl.static_range(ROWS):
        cell = _cell(table, moves, row, block, column, mask, columns, blocks)
        smaller = tl.zeros([BLOCK], tl.int32)
        for other in tl.static_range(ROWS):
            if other != row:
                against = _cell(table, moves, other, block, column, mask, columns, blocks)
                smaller += ((against <= cell) if other < row else (against < cell)).to(tl.int32)
        median = tl.where(smaller == ROWS // 2, cell, median)
    tl.store(out + place, median + 0.0, mask=mask)  # there is one zero only


def sketch(flat: Tensor, moves: Tensor, table: Tensor) -> None:
    """Fill ``table``; ``moves`` is int64 of shape (rows, blocks, 2): offset and sign of each block in each row."""
    rows, columns = table.shape
    block = min(256, power_of_two(columns))
    strips = triton.cdiv(columns, block)
    sizes = flat.numel(), columns, moves.shape[1], strips
    launch(_sketch, rows * strips, flat, table, moves, *sizes, BLOCK=block, UNROLLED=_UNROLLED, num_warps=2)


def estimate(table: Tensor, moves: Tensor, out: Tensor) -> None:
    """Fill ``out`` with the estimates of all elements."""
    rows, columns = table.shape
    block = min(1024, power_of_two(columns))
    strips = triton.cdiv(columns, block)
    sizes = out.numel(), columns, moves.shape[1], strips
    launch(_estimate, moves.shape[1] * strips, table, moves, out, *sizes, ROWS=rows, BLOCK=block)
