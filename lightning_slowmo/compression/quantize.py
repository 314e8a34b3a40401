"""Fewer bits for each number: unbiased stochastic rounding (QSGD), plain casts, and no compression at all."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt
from typing import Literal

import torch
from torch import Tensor

from lightning_slowmo.compression import kernels
from lightning_slowmo.compression.base import Compressor, Layout, compute_dtype, variance_contraction
from lightning_slowmo.compression.finite import FiniteCheck
from lightning_slowmo.compression.hashing import QuantizerNoise, draw_key
from lightning_slowmo.compression.packing import pack, packed_bytes, unpack
from lightning_slowmo.compression.segments import Panel, block_length, bucket_count, panels


@dataclass(frozen=True)
class Identity(Compressor):
    """Sends the vector as it is, in its own type."""

    @property
    def unbiased(self) -> bool:
        """Always true."""
        return True

    def contraction(self, length: int) -> float | None:
        """1: nothing is lost."""
        return 1.0

    def layout(self, segments: Sequence[int], dtype: torch.dtype) -> Layout:
        """The values."""
        return [(dtype, sum(segments))]

    def _encode(
        self,
        flat: Tensor,
        segments: tuple[int, ...],
        generator: torch.Generator | None,
        fields: list[Tensor],
        check: FiniteCheck,
    ) -> None:
        check.require(flat, self)
        fields[0].copy_(flat)

    def _decode(self, fields: list[Tensor], segments: tuple[int, ...], dtype: torch.dtype, out: Tensor) -> None:
        out.copy_(fields[0])


@dataclass(frozen=True)
class Cast(Compressor):
    """Rounds every element to the nearest number of a narrower type.

    ``"int8"`` stores ``round(127 x / m)`` and, for each bucket of each tensor, its largest magnitude ``m``.

    Args:
        to: ``"bf16"`` (default), ``"fp16"`` or ``"int8"``. Magnitudes above 65504 do not fit ``"fp16"`` and are
            refused; those below 6e-5 lose precision.
        bucket: elements that share a scale; only ``"int8"`` has scales.
    """

    to: Literal["bf16", "fp16", "int8"] = "bf16"
    bucket: int = 512

    def __post_init__(self) -> None:
        if self.to not in ("bf16", "fp16", "int8"):
            raise ValueError(f"cannot cast to {self.to!r}; allowed are 'bf16', 'fp16' and 'int8'")
        if self.bucket < 1:
            raise ValueError(f"bucket is {self.bucket}; it must be at least 1 element")

    def contraction(self, length: int) -> float | None:
        """From the rounding error: half a unit in the last place, or half an integer of the bucket's largest element.

        For ``"fp16"`` it holds for magnitudes of at least 6e-5.
        """
        if self.to == "int8":
            # Worst: one element of 127 steps, all others of half a step, which vanish.
            lost = max(min(self.bucket, length) - 1, 0) / 254**2
            return 1 / (1 + lost)
        return 1 - 2.0 ** (-16 if self.to == "bf16" else -22)

    def layout(self, segments: Sequence[int], dtype: torch.dtype) -> Layout:
        """The rounded values; for ``"int8"`` the scales before them."""
        if self.to == "int8":
            return [(compute_dtype(dtype), bucket_count(segments, self.bucket)), (torch.int8, sum(segments))]
        return [(torch.bfloat16 if self.to == "bf16" else torch.float16, sum(segments))]

    def _encode(
        self,
        flat: Tensor,
        segments: tuple[int, ...],
        generator: torch.Generator | None,
        fields: list[Tensor],
        check: FiniteCheck,
    ) -> None:
        if self.to != "int8":
            check.require(fields[0].copy_(flat), self, f"input, as {self.to},")
            return
        scales, codes = fields
        if kernels.available(flat):
            from lightning_slowmo.compression.kernels.quantize import quantize

            quantize(flat, segments, self.bucket, 127, scales, codes)
            check.require(scales, self)
            return
        block = _Blocks(flat, scales.dtype, segments, self.bucket)
        for panel, values in block:
            largest = block.largest(values, out=scales[panel.bucket : panel.bucket + panel.rows])
            values.mul_(_inverse(largest, 127)).round_().clamp_(-127, 127)
            codes[panel.start : panel.stop].view_as(values).copy_(values)
        check.require(scales, self)

    def _decode(self, fields: list[Tensor], segments: tuple[int, ...], dtype: torch.dtype, out: Tensor) -> None:
        if self.to != "int8":
            out.copy_(fields[0])
            return
        scales, codes = fields
        if kernels.available(out):
            from lightning_slowmo.compression.kernels.quantize import dequantize

            dequantize(codes, scales, segments, self.bucket, 127, out)
            return
        for panel in panels(segments, self.bucket, block_length(out.device)):
            values = out[panel.start : panel.stop].view(panel.rows, panel.width)
            values.copy_(codes[panel.start : panel.stop].view_as(values))
            values.mul_(scales[panel.bucket : panel.bucket + panel.rows, None] / 127)


@dataclass(frozen=True)
class QSGD(Compressor):
    """Unbiased stochastic rounding to ``2 s + 1`` equidistant levels between minus and plus the norm of a bucket.

    With ``a = s |x_i| / |x|_2`` the element becomes ``|x|_2 sign(x_i) / s`` times ``floor(a)`` or ``floor(a) + 1``, the
    latter with probability ``f = a - floor(a)``. The error of a bucket of ``d`` elements is, in expectation, exactly
    ``|x|_2^2 / s^2 * sum f (1 - f)``, which is at most ``min(d / s^2, sqrt(d) / s) |x|_2^2``. A zero stays zero.

    Probabilities have 24 random bits: 8 for each element, and 16 that the bucket shares, so that each element by itself
    is rounded with the right probability to 2**-24 of a level (plus the rounding of ``x`` itself). They are a function
    of one number that is drawn from the generator, of the bucket, and of the place in it (:class:`QuantizerNoise`).

    Args:
        bits: bits for an element, sign included, 2 to 16: ``s = 2**(bits - 1) - 1`` levels. Default: 4.
        levels: ``s`` itself, 1 to 32767; overrides ``bits``.
        bucket: elements that share a norm. Buckets do not cross tensors. Default: ``s**2`` rounded up to a power of
            two, within 64 and 4096, so that from 4 bits on the variance is at most about the square of the norm; each
            norm costs 32 bits (64 for float64).
        norm: ``"l2"`` (default), the paper's; or ``"max"``, the largest magnitude, which the paper's experiments use:
            unbiased as well, with far less variance in large buckets. Prefer it, with ``bucket=512``, at 4 bits or
            less.
        contractive: divide by ``1 + min(d / s^2, sqrt(d) / s)``: biased, but then always a contraction, as CHOCO-SGD
            wants it.

    Example:
        >>> qsgd = QSGD(bits=4, bucket=64)
        >>> qsgd.payload_bytes([1024])  # 4 bits for each of 1024 elements and 16 norms
        576

    References:
        Alistarh et al. 2017 (arXiv 1610.02132); Koloskova, Stich and Jaggi 2019 (arXiv 1902.00340) for the scaling.
    """

    bits: int = 4
    levels: int | None = None
    bucket: int | None = None
    norm: Literal["l2", "max"] = "l2"
    contractive: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise ValueError(f"bits is {self.bits}; allowed are 2 to 16 (1 bit is Sign)")
        if self.levels is not None and not 1 <= self.levels <= 32767:
            raise ValueError(f"levels is {self.levels}; allowed are 1 to 32767")
        if self.bucket is not None and self.bucket < 1:
            raise ValueError(f"bucket is {self.bucket}; it must be at least 1 element")
        if self.norm not in ("l2", "max"):
            raise ValueError(f"norm is {self.norm!r}; allowed are 'l2' and 'max'")

    @property
    def unbiased(self) -> bool:
        """True unless ``contractive``."""
        return not self.contractive

    @property
    def stochastic(self) -> bool:
        """Always true."""
        return True

    def variance(self, length: int) -> float:
        """Bound on ``E|x - Q(x)|^2 / |x|^2`` for the unbiased quantizer and a tensor of ``length`` elements."""
        width, levels = min(length, self.bucket_length), self._levels
        return min(width / levels**2, sqrt(width) / levels)

    def contraction(self, length: int) -> float | None:
        """``1 / (1 + variance)`` if ``contractive``, else ``1 - variance`` where that is positive."""
        variance = self.variance(length)
        return 1 / (1 + variance) if self.contractive else variance_contraction(variance)

    def layout(self, segments: Sequence[int], dtype: torch.dtype) -> Layout:
        """One norm a bucket, then the packed levels of all tensors."""
        return [
            (compute_dtype(dtype), bucket_count(segments, self.bucket_length)),
            (torch.uint8, packed_bytes(sum(segments), self._code_bits)),
        ]

    @property
    def _levels(self) -> int:
        return self.levels or 2 ** (self.bits - 1) - 1

    @property
    def _code_bits(self) -> int:
        return (2 * self._levels).bit_length()

    @property
    def bucket_length(self) -> int:
        """Elements that share a norm."""
        return self.bucket or min(max(1 << (self._levels**2 - 1).bit_length(), 64), 4096)

    def _encode(
        self,
        flat: Tensor,
        segments: tuple[int, ...],
        generator: torch.Generator | None,
        fields: list[Tensor],
        check: FiniteCheck,
    ) -> None:
        if generator is None:  # compress has checked; this tells the type checker
            raise ValueError("a generator is needed")
        norms, packed = fields
        levels, device = self._levels, flat.device
        key = draw_key(generator, device)
        if kernels.available(flat):
            from lightning_slowmo.compression.kernels.quantize import quantize

            # A code has up to 16 bits, whose pattern counts and not their sign.
            codes = torch.empty(flat.numel(), dtype=torch.uint8 if self._code_bits <= 8 else torch.int16, device=device)
            quantize(flat, segments, self.bucket_length, levels, norms, codes, self.norm, key)
            check.require(norms, self)
            pack(codes, self._code_bits, packed)
            return
        codes = torch.empty(flat.numel(), dtype=torch.int8 if self._code_bits <= 8 else torch.int32, device=device)
        block = _Blocks(flat, norms.dtype, segments, self.bucket_length)
        random = QuantizerNoise(key, self.bucket_length, norms.numel(), max(panel.rows for panel in block.panels))
        for panel, values in block:
            buckets, elements = slice(panel.bucket, panel.bucket + panel.rows), slice(panel.start, panel.stop)
            if self.norm == "l2":
                torch.linalg.vector_norm(values, dim=1, out=norms[buckets])
            else:
                block.largest(values, out=norms[buckets])
            # floor(y + u) with u uniform in [0, 1) rounds y up with probability y - floor(y), whatever its sign. Here
            # u = fine / 2^8 + shared / 2^24, whose largest value is still below 1 in float32.
            shared = (random.coarse[buckets, None].to(torch.int32) & 0xFFFF).to(values.dtype).mul_(2.0**-24)
            noise = block.second[: values.numel()].view_as(values)
            noise.copy_(random.fine(panel.bucket, panel.rows, panel.width))
            values.mul_(_inverse(norms[buckets], levels)).add_(shared).add_(noise, alpha=2.0**-8)
            codes[elements].view_as(values).copy_(values.floor_().clamp_(-levels, levels))
        check.require(norms, self)
        codes.add_(levels)
        pack(codes.view(torch.uint8) if codes.dtype == torch.int8 else codes, self._code_bits, packed)

    def _decode(self, fields: list[Tensor], segments: tuple[int, ...], dtype: torch.dtype, out: Tensor) -> None:
        norms, packed = fields
        if kernels.available(out):
            from lightning_slowmo.compression.kernels.quantize import dequantize

            steps = _contracted_steps(self, segments, out.dtype, out.device) if self.contractive else None
            dequantize(packed, norms, segments, self.bucket_length, self._levels, out, self._code_bits, steps)
            return
        codes = unpack(packed, out.numel(), self._code_bits)
        codes = (codes.view(torch.int8) if codes.dtype == torch.uint8 else codes).sub_(self._levels)
        for panel in panels(segments, self.bucket_length, block_length(out.device)):
            values = out[panel.start : panel.stop].view(panel.rows, panel.width)
            values.copy_(codes[panel.start : panel.stop].view_as(values))
            step = self.divisor(panel.width)
            values.mul_(norms[panel.bucket : panel.bucket + panel.rows, None] / step)

    def divisor(self, width: int) -> float:
        """What the norm of a bucket of ``width`` elements is divided by to get the distance of its levels."""
        return self._levels * (1 + self.variance(width)) if self.contractive else self._levels


class _Blocks:
    """The panels of a vector, each copied into one reused buffer, so that the passes over it stay in the cache."""

    def __init__(self, flat: Tensor, dtype: torch.dtype, segments: tuple[int, ...], bucket: int) -> None:
        self.flat = flat
        self.panels = panels(segments, bucket, block_length(flat.device))
        longest = max(panel.stop - panel.start for panel in self.panels)
        self.first, self.second = torch.empty(2, longest, dtype=dtype, device=flat.device)

    def __iter__(self) -> Iterator[tuple[Panel, Tensor]]:
        for panel in self.panels:
            values = self.first[: panel.stop - panel.start].copy_(self.flat[panel.start : panel.stop])
            yield panel, values.view(panel.rows, panel.width)

    def largest(self, values: Tensor, out: Tensor) -> Tensor:
        """Largest magnitude of each row."""
        magnitudes = torch.abs(values, out=self.second[: values.numel()].view_as(values))
        return torch.amax(magnitudes, dim=1, out=out)


def _inverse(scale: Tensor, steps: int) -> Tensor:
    """``steps / scale`` as a column, and 0 where the scale is 0 or so small that the quotient would overflow."""
    return torch.where(scale > torch.finfo(scale.dtype).tiny * 2**16, scale.reciprocal() * steps, 0)[:, None]


@lru_cache(maxsize=64)
def _contracted_steps(qsgd: QSGD, segments: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The step of each bucket, which depends on its length."""
    cuts = panels(segments, qsgd.bucket_length, block_length(device))
    steps = torch.tensor([qsgd.divisor(panel.width) for panel in cuts], dtype=torch.float64)
    return steps.repeat_interleave(torch.tensor([panel.rows for panel in cuts])).to(device, dtype)
