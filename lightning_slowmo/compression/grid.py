"""A grid that is shifted at random: the rounding of weights in which every rounded number is an unbiased estimate."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_slowmo.compression.base import Compressor, Layout, compute_dtype, variance_contraction
from lightning_slowmo.compression.finite import FiniteCheck
from lightning_slowmo.compression.packing import pack, packed_bytes, unpack
from lightning_slowmo.compression.segments import block_length, bucket_count, panels


@dataclass(frozen=True)
class ShiftedGrid(Compressor):
    """Rounds to the nearest point of a grid that lies at random: ``Q(x) = d round(x / d - r) + d r``.

    One shift ``r``, uniform in [-1/2, 1/2), serves all elements of a vector, so that equal numbers stay equal; over the
    shifts each rounded number is unbiased, and it is never farther than ``d / 2`` from the number. The grid of a bucket
    reaches from its smallest element to its largest in ``2**bits - 1`` steps of ``d``.

    Args:
        bits: bits for an element, 1 to 16. Default: 8.
        bucket: elements that share a grid, for which its step and its first point travel. Buckets do not cross tensors.

    Example:
        >>> ShiftedGrid(bits=8, bucket=1024).payload_bytes([4096])  # a byte for each element, and 4 grids of 8 bytes
        4128

    References:
        Markov, Vladu, Guo and Alistarh 2023 (arXiv 2302.02390).
    """

    bits: int = 8
    bucket: int = 1024

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 16:
            raise ValueError(f"bits is {self.bits}; allowed are 1 to 16")
        if self.bucket < 1:
            raise ValueError(f"bucket is {self.bucket}; it must be at least 1 element")

    @property
    def unbiased(self) -> bool:
        """Always true, over the shifts."""
        return True

    @property
    def stochastic(self) -> bool:
        """Always true."""
        return True

    @property
    def steps(self) -> int:
        """How many steps lead from a bucket's smallest element to its largest."""
        return 2**self.bits - 1

    def contraction(self, length: int) -> float | None:
        """From the variance: d^2 / 12 for an element, and (steps d)^2 is at most twice the bucket's squared norm."""
        return variance_contraction(min(length, self.bucket) / (6 * self.steps**2))

    def layout(self, segments: Sequence[int], dtype: torch.dtype) -> Layout:
        """The first point and the step of each grid, and the elements' places on it."""
        grids, elements = bucket_count(segments, self.bucket), sum(segments)
        kind = compute_dtype(dtype)
        return [(kind, grids), (kind, grids), (torch.uint8, packed_bytes(elements, self.bits))]

    def _encode(
        self,
        flat: Tensor,
        segments: tuple[int, ...],
        generator: torch.Generator | None,
        fields: list[Tensor],
        check: FiniteCheck,
    ) -> None:
        first, step, packed = fields
        shift = float(torch.rand((), generator=generator, device=generator.device if generator else "cpu")) - 0.5
        codes = torch.empty(flat.numel(), dtype=torch.uint8 if self.bits <= 8 else torch.int32, device=flat.device)
        for panel in panels(segments, self.bucket, block_length(flat.device)):
            buckets = slice(panel.bucket, panel.bucket + panel.rows)
            values = flat[panel.start : panel.stop].to(first.dtype).view(panel.rows, panel.width)
            low, high = torch.aminmax(values, dim=1)
            d = torch.div(high - low, self.steps, out=step[buckets])
            torch.add(low, d, alpha=shift, out=first[buckets])
            inverse = torch.where(d > torch.finfo(d.dtype).tiny * 2**16, d.reciprocal(), 0)
            places = (values - low[:, None]).mul_(inverse[:, None]).sub_(shift).round_().clamp_(0, self.steps)
            codes[panel.start : panel.stop].view_as(values).copy_(places)
        check.require(first, self)
        check.require(step, self)
        pack(codes, self.bits, packed)

    def _decode(self, fields: list[Tensor], segments: tuple[int, ...], dtype: torch.dtype, out: Tensor) -> None:
        first, step, packed = fields
        codes = unpack(packed, out.numel(), self.bits)
        for panel in panels(segments, self.bucket, block_length(out.device)):
            buckets = slice(panel.bucket, panel.bucket + panel.rows)
            values = out[panel.start : panel.stop].view(panel.rows, panel.width)
            values.copy_(codes[panel.start : panel.stop].view_as(values))
            values.mul_(step[buckets, None]).add_(first[buckets, None])
