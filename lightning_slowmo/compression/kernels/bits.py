"""Codes of b bits in the planes of ``packing.py``, and sets of indices in the code of ``indices.py``."""

# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_slowmo.compression.kernels.launch import launch
from lightning_slowmo.compression.kernels.tables import TILE

_BLOCK = 1024


@triton.jit
def _plane_at(packed, code, begin, start, offset, mask, count, WIDTH: tl.constexpr, SHIFT: tl.constexpr):
    """Add to codes what a plane of ``WIDTH`` bits, at byte ``begin``, holds of them; and the end of the plane."""
    size = (count * WIDTH + 7) // 8
    stretch = tl.zeros_like(offset)
    for border in tl.static_range(1, 8 // WIDTH):
        # Offsets are small, so a border that is far away may be moved nearer, where int32 has room for it.
        near = tl.minimum(tl.maximum(border * size - start, -1), 2147483647).to(tl.int32)
        stretch += (offset >= near).to(tl.int32)
    byte = tl.load(packed + begin + start + offset - stretch.to(tl.int64) * size, mask=mask, other=0)
    bits = (byte.to(tl.int32) >> (stretch * WIDTH)) & ((1 << WIDTH) - 1)
    return code | (bits.to(code.dtype) << SHIFT), begin + size


@triton.jit
def code_at(packed, start, offset, mask, count, BITS: tl.constexpr, KIND: tl.constexpr = tl.int32):
    """Codes number ``start + offset`` of ``count`` packed ones.

    ``start`` and ``count`` are scalars of int64, ``offset`` is a tensor of int32. A plane of ``width`` bits is cut into
    ``8 / width`` stretches that share its bytes; comparisons with their borders tell where an element is.
    """
    code = tl.zeros_like(offset).to(KIND)
    begin = count * 0
    for plane in tl.static_range(BITS // 8):
        code, begin = _plane_at(packed, code, begin, start, offset, mask, count, 8, plane * 8)
    if BITS & 4:
        code, begin = _plane_at(packed, code, begin, start, offset, mask, count, 4, BITS & ~7)
    if BITS & 2:
        code, begin = _plane_at(packed, code, begin, start, offset, mask, count, 2, BITS & ~3)
    if BITS & 1:
        code, begin = _plane_at(packed, code, begin, start, offset, mask, count, 1, BITS & ~1)
    return code


@triton.jit
def _pack_plane(codes, out, count, size, SHIFT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    cell = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    byte = tl.zeros([BLOCK], tl.int32)
    for stretch in tl.static_range(8 // WIDTH):
        place = cell + stretch * size
        code = tl.load(codes + place, mask=(cell < size) & (place < count), other=0)
        byte |= ((code >> SHIFT) & ((1 << WIDTH) - 1)).to(tl.int32) << (stretch * WIDTH)
    tl.store(out + cell, byte.to(tl.uint8), mask=cell < size)


@triton.jit
def _unpack(packed, codes, count, BITS: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offset = tl.arange(0, BLOCK)
    mask = offset < count - start
    code = code_at(packed, start, offset, mask, start * 0 + count, BITS, tl.int32 if BITS < 32 else tl.int64)
    tl.store(codes + start + offset, code, mask=mask)


@triton.jit
def _mark(indices, marks, count, LOW: tl.constexpr, UNARY: tl.constexpr, BLOCK: tl.constexpr):
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(indices + number, mask=number < count, other=0)
    if UNARY:
        place = (place >> LOW) + number
    tl.store(marks + place, 1, mask=number < count)


@triton.jit
def _count_ones(packed, before, length, TILE: tl.constexpr):
    tile = tl.program_id(0).to(tl.int64)
    start = tile * TILE
    offset = tl.arange(0, TILE)
    ones = code_at(packed, start, offset, offset < length - start, start * 0 + length, 1)
    tl.store(before + tile + 1, tl.sum(ones).to(tl.int64))
    tl.store(before + tile, 0, mask=tile == 0)


@triton.jit
def _list_ones(
    packed, lows, before, indices, length, count, LOW: tl.constexpr, UNARY: tl.constexpr, TILE: tl.constexpr
):
    tile = tl.program_id(0).to(tl.int64)
    start = tile * TILE
    offset = tl.arange(0, TILE)
    ones = code_at(packed, start, offset, offset < length - start, start * 0 + length, 1)
    first = tl.load(before + tile)
    number = tl.cumsum(ones, axis=0) - ones
    found = (ones > 0) & (number < count - first)  # a damaged payload may hold more ones than there is room for
    index = start + offset
    if UNARY:
        index -= first + number
    if LOW > 0:
        index = (index << LOW) | code_at(lows, first, number, found, first * 0 + count, LOW).to(tl.int64)
    tl.store(indices + first + number, index, mask=found)


def pack(codes: Tensor, planes: list[tuple[int, int, Tensor]]) -> None:
    """Fill planes, given as their width, the place of their bits in a code, and their bytes."""
    for width, shift, plane in planes:
        size = plane.numel()
        programs = triton.cdiv(size, _BLOCK)
        launch(_pack_plane, programs, codes, plane, codes.numel(), size, SHIFT=shift, WIDTH=width, BLOCK=_BLOCK)


def unpack(packed: Tensor, codes: Tensor, bits: int) -> None:
    """Fill ``codes`` from all planes in one pass."""
    count = codes.numel()
    launch(_unpack, triton.cdiv(count, _BLOCK), packed, codes, count, BITS=bits, BLOCK=_BLOCK)


def mark(indices: Tensor, length: int, low: int | None) -> Tensor:
    """Ones at the places of indices, or, with ``low``, at those of the unary part of the Elias-Fano code."""
    marks = torch.zeros(length, dtype=torch.uint8, device=indices.device)
    count = indices.numel()
    sizes = {"LOW": low or 0, "UNARY": low is not None, "BLOCK": _BLOCK}
    launch(_mark, triton.cdiv(count, _BLOCK), indices, marks, count, **sizes)
    return marks


def list_indices(packed: Tensor, lows: Tensor, length: int, count: int, low: int | None) -> Tensor:
    """Invert :func:`mark` after packing, and put the packed low bits of the indices below what it says.

    Args:
        packed: bitmap of ``length`` bits.
        lows: the low bits of each index, packed; not read without ``low``.
        length: bits in the bitmap.
        count: ones in it.
        low: number of low bits; None if the bitmap says all.
    """
    programs = triton.cdiv(length, TILE)
    before = torch.empty(programs + 1, dtype=torch.int64, device=packed.device)
    indices = torch.zeros(count, dtype=torch.int64, device=packed.device)
    launch(_count_ones, programs, packed, before, length, TILE=TILE)
    sizes = {"LOW": low or 0, "UNARY": low is not None, "TILE": TILE}
    launch(_list_ones, programs, packed, lows, before.cumsum(0), indices, length, count, **sizes)
    return indices
