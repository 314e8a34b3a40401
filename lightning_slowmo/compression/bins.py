"""A few bins of equal width around each tensor's mean, and the mean of what lies in each."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_slowmo.compression.base import Compressor, Layout, compute_dtype
from lightning_slowmo.compression.finite import FiniteCheck
from lightning_slowmo.compression.packing import pack, packed_bytes, unpack


@dataclass(frozen=True)
class Bins(Compressor):
    """Sends the bin of every element, and for each tensor the mean of each bin.

    With mu and sigma the mean and standard deviation of a tensor's elements and b bins, the bins have the width
    ``reach * sigma / b`` and the centres ``mu + (i - b / 2) * width``, i = 0 ... b - 1; the outer ones hold what lies
    beyond. As every element is replaced by the mean of its bin, this is a contraction.

    Args:
        bits: of each element, 1 to 8; b is ``2**bits``.
        reach: width of all bins together in standard deviations.

    References:
        The quantizer of the code of SparseLoCo (arXiv 2508.15706) and MuLoCo (arXiv 2505.23725).
    """

    bits: int = 2
    reach: float = 6.0

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 1 <= self.bits <= 8:
            raise ValueError(f"bits is {self.bits!r}; it must be an integer from 1 to 8")
        if not self.reach > 0:
            raise ValueError(f"reach is {self.reach!r}; it must be above 0")

    def contraction(self, length: int) -> float | None:
        """None is known but 0: with all elements in one bin whose mean is 0, nothing is told."""
        return 1.0 if length <= 1 else None

    def layout(self, segments: Sequence[int], dtype: torch.dtype) -> Layout:
        """A table of means for each tensor, then the bins."""
        return [
            (compute_dtype(dtype), len(segments) << self.bits),
            (torch.uint8, packed_bytes(sum(segments), self.bits)),
        ]

    def _encode(
        self,
        flat: Tensor,
        segments: tuple[int, ...],
        generator: torch.Generator | None,
        fields: list[Tensor],
        check: FiniteCheck,
    ) -> None:
        tables, packed = fields
        count, owner = 1 << self.bits, _owners(segments, flat.device)
        values = flat.to(tables.dtype)
        lengths = torch.tensor(segments, dtype=tables.dtype, device=flat.device)
        mean = values.new_zeros(len(segments)).index_add_(0, owner, values) / lengths.clamp(min=1)
        check.require(mean, self)
        centred = values - mean[owner]
        squares = values.new_zeros(len(segments)).index_add_(0, owner, centred.square())
        width = (squares / (lengths - 1).clamp(min=1)).sqrt_().mul_(self.reach / count)
        check.require(width, self)
        width = torch.where(width > 0, width, torch.ones_like(width))
        codes = (centred / width[owner] + count / 2).round_().clamp_(0, count - 1).to(torch.int64)
        cells = (owner << self.bits) | codes
        sizes = torch.zeros_like(tables).index_add_(0, cells, torch.ones_like(values))
        tables.zero_().index_add_(0, cells, values)
        tables /= sizes.clamp_(min=1)
        pack(codes.to(torch.uint8), self.bits, packed)

    def _decode(self, fields: list[Tensor], segments: tuple[int, ...], dtype: torch.dtype, out: Tensor) -> None:
        tables, packed = fields
        codes = unpack(packed, out.numel(), self.bits).to(torch.int64)
        out.copy_(tables[(_owners(segments, out.device) << self.bits) | codes])


def _owners(segments: tuple[int, ...], device: torch.device) -> Tensor:
    """The tensor of each element."""
    return torch.repeat_interleave(torch.arange(len(segments)), torch.tensor(segments)).to(device)
