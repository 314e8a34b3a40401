"""Kernels that turn buckets into a norm and codes of few bits, and back: ``QSGD``, ``Cast("int8")`` and ``Sign``.

The arithmetic is that of the torch code, operation by operation, without fused multiply-add and with divisions and
roots that are rounded correctly: where norms are equal, codes and decoded elements have equal bits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_slowmo.compression.kernels.bits import code_at
from lightning_slowmo.compression.kernels.launch import launch
from lightning_slowmo.compression.kernels.random import random_word
from lightning_slowmo.compression.kernels.tables import FIELDS, TILE, power_of_two, simple_tiles, tiles


@triton.jit
def _quotient(numerator, denominator):
    """The quotient, correctly rounded; Triton's own is an approximation in float32."""
    if denominator.dtype == tl.float64:
        return numerator / denominator
    else:  # noqa: RET505  a branch of its own, for it must not be compiled for float64
        return tl.div_rn(numerator, denominator)


@triton.jit
def _root(square):
    if square.dtype == tl.float64:
        return tl.sqrt(square)
    else:  # noqa: RET505
        return tl.sqrt_rn(square)


@triton.jit
def _quantize(
    flat, norms, codes, table, key, bucket_words,
    L2: tl.constexpr, RANDOM: tl.constexpr, LEVELS: tl.constexpr, OFFSET: tl.constexpr, SMALLEST: tl.constexpr,
    ROUND: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """Norms and codes of the rows of one tile; a row of up to ``CHUNKS * WORDS * 8`` elements."""
    tile = table + tl.program_id(0).to(tl.int64) * FIELDS
    start = tl.load(tile)
    rows = tl.load(tile + 1).to(tl.int32)
    width = tl.load(tile + 2).to(tl.int32)
    bucket = tl.load(tile + 3) + tl.arange(0, ROWS)
    kind = norms.dtype.element_ty
    row = tl.arange(0, ROWS)[:, None, None]
    word = tl.arange(0, WORDS)[None, :, None]
    byte = tl.arange(0, 8)[None, None, :]

    if L2:
        squares = tl.zeros([ROWS], kind)
    else:
        # As integers, magnitudes are in the same order, and infinity and NaN come last.
        largest = tl.zeros([ROWS], tl.int64 if kind == tl.float64 else tl.int32)
    for chunk in range(CHUNKS):
        column = (chunk * WORDS + word) * 8 + byte
        mask = (row < rows) & (column < width)
        values = tl.load(flat + start + row * width + column, mask=mask, other=0).to(kind)
        if L2:
            squares += tl.sum(tl.sum(values * values, axis=2), axis=1)
        else:
            bits = tl.abs(values).to(largest.dtype, bitcast=True)
            largest = tl.maximum(largest, tl.max(tl.max(bits, axis=2), axis=1))
    norm = _root(squares) if L2 else largest.to(kind, bitcast=True)
    tl.store(norms + bucket, norm, mask=tl.arange(0, ROWS) < rows)
    inverse = tl.where(norm > SMALLEST, _quotient(tl.full([ROWS], 1, kind), norm) * LEVELS, 0.0)[:, None, None]

    if RANDOM:
        # 16 bits that a bucket shares, four buckets a word, and 8 bits for each element: see hashing.QuantizerNoise.
        secret = tl.load(key)
        coarse = random_word(secret, -1 - (bucket >> 2)) >> ((bucket & 3) * 16).to(tl.uint64)
        shared = ((coarse & 0xFFFF).to(tl.int32).to(kind) * 0.000000059604644775390625)[:, None, None]  # 2**-24
    for chunk in range(CHUNKS):
        column = (chunk * WORDS + word) * 8 + byte
        mask = (row < rows) & (column < width)
        values = tl.load(flat + start + row * width + column, mask=mask, other=0).to(kind) * inverse
        if RANDOM:
            counter = bucket[:, None] * bucket_words + chunk * WORDS + tl.arange(0, WORDS)[None, :]
            fine = random_word(secret, counter)[:, :, None] >> (byte * 8).to(tl.uint64)
            values = values + shared
            values = values + (fine & 0xFF).to(tl.int32).to(kind) * 0.00390625  # 2**-8
            code = values.to(tl.int32)
            code -= (code.to(kind) > values).to(tl.int32)  # towards minus infinity
        else:
            code = ((values + ROUND) - ROUND).to(tl.int32)  # to the nearest integer, of two the even one
        code = tl.minimum(tl.maximum(code, -LEVELS), LEVELS) + OFFSET
        tl.store(codes + start + row * width + column, code.to(codes.dtype.element_ty), mask=mask)


@triton.jit
def _dequantize(
    packed, norms, steps, out, table, count,
    BITS: tl.constexpr, SIGNED: tl.constexpr, LEVELS: tl.constexpr, TABLE: tl.constexpr, CHUNKS: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    tile = table + tl.program_id(0).to(tl.int64) * FIELDS
    start = tl.load(tile)
    rows = tl.load(tile + 1).to(tl.int32)
    width = tl.load(tile + 2).to(tl.int32)
    bucket = tl.load(tile + 3) + tl.arange(0, ROWS)
    row = tl.arange(0, ROWS)[:, None]
    inside = tl.arange(0, ROWS) < rows
    norm = tl.load(norms + bucket, mask=inside, other=0)
    if TABLE:  # noqa: SIM108  only one of the two is compiled
        step = tl.load(steps + bucket, mask=inside, other=1)
    else:
        step = tl.full([ROWS], LEVELS, norm.dtype)
    scale = _quotient(norm, step)[:, None]
    for chunk in range(CHUNKS):
        column = chunk * WIDTH + tl.arange(0, WIDTH)[None, :]
        mask = (row < rows) & (column < width)
        offset = row * width + column
        if SIGNED:
            code = tl.load(packed + start + offset, mask=mask, other=0).to(tl.int32)
        else:
            code = code_at(packed, start, offset, mask, start * 0 + count, BITS) - LEVELS
        tl.store(out + start + offset, code.to(norm.dtype) * scale, mask=mask)


@triton.jit
def _signs(flat, codes, sums, table, L2: tl.constexpr, TILE: tl.constexpr, FIELDS: tl.constexpr):
    """Signs of one tile, 1 for non-negative elements, and the sum of its magnitudes or squares."""
    number = tl.program_id(0).to(tl.int64)
    start = tl.load(table + number * FIELDS)
    offset = tl.arange(0, TILE)
    mask = offset < tl.load(table + number * FIELDS + 2)
    values = tl.load(flat + start + offset, mask=mask, other=0).to(sums.dtype.element_ty)
    tl.store(sums + number, tl.sum(values * values if L2 else tl.abs(values)))
    tl.store(codes + start + offset, (values >= 0).to(tl.uint8), mask=mask)


@triton.jit
def _add_tiles(sums, first, totals, L2: tl.constexpr, BLOCK: tl.constexpr):
    """The norm of one tensor, from the sums of its tiles, always in the same order."""
    segment = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(first + segment), tl.load(first + segment + 1)
    total = tl.zeros([BLOCK], totals.dtype.element_ty)
    for tile in range(begin, end, BLOCK):
        place = tile + tl.arange(0, BLOCK)
        total += tl.load(sums + place, mask=place < end, other=0)
    norm = tl.sum(total)
    tl.store(totals + segment, _root(norm) if L2 else norm)


@triton.jit
def _decode_signs(packed, scales, out, table, count, TILE: tl.constexpr, FIELDS: tl.constexpr):
    tile = table + tl.program_id(0).to(tl.int64) * FIELDS
    start = tl.load(tile)
    offset = tl.arange(0, TILE)
    mask = offset < tl.load(tile + 2)
    scale = tl.load(scales + tl.load(tile + 4))
    bit = code_at(packed, start, offset, mask, start * 0 + count, 1)
    tl.store(out + start + offset, tl.where(bit > 0, scale, -scale), mask=mask)


def quantize(
    flat: Tensor,
    segments: tuple[int, ...],
    bucket: int,
    levels: int,
    norms: Tensor,
    codes: Tensor,
    norm: str = "max",
    key: Tensor | None = None,
) -> None:
    """Fill ``norms`` and ``codes`` of all buckets.

    With a ``key``, an int64 tensor of one element, rounding is stochastic and codes are 0 to ``2 levels``; without,
    rounding is to nearest and they are ``-levels`` to ``levels``.
    """
    width = min(max(power_of_two(bucket), 8), TILE)
    rows = TILE // width
    cut = tiles(segments, bucket, rows, flat.device)
    limits = torch.finfo(norms.dtype)
    launch(
        _quantize, cut.number, flat, norms, codes, cut.table, norms if key is None else key, -(-bucket // 8),
        L2=norm == "l2", RANDOM=key is not None, LEVELS=levels, OFFSET=0 if key is None else levels,
        SMALLEST=limits.tiny * 2.0**16, ROUND=1.5 / limits.eps, CHUNKS=-(-bucket // width), ROWS=rows,
        WORDS=width // 8, FIELDS=FIELDS, num_warps=8,
    )  # fmt: skip


def dequantize(
    packed: Tensor,
    norms: Tensor,
    segments: tuple[int, ...],
    bucket: int,
    levels: int,
    out: Tensor,
    bits: int | None = None,
    steps: Tensor | None = None,
) -> None:
    """Fill ``out`` with codes times ``norm / levels``, or ``norm / steps`` of their bucket.

    Without ``bits`` codes are int8 as they are; with them they are packed, and 0 stands for ``-levels``.
    """
    width = min(max(power_of_two(bucket), 8), TILE)
    rows = TILE // width
    cut = tiles(segments, bucket, rows, out.device)
    launch(
        _dequantize, cut.number, packed, norms, norms if steps is None else steps, out, cut.table, out.numel(),
        BITS=bits or 8, SIGNED=bits is None, LEVELS=levels, TABLE=steps is not None, CHUNKS=-(-bucket // width),
        ROWS=rows, WIDTH=width, FIELDS=FIELDS, num_warps=8,
    )  # fmt: skip


def signs(flat: Tensor, segments: tuple[int, ...], norms: Tensor, l2: bool) -> Tensor:
    """Ones and zeros for the signs of ``flat``; fill ``norms`` with the norm of each tensor."""
    cut = simple_tiles(segments, flat.device)
    codes = torch.empty(flat.numel(), dtype=torch.uint8, device=flat.device)
    sums = norms.new_empty(cut.number)
    launch(_signs, cut.number, flat, codes, sums, cut.table, L2=l2, TILE=TILE, FIELDS=FIELDS, num_warps=8)
    launch(_add_tiles, len(segments), sums, cut.first, norms, L2=l2, BLOCK=1024)
    return codes


def decode_signs(packed: Tensor, scales: Tensor, segments: tuple[int, ...], out: Tensor) -> None:
    """Fill ``out`` with plus or minus the scale of its tensor."""
    cut = simple_tiles(segments, out.device)
    sizes = {"TILE": TILE, "FIELDS": FIELDS}
    launch(_decode_signs, cut.number, packed, scales, out, cut.table, out.numel(), num_warps=8, **sizes)
