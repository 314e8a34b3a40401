"""Whether a vector is finite, noted on the device."""

# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_slowmo.compression.kernels.launch import launch

_BLOCK = 8192

INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
"""By the size of a float: the integers as which its magnitudes are in the same order, infinity and NaN last."""


@triton.jit
def magnitude(values, LARGEST: tl.constexpr):
    """Integers without their sign bit, as int32 or wider."""
    if values.dtype == tl.int16:
        return values.to(tl.int32) & LARGEST
    else:  # noqa: RET505  a branch of its own, for types must agree
        return values & LARGEST


@triton.jit
def _find_infinite(values, flag, count, LARGEST: tl.constexpr, INFINITY: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bits = magnitude(tl.load(values + place, mask=place < count, other=0), LARGEST)
    tl.store(flag, 1, mask=tl.max(bits) >= INFINITY)  # all programs that write write the same


def find_infinite(values: Tensor, flag: Tensor) -> None:
    """Set ``flag``, an int32 tensor of one element, if there is an infinity or NaN among ``values``."""
    integers = INTEGERS[values.dtype.itemsize]
    infinity = int(torch.tensor(torch.inf, dtype=values.dtype).view(integers))
    bits, count = values.view(integers), values.numel()
    sizes = {"LARGEST": torch.iinfo(integers).max, "INFINITY": infinity, "BLOCK": _BLOCK}
    launch(_find_infinite, triton.cdiv(count, _BLOCK), bits, flag, count, num_warps=8, **sizes)
