"""Few elements of each tensor: the largest, or random ones. What is kept may be compressed further."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from math import ceil, sqrt
from typing import ClassVar

import torch
from torch import Tensor

from lightning_slowmo.compression import kernels
from lightning_slowmo.compression.base import (
    Compressor,
    Decoded,
    Layout,
    compute_dtype,
    variance_contraction,
)
from lightning_slowmo.compression.bins import Bins
from lightning_slowmo.compression.finite import FiniteCheck
from lightning_slowmo.compression.hashing import draw_key, hashed
from lightning_slowmo.compression.indices import decode_indices, encode_indices, index_bytes, nonzero
from lightning_slowmo.compression.quantize import Identity
from lightning_slowmo.compression.segments import block_length, pieces
from lightning_slowmo.compression.sign import Sign

_SAMPLE = 1 << 14


@dataclass(frozen=True)
class _Sparsifier(Compressor):
    """Sends some elements of each tensor, through the compressor ``values``, and says which they are."""

    fraction: float = 0.01
    k: int | None = None
    values: Compressor = field(default_factory=Identity)

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction is {self.fraction}; it must be above 0 and at most 1")
        if self.k is not None and self.k < 1:
            raise ValueError(f"k is {self.k}; it must be at least 1 element of each tensor")
        if not isinstance(self.values, Compressor):
            raise ValueError(f"values is {self.values!r}; it must be a compressor for the elements that are kept")

    @property
    def stochastic(self) -> bool:
        """Whether ``values`` is."""
        return self.values.stochastic

    def kept(self, length: int) -> int:
        """Number of elements kept of a tensor: ``max(1, ceil(fraction * length))``, or ``k`` if there are as many."""
        return min(length, self.k or max(1, ceil(self.fraction * length)))

    def share(self, length: int) -> float:
        """``k / d``."""
        return self.kept(length) / length if length else 1.0

    def contraction(self, length: int) -> float | None:
        """``k / d`` times the contraction of ``values``: what is dropped and what is changed are orthogonal."""
        kept = self.kept(length)
        inner = self.values.contraction(kept)
        return inner * kept / length if inner and length else inner

    def layout(self, segments: Sequence[int], dtype: torch.dtype) -> Layout:
        """The payload of ``values`` for the kept elements, then their places."""
        counts = self._counts(segments)
        places = index_bytes(sum(segments), sum(counts))
        return [(torch.uint8, self.values.payload_bytes(counts, dtype)), (torch.uint8, places)]

    def decode(self, payload: Tensor, segments: Sequence[int], dtype: torch.dtype = torch.float32) -> Decoded:
        """The elements that were kept."""
        segments = tuple(segments)
        fields = self._checked_fields(payload, segments, dtype)
        if not sum(segments):
            return super().decode(payload, segments, dtype)
        values, places = self._kept_elements(fields, segments, dtype)
        return Decoded(values.to(dtype), places)

    def _decode(self, fields: list[Tensor], segments: tuple[int, ...], dtype: torch.dtype, out: Tensor) -> None:
        values, places = self._kept_elements(fields, segments, dtype)
        out.zero_().index_copy_(0, places, values.to(out.dtype))

    @abstractmethod
    def _kept_elements(
        self, fields: list[Tensor], segments: tuple[int, ...], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Values and places, from the fields of a payload that is not empty."""

    def _counts(self, segments: Sequence[int]) -> tuple[int, ...]:
        return _kept_counts(self, tuple(segments))


