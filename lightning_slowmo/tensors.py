"""What becomes of a tensor between workers, by its dtype and layout: averaged, copied from one of them, or refused.

The table for users is in ``docs/tensors.md``; ``tests/test_tensors.py`` shows each of its rows.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

SMALLEST_FLOAT = 16
"""Bits of the smallest floating-point numbers that are averaged. Smaller ones are codes that need a scale stored
elsewhere, so a mean of them means nothing."""

CHECKSUM_PIECE = 2**20
"""Numbers that a checksum adds up at a time."""

FACTORS, SHIFT = (0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9), 29
"""What scatters places over 64 bits, in the manner of the generator splitmix64."""


def is_averaged(tensor: Tensor) -> bool:
    """Whether a mean of such tensors means something: floats of 16 bits or more, and complex numbers made of them."""
    number = tensor.is_floating_point() or tensor.is_complex()
    return number and torch.finfo(tensor.dtype).bits >= SMALLEST_FLOAT


def as_bytes(tensor: Tensor) -> Tensor:
    """The values of a tensor as a flat tensor of bytes, which every transport can carry: a view if it is contiguous."""
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8)


def describe(tensor: Tensor) -> str:
    """Dtype, layout and shape, such as ``float32[3, 4]``: equal on all workers before they exchange such tensors."""
    if is_lazy(tensor):
        return "uninitialized"
    kind = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout is not torch.strided:
        kind += f" {str(tensor.layout).removeprefix('torch.')}"
    return f"{kind}{' on meta' if tensor.is_meta else ''}{list(tensor.shape)}"


def refusal(tensor: Tensor, trained: bool = False) -> str | None:
    """Why workers cannot exchange such a tensor, and what to do about it; None if they can.

    Args:
        tensor: a parameter or buffer.
        trained: whether an optimizer changes it, so that it has to be averaged.
    """
    if is_lazy(tensor):
        return (
            "has no shape yet, as its module is lazy: run one batch through the model before the strategy is set up, "
            "for example in LightningModule.setup or configure_model"
        )
    if tensor.is_meta:
        return "is on the meta device and has no values: materialize the model before the strategy is set up"
    if tensor.is_quantized:
        return "is a quantized tensor, whose scale does not travel: keep int_repr() and scale as ordinary tensors"
    if tensor.layout is not torch.strided:
        kind = str(tensor.layout).removeprefix("torch.")
        return f"has the layout {kind}, which workers do not exchange: keep it dense, or as a buffer persistent=False"
    if trained and not is_averaged(tensor):
        return f"is trained in {tensor.dtype}, of which no mean can be made: train in torch.bfloat16 or wider"
    return None


def are_binary(tensors: Iterable[Tensor]) -> list[bool]:
    """Of each tensor, whether all its values are 0 or 1."""
    found = [((tensor == 0) | (tensor == 1)).all().reshape(1) for tensor in tensors]
    return torch.cat([each.cpu() for each in found]).tolist() if found else []


def checksum(tensor: Tensor) -> int:
    """A number below 2**53 that depends on every bit of a dense tensor and on its place.

    Integers add up to the same in any order, so equal tensors have equal checksums on all devices.
    """
    raw = as_bytes(tensor)
    bits = raw.view(torch.int32 if raw.numel() % torch.int32.itemsize == 0 else torch.uint8)
    total = start = 0
    for piece in bits.split(CHECKSUM_PIECE):
        places = torch.arange(start, start + piece.numel(), device=piece.device) * FACTORS[0]
        total += int((piece * ((places ^ (places >> SHIFT)) * FACTORS[1] | 1)).sum())
        start += piece.numel()
    return total % 2**53
