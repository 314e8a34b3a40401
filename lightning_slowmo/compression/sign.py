"""One bit an element: the sign, and one scale for each tensor."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import sqrt
from typing import Literal

import torch
from torch import Tensor

from lightning_slowmo.compression import kernels
from lightning_slowmo.compression.base import Compressor, Layout, compute_dtype
from lightning_slowmo.compression.finite import FiniteCheck
from lightning_slowmo.compression.packing import pack, packed_bytes, unpack
from lightning_slowmo.compression.segments import block_length, pieces


@dataclass(frozen=True)
class Sign(Compressor):
    """Signs, times the mean magnitude of their tensor.

    ``C(x) = scale * sign(x)`` with ``sign(0) = +1``, for one bit cannot say zero; a tensor of zeros has scale 0 and
    decodes to exact zeros. With ``"l1"`` the scale is ``|x|_1 / d``: the best one, always a contraction, with error
    ``|x|_2^2 - |x|_1^2 / d``. With ``"l2"`` it is ``|x|_2 / sqrt(d)``: the norm is kept, as in the code of APMSqueeze's
    first author and in 1-bit Adam, but the error ``2 |x|_2^2 - 2 |x|_1 |x|_2 / sqrt(d)`` exceeds ``|x|_2^2`` for sparse
    vectors, so use it with error feedback only.

    Args:
        scale: ``"l1"`` (default) or ``"l2"``.

    Example:
        >>> sign = Sign("l1")
        >>> payload = sign.compress(torch.tensor([3.0, -1.0, 2.0]))
        >>> sign.decompress(payload, (3,))
        tensor([ 2., -2.,  2.])

    References:
        Bernstein et al. 2018 (arXiv 1802.04434); Karimireddy et al. 2019 (arXiv 1901.09847); Tang et al. 2020
        (arXiv 2008.11343).
    """

    scale: Literal["l1", "l2"] = "l1"

    def __post_init__(self) -> None:
        if self.scale not in ("l1", "l2"):
            raise ValueError(f"scale is {self.scale!r}; allowed are 'l1' and 'l2'")

    def contraction(self, length: int) -> float | None:
        """``1 / d`` (one large element) with ``"l1"``; with ``"l2"`` none for more than 3 elements."""
        length = max(length, 1)
        omega = 1 / length if self.scale == "l1" else 2 / sqrt(length) - 1
        return omega if omega > 0 else None

    def layout(self, segments: Sequence[int], dtype: torch.dtype) -> Layout:
        """One scale a tensor, then one bit an element."""
        return [(compute_dtype(dtype), len(segments)), (torch.uint8, packed_bytes(sum(segments), 1))]

    def _encode(
        self,
        flat: Tensor,
        segments: tuple[int, ...],
        generator: torch.Generator | None,
        fields: list[Tensor],
        check: FiniteCheck,
    ) -> None:
        scales, packed = fields
        if kernels.available(flat):
            from lightning_slowmo.compression.kernels.quantize import signs as make_signs
            from lightning_slowmo.compression.kernels.tables import lengths

            ones = make_signs(flat, segments, scales, l2=self.scale == "l2")
            sizes = lengths(segments, scales.dtype, scales.device)
            scales /= sizes if self.scale == "l1" else sizes.sqrt()
            check.require(scales, self)
            pack(ones, 1, packed)
            return
        signs = torch.empty(flat.numel(), dtype=torch.int8, device=flat.device)
        cuts = pieces(segments, block_length(flat.device))
        norms = scales.new_empty(len(cuts))
        values, magnitudes = scales.new_empty(2, min(flat.numel(), block_length(flat.device)))
        for norm, (_, start, stop) in zip(norms, cuts, strict=True):
            part = values[: stop - start].copy_(flat[start:stop])
            if self.scale == "l1":
                torch.sum(torch.abs(part, out=magnitudes[: stop - start]), dim=0, out=norm)
            else:
                torch.linalg.vector_norm(part, out=norm)
            # The comparison stays in floats: a boolean result would leave the vectorized path.
            signs[start:stop].copy_(part.ge_(0))
        scales.zero_()
        order = 1 if self.scale == "l1" else 2
        begin = 0
        for segment, group in groupby(cuts, key=lambda piece: piece.segment):
            end = begin + len(list(group))
            torch.linalg.vector_norm(norms[begin:end], order, out=scales[segment])
            begin = end
        dimensions = torch.tensor(segments, dtype=scales.dtype, device=scales.device).clamp_(min=1)
        scales /= dimensions if self.scale == "l1" else dimensions.sqrt()
        check.require(scales, self)
        pack(signs.view(torch.uint8), 1, packed)

    def _decode(self, fields: list[Tensor], segments: tuple[int, ...], dtype: torch.dtype, out: Tensor) -> None:
        scales, packed = fields
        if kernels.available(out):
            from lightning_slowmo.compression.kernels.quantize import decode_signs

            decode_signs(packed, scales, segments, out)
            return
        signs = unpack(packed, out.numel(), 1).view(torch.int8).mul_(2).sub_(1)
        for segment, start, stop in pieces(segments, block_length(out.device)):
            out[start:stop].copy_(signs[start:stop]).mul_(scales[segment])