@dataclass(frozen=True)
class TopK(_Sparsifier):
    """Sends the elements of largest magnitude of each tensor, exactly; among equals, those of lowest index.

    Args:
        fraction: share of each tensor that is kept, in (0, 1]: ``max(1, ceil(fraction * length))`` elements.
            Default: 0.01.
        k: number of elements of each tensor; overrides ``fraction``.
        values: compressor for the kept elements, such as ``QSGD(8, norm="max")`` or ``Cast("bf16")``. Default: as they
            are.

    Example:
        >>> top = TopK(k=2)
        >>> payload = top.compress(torch.tensor([1.0, -4.0, 0.0, 3.0]))
        >>> top.decompress(payload, (4,))
        tensor([ 0., -4.,  0.,  3.])

    References:
        Stich, Cordonnier and Jaggi 2018 (arXiv 1809.07599). The places are sent in the Elias-Fano code.
    """

    def _encode(
        self,
        flat: Tensor,
        segments: tuple[int, ...],
        generator: torch.Generator | None,
        fields: list[Tensor],
        check: FiniteCheck,
    ) -> None:
        check.require(flat, self)
        lengths, counts = self._cut(segments)
        if kernels.available(flat):
            from lightning_slowmo.compression.kernels import select

            indices = select.top_indices(flat, lengths, counts)
        else:
            begins = accumulate(lengths, initial=0)
            parts = zip(flat.split(lengths), counts, begins, strict=False)
            indices = torch.cat([top_indices(part, count).add_(begin) for part, count, begin in parts])
        payload, places = fields
        payload.copy_(self.values.encode(flat.index_select(0, indices), self._counts(segments), generator, check))
        encode_indices(indices, flat.numel(), places)

    def _cut(self, segments: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Lengths of the pieces of which the largest are taken each, and how many."""
        return segments, self._counts(segments)

    def _kept_elements(
        self, fields: list[Tensor], segments: tuple[int, ...], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        payload, places = fields
        counts = self._counts(segments)
        values = self.values.decompress(payload, counts, dtype)
        return values, decode_indices(places, sum(segments), sum(counts))


@dataclass(frozen=True)
class SignTopK(TopK):
    """Sends the signs of the largest elements of each tensor, times their mean magnitude: SQuARM-SGD's compressor.

    ``C(x)`` is ``|x_S|_1 / k * sign(x)`` on the ``k`` largest elements ``S`` and 0 elsewhere; the error is exactly
    ``|x|_2^2 - |x_S|_1^2 / k``. One bit cannot say zero: if there are fewer than ``k`` nonzero elements, the zeros
    among the kept ones decode to plus the scale.

    Args:
        fraction: share of each tensor that is kept, in (0, 1]. Default: 0.01.
        k: number of elements of each tensor; overrides ``fraction``.

    References:
        Basu, Data, Karakus and Diggavi 2019 (arXiv 1906.02367); Singh, Data, George and Diggavi 2020
        (arXiv 2005.07041).
    """

    values: ClassVar[Compressor] = Sign()  # type: ignore[misc]  # no argument, and so no attribute of an instance

    def contraction(self, length: int) -> float | None:
        """``min(1 / k, k / d)``: the worst cases are one large element and equal elements."""
        kept = self.kept(length)
        return min(1 / kept, kept / length) if length else 1.0


@dataclass(frozen=True)
class ChunkedTopK(TopK):
    """Sends the largest elements of each chunk of a tensor, so that every part of it has its share.

    Args:
        k: number of elements of each chunk; a chunk that is shorter than that is sent whole. Default: 64.
        values: compressor for the kept elements of each tensor. Default: 2 bits, as in SparseLoCo.
        chunk: elements of a chunk, one after the other in memory; the last one of a tensor may be shorter.

    References:
        SparseLoCo (arXiv 2508.15706), whose code cuts matrices into blocks of 64 x 64, which are 4096 elements as well.
    """

    fraction: ClassVar[float] = 1.0  # type: ignore[misc]  # no argument: ``k`` says how many
    k: int | None = 64
    values: Compressor = field(default_factory=Bins)
    chunk: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k is None or self.chunk < 1:
            raise ValueError(f"k is {self.k} and chunk is {self.chunk}; both must be at least 1 element")

    def kept(self, length: int) -> int:
        """``k`` elements of each chunk, or all of a shorter one."""
        full, rest = divmod(length, self.chunk)
        most = self.k or 0
        return full * min(self.chunk, most) + min(rest, most)

    def _cut(self, segments: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        lengths = tuple(piece.stop - piece.start for piece in pieces(segments, self.chunk))
        return lengths, tuple(min(length, self.k or 0) for length in lengths)


@dataclass(frozen=True)
class RandomK(_Sparsifier):
    """Sends random elements of each tensor, and 8 bytes from which every worker finds their places.

    A tensor is cut into ``k`` stretches, one element is drawn from each, and the whole is rotated at random. Every
    element is thus kept with probability ``k / d`` exactly (to 2**-38), so that expectation and mean squared error are
    those of a uniformly random subset; joint probabilities differ, for the elements are spread evenly.

    Args:
        fraction: share of each tensor that is kept, in (0, 1]. Default: 0.01.
        k: number of elements of each tensor; overrides ``fraction``.
        values: compressor for the kept elements. Default: as they are.
        rescale: multiply what is kept by ``d / k``: unbiased, but not a contraction unless more than half is kept.

    References:
        Stich, Cordonnier and Jaggi 2018 (arXiv 1809.07599); Wangni et al. 2018 (arXiv 1710.09854).
    """

    rescale: bool = False

    @property
    def stochastic(self) -> bool:
        """Always true."""
        return True

    @property
    def unbiased(self) -> bool:
        """Whether kept elements are scaled up and ``values`` is unbiased."""
        return self.rescale and self.values.unbiased

    def contraction(self, length: int) -> float | None:
        """As documented for ``rescale=False``; with it, ``2 - d / k`` for exact values."""
        if not self.rescale or not length:
            return super().contraction(length)
        kept = self.kept(length)
        inner = self.values.contraction(kept)
        if inner is None or not self.values.unbiased:
            return None
        return variance_contraction(length / kept * (2 - inner) - 1)

    def layout(self, segments: Sequence[int], dtype: torch.dtype) -> Layout:
        """The seed of the places, then the payload of ``values`` for the kept elements."""
        return [(torch.int64, 1), (torch.uint8, self.values.payload_bytes(self._counts(segments), dtype))]

    def _encode(
        self,
        flat: Tensor,
        segments: tuple[int, ...],
        generator: torch.Generator | None,
        fields: list[Tensor],
        check: FiniteCheck,
    ) -> None:
        check.require(flat, self)
        if generator is None:  # compress has checked; this tells the type checker
            raise ValueError("a generator is needed")
        seed, payload = fields
        seed.copy_(draw_key(generator, flat.device))
        values = flat.index_select(0, self._indices(seed, segments))
        payload.copy_(self.values.encode(values, self._counts(segments), generator, check))

    def _kept_elements(
        self, fields: list[Tensor], segments: tuple[int, ...], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        seed, payload = fields
        counts = self._counts(segments)
        values = self.values.decompress(payload, counts, dtype).to(compute_dtype(dtype))
        if self.rescale:
            values *= _gains(segments, counts, values.dtype, values.device)
        return values, self._indices(seed, segments)

    def _indices(self, seed: Tensor, segments: tuple[int, ...]) -> Tensor:
        """Places of the kept elements, a function of the seed alone."""
        if kernels.available(seed):
            from lightning_slowmo.compression.kernels.places import random_places

            return random_places(seed, segments, self._counts(segments))
        counts = torch.tensor(self._counts(segments))
        lengths = torch.tensor(segments)
        begins, firsts = lengths.cumsum(0) - lengths, counts.cumsum(0) - counts
        table = torch.stack([counts, lengths, begins, firsts, torch.arange(len(segments))])
        count, length, begin, first, segment = table.repeat_interleave(counts, dim=1).to(seed.device)
        position = torch.arange(count.numel(), device=seed.device)
        stretch = position - first
        low, high = stretch * length // count, (stretch + 1) * length // count
        place = low + hashed(seed, position) % (high - low)
        rotation = hashed(seed, -1 - segment) % length
        return begin + (place + rotation) % length


@lru_cache(maxsize=256)
def _kept_counts(sparsifier: _Sparsifier, segments: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(map(sparsifier.kept, segments))


@lru_cache(maxsize=16)
def _gains(segments: tuple[int, ...], counts: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """For each kept element, the length of its tensor over the number that is kept of it."""
    gains = [length / count if count else 1.0 for length, count in zip(segments, counts, strict=True)]
    return torch.tensor(gains, dtype=dtype).repeat_interleave(torch.tensor(counts)).to(device)


def top_indices(values: Tensor, k: int) -> Tensor:
    """Indices of the ``k`` largest magnitudes, in increasing order; among equals the lowest indices win.

    A threshold from a sample leaves a few more than ``k`` candidates, among which the selection is exact.

    Args:
        values: 1-D float tensor without NaN.
        k: how many; at most ``len(values)``.

    Returns:
        int64 tensor of ``k`` indices.
    """
    length = values.numel()
    if k in (0, length):
        return torch.arange(k, device=values.device)
    if kernels.available(values):
        from lightning_slowmo.compression.kernels import select

        return select.top_indices(values, (length,), (k,))
    candidates = _candidates(values, k) if length >= _SAMPLE and 4 * k <= length else None
    magnitudes = (values if candidates is None else values.index_select(0, candidates)).abs()
    smallest = torch.topk(magnitudes, k, sorted=False).values.amin()
    chosen = magnitudes > smallest
    ties = torch.nonzero(magnitudes == smallest).view(-1)
    chosen[ties[: k - int(chosen.sum())]] = True
    found = nonzero(chosen.view(torch.uint8))
    return found if candidates is None else candidates.index_select(0, found)


def _candidates(values: Tensor, k: int) -> Tensor | None:
    """Few indices that are certain to hold the largest ``k``; None if the sample misled."""
    length, device = values.numel(), values.device
    sample = min(_SAMPLE, length // 32)
    # Multiples of the golden section of the length: evenly spread, and in step with no period of the weights.
    places = torch.arange(sample, device=device) * int(0.6180339887 * length) % length
    expected = k / length * sample
    rank = min(ceil(expected + 4 * sqrt(expected) + 4), sample)  # four standard deviations: few samples mislead
    threshold = torch.topk(values.index_select(0, places).abs(), rank, sorted=False).values.amin()
    sparse = not threshold  # nearly all are zero: take what is not
    mask = torch.empty(length, dtype=torch.uint8, device=device)
    block = block_length(device)
    scratch = torch.empty(min(block, length), dtype=values.dtype, device=device)
    for start in range(0, length, block):
        part = torch.abs(values[start : start + block], out=scratch[: min(block, length - start)])
        mask[start : start + block].copy_(part.gt_(0) if sparse else part.ge_(threshold))
    found = nonzero(mask)
    if sparse:
        mask[: k + found.numel()] = 1  # among these are k zeros of lowest index, if so many are needed
        return nonzero(mask)
    return found if found.numel() >= k else None
