"""How a flat vector is cut: tensors into blocks that fit in the cache, or into the buckets of a quantizer.

``segments`` are the lengths of the tensors that lie one after another in the vector. Nothing here looks at values, so
sizes and cuts are the same on every worker.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch

# A block of float32 values and its scratch copy stay in two cores' second-level caches; more costs memory traffic,
# less costs dispatch. An accelerator would rather have few large kernels.
_CPU_BLOCK = 1 << 18
_DEVICE_BLOCK = 1 << 26


def block_length(device: torch.device) -> int:
    """Number of elements that are worked on at once on ``device``."""
    return _CPU_BLOCK if device.type == "cpu" else _DEVICE_BLOCK


class Piece(NamedTuple):
    """A part of one segment: elements ``start:stop`` of the flat vector."""

    segment: int
    start: int
    stop: int


class Panel(NamedTuple):
    """``rows`` neighbouring buckets of ``width`` elements; the first one is bucket number ``bucket``."""

    start: int
    rows: int
    width: int
    bucket: int

    @property
    def stop(self) -> int:
        """End of the panel in the flat vector."""
        return self.start + self.rows * self.width


@lru_cache(maxsize=64)
def pieces(segments: tuple[int, ...], block: int) -> tuple[Piece, ...]:
    """Cut every segment into pieces of at most ``block`` elements; an empty segment has none."""
    found, begin = [], 0
    for index, length in enumerate(segments):
        end = begin + length
        found += [Piece(index, start, min(start + block, end)) for start in range(begin, end, block)]
        begin = end
    return tuple(found)


@lru_cache(maxsize=64)
def panels(segments: tuple[int, ...], bucket: int, block: int) -> tuple[Panel, ...]:
    """Cut every segment into buckets, and gather equal neighbours into panels of about ``block`` elements.

    A bucket never crosses the border of a tensor, whose scale may differ from its neighbour's by orders of magnitude;
    the last bucket of a tensor is therefore shorter.
    """
    found, begin, first = [], 0, 0
    most = max(1, block // bucket)
    for length in segments:
        full, rest = divmod(length, bucket)
        for row in range(0, full, most):
            found.append(Panel(begin + row * bucket, min(most, full - row), bucket, first + row))
        if rest:
            found.append(Panel(begin + full * bucket, 1, rest, first + full))
        begin += length
        first += full + (rest > 0)
    return tuple(found)


def bucket_count(segments: Sequence[int], bucket: int) -> int:
    """Number of buckets that :func:`panels` makes."""
    return sum(-(-length // bucket) for length in segments)


def slice_segments(segments: Sequence[int], start: int, stop: int) -> tuple[int, ...]:
    """Lengths of the segments that remain when only elements ``start:stop`` of the vector are taken.

    Args:
        segments: lengths of the tensors in the whole vector.
        start: first element taken.
        stop: end of the elements taken.

    Returns:
        The lengths of the parts, without empty ones; they add up to ``stop - start`` inside the vector.

    Example:
        >>> slice_segments((3, 0, 5), 2, 6)
        (1, 3)
    """
    ends = list(accumulate(segments))
    cut = (min(end, stop) - max(end - length, start) for length, end in zip(segments, ends, strict=True))
    return tuple(length for length in cut if length > 0)
