"""What every compressor is: a flat float vector in, one ``uint8`` payload of a known size out, and back."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_slowmo.compression.finite import FiniteCheck

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

Layout = list[tuple[torch.dtype, int]]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that holds scales, residuals and intermediate results for values of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Decoded(NamedTuple):
    """What a payload says of a vector.

    Attributes:
        values: its elements, or some of them; the others are 0.
        places: which ones, int64, each once; None for all.
    """

    values: Tensor
    places: Tensor | None = None

    def add_to(self, vector: Tensor, alpha: float = 1.0) -> None:
        """Add ``alpha`` times the decoded vector, at a cost of the elements that it tells of."""
        if self.places is None:
            vector.add_(self.values, alpha=alpha)
        else:
            vector.index_add_(0, self.places, self.values, alpha=alpha)


class Compressor(ABC):
    """Base of all compressors: frozen dataclasses without state, equal when their fields are equal.

    A subclass says what its payload is made of (:meth:`layout`), fills those fields and reads them. The size of a
    payload is therefore known before there are any values, and a receiver can prepare its buffers.

    The vector is made of consecutive ``segments``, one for each tensor, some of which may be empty. Algorithms pass a
    bucket of the model or a worker's chunk of one, in which a large tensor has a part alone: what is said of a tensor
    (its scale, its largest elements) holds for each of these parts. Arithmetic and the scales on the wire are float32,
    or float64 for a float64 vector.
    """

    @property
    def unbiased(self) -> bool:
        """Whether the expectation of the decoded vector is the vector."""
        return False

    @property
    def stochastic(self) -> bool:
        """Whether :meth:`compress` draws random numbers and needs a generator."""
        return False

    @abstractmethod
    def contraction(self, length: int) -> float | None:
        """Guaranteed contraction for one tensor of ``length`` elements.

        Returns:
            The largest known omega with ``E|x - C(x)|^2 <= (1 - omega) |x|^2`` for every ``x``, up to rounding; None
            when no positive omega holds.
        """

    def share(self, length: int) -> float:
        """Share of the elements of a tensor of which one message tells anything."""
        return 1.0

    @abstractmethod
    def layout(self, segments: Sequence[int], dtype: torch.dtype) -> Layout:
        """Types and element counts of the payload's fields, the widest type first so that all are aligned."""

    @abstractmethod
    def _encode(
        self,
        flat: Tensor,
        segments: tuple[int, ...],
        generator: torch.Generator | None,
        fields: list[Tensor],
        check: FiniteCheck,
    ) -> None:
        """Fill ``fields``, which are views of the payload, and have ``check`` require that they are finite."""

    @abstractmethod
    def _decode(self, fields: list[Tensor], segments: tuple[int, ...], dtype: torch.dtype, out: Tensor) -> None:
        """Fill ``out``, of type ``compute_dtype(dtype)``, from the fields of a vector of ``dtype``."""

    def payload_bytes(self, segments: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
        """Size of the payload in bytes, exactly; values have no influence on it."""
        return sum(kind.itemsize * count for kind, count in _layout(self, tuple(segments), dtype))

    def compress(
        self, flat: Tensor, segments: Sequence[int] | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Encode a vector.

        Args:
            flat: contiguous 1-D tensor of float32, float64, bfloat16 or float16.
            segments: lengths of the tensors in ``flat``. Default: all of it is one tensor.
            generator: source of randomness, on the device of ``flat`` or on the CPU; needed if :attr:`stochastic`. One
                number is drawn from it for each compressor in a chain. The global generator is never used.

        Returns:
            1-D ``uint8`` tensor of ``payload_bytes(segments, flat.dtype)`` bytes.

        Raises:
            ValueError: if an argument does not fit, or if ``flat`` is not finite.
        """
        check = FiniteCheck()
        payload = self.encode(flat.detach(), _checked_segments(flat, segments), generator, check)
        check.close()
        return payload

    def encode(
        self, flat: Tensor, segments: tuple[int, ...], generator: torch.Generator | None, check: FiniteCheck
    ) -> Tensor:
        """As :meth:`compress`, with a check that the caller closes."""
        if self.stochastic and generator is None:
            raise ValueError(f"{self} draws random numbers: pass a generator, such as seeded_generator(seed, rank)")
        payload = torch.empty(self.payload_bytes(segments, flat.dtype), dtype=torch.uint8, device=flat.device)
        if not flat.numel():
            return payload.zero_()
        self._encode(flat, segments, generator, self._fields(payload, segments, flat.dtype), check)
        return payload

    def decompress(
        self,
        payload: Tensor,
        segments: Sequence[int],
        dtype: torch.dtype = torch.float32,
        out: Tensor | None = None,
    ) -> Tensor:
        """Decode a payload; equal payloads give equal bits on every worker.

        Args:
            payload: what :meth:`compress` returned, here or on another worker.
            segments: the lengths that were given to :meth:`compress`.
            dtype: the type of the vector that was compressed.
            out: vector of that type to write into. Default: a new one.

        Returns:
            1-D tensor of ``sum(segments)`` elements.

        Raises:
            ValueError: if the payload's or ``out``'s type or size does not fit.
        """
        segments = tuple(segments)
        fields = self._checked_fields(payload, segments, dtype)
        shape = (sum(segments),)
        if out is None:
            out = torch.empty(shape, dtype=dtype, device=payload.device)
        elif out.shape != shape or out.dtype != dtype or not out.is_contiguous():
            raise ValueError(
                f"out is {out.dtype} of shape {tuple(out.shape)}, expected contiguous {dtype} of shape {shape}"
            )
        if out.numel():
            exact = out if out.dtype == compute_dtype(dtype) else torch.empty_like(out, dtype=compute_dtype(dtype))
            self._decode(fields, segments, dtype, exact)
            if exact is not out:
                out.copy_(exact)
        return out

    def decode(self, payload: Tensor, segments: Sequence[int], dtype: torch.dtype = torch.float32) -> Decoded:
        """Decode a payload to what it says, which may be less than a whole vector; otherwise as :meth:`decompress`."""
        return Decoded(self.decompress(payload, segments, dtype))

    def _checked_fields(self, payload: Tensor, segments: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
        _check_dtype(dtype)
        expected = self.payload_bytes(segments, dtype)
        if payload.dtype != torch.uint8 or payload.shape != (expected,):
            raise ValueError(
                f"payload is {payload.dtype} of shape {tuple(payload.shape)}, but {self} makes uint8 of shape "
                f"({expected},) from {sum(segments)} elements of {dtype}"
            )
        # Fields are read in place, which a slice of a receive buffer may not allow.
        aligned = payload.is_contiguous() and payload.storage_offset() % 8 == 0 and payload.data_ptr() % 8 == 0
        return self._fields(payload if aligned else payload.clone(), segments, dtype)

    def _fields(self, payload: Tensor, segments: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
        fields, begin = [], 0
        for kind, count in _layout(self, segments, dtype):
            end = begin + kind.itemsize * count
            fields.append(payload[begin:end].view(kind))
            begin = end
        return fields


@lru_cache(maxsize=256)
def _layout(compressor: Compressor, segments: tuple[int, ...], dtype: torch.dtype) -> Layout:
    """A layout takes longer to compute, for hundreds of tensors, than a small vector on a GPU to compress."""
    return compressor.layout(segments, dtype)


def variance_contraction(variance: float) -> float | None:
    """Contraction of an unbiased compressor with ``E|x - C(x)|^2 <= variance |x|^2``."""
    return 1 - variance if variance < 1 else None


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise ValueError(f"cannot compress {dtype}; allowed are {', '.join(map(str, FLOATS))}")


def _checked_segments(flat: Tensor, segments: Sequence[int] | None) -> tuple[int, ...]:
    _check_dtype(flat.dtype)
    if flat.dim() != 1 or not flat.is_contiguous():
        raise ValueError(f"expected a contiguous 1-D tensor, got shape {tuple(flat.shape)}, stride {flat.stride()}")
    segments = (flat.numel(),) if segments is None else tuple(segments)
    if sum(segments) != flat.numel() or min(segments, default=0) < 0:
        raise ValueError(
            f"segments add up to {sum(segments)}, but there are {flat.numel()} elements; none may be negative"
        )
    return segments
