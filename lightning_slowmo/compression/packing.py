"""Integers of b bits, packed so that no bit is wasted.

A number is cut into planes of 8, 4, 2 and 1 bits (13 bits are 8 + 4 + 1), and each plane is stored by itself. A byte of
a narrow plane holds one number from each of 8 / width equal stretches of the input, not 8 / width neighbours: every
operation then runs over contiguous bytes, which is what makes packing cost a small part of a memory copy.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_slowmo.compression import kernels
from lightning_slowmo.compression.segments import block_length


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that ``count`` numbers of ``bits`` bits take: ``count * bits / 8``, each plane rounded up."""
    return sum(-(-count * width // 8) for width in _planes(bits))


def pack(codes: Tensor, bits: int, out: Tensor) -> None:
    """Write the lowest ``bits`` bits of each code into ``out``.

    Args:
        codes: 1-D integer tensor. A ``uint8`` tensor must hold values below ``2**bits``.
        bits: bits for each code, 0 to 63.
        out: ``uint8`` tensor of ``packed_bytes(len(codes), bits)`` bytes.
    """
    if kernels.available(out):
        from lightning_slowmo.compression.kernels import bits as gpu

        gpu.pack(codes, list(_split(out, codes.numel(), bits)))
        return
    out.zero_()
    for width, shift, plane in _split(out, codes.numel(), bits):
        clean = codes.dtype == torch.uint8 and width == bits
        for part, cells, place in _stretches(codes, plane, width):
            value = part if clean else ((part >> shift) & (2**width - 1)).to(torch.uint8)
            cells.add_(value, alpha=1 << place)  # the bits are disjoint: a sum is a union


def unpack(packed: Tensor, count: int, bits: int) -> Tensor:
    """Invert :func:`pack`.

    Args:
        packed: ``uint8`` tensor of ``packed_bytes(count, bits)`` bytes.
        count: number of codes.
        bits: bits of each code.

    Returns:
        1-D tensor of ``count`` codes: ``uint8`` up to 8 bits, ``int32`` up to 31, else ``int64``.
    """
    dtype = torch.uint8 if bits <= 8 else torch.int32 if bits <= 31 else torch.int64
    codes = torch.empty(count, dtype=dtype, device=packed.device)
    if kernels.available(packed):
        from lightning_slowmo.compression.kernels import bits as gpu

        gpu.unpack(packed, codes, bits)
        return codes
    if bits == 0:
        codes.zero_()
    for width, shift, plane in _split(packed, count, bits):
        for part, cells, place in _stretches(codes, plane, width):
            value = (cells >> place) & (2**width - 1)
            part.add_(value.to(dtype), alpha=1 << shift) if shift else part.copy_(value)
    return codes


def _planes(bits: int) -> list[int]:
    return [8] * (bits // 8) + [width for width in (4, 2, 1) if bits & width]


def _split(packed: Tensor, count: int, bits: int) -> Iterator[tuple[int, int, Tensor]]:
    """Width of each plane, its place in a code, and its bytes."""
    begin = shift = 0
    for width in _planes(bits):
        end = begin + -(-count * width // 8)
        yield width, shift, packed[begin:end]
        begin, shift = end, shift + width


def _stretches(codes: Tensor, plane: Tensor, width: int) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Codes, the bytes they share, and their place in these, in parts that stay in the cache."""
    size, block = plane.numel(), block_length(plane.device)
    for place in range(0, 8, width):
        stretch = codes[place // width * size :][:size]
        for start in range(0, stretch.numel(), block):
            part = stretch[start : start + block]
            yield part, plane[start : start + part.numel()], place
