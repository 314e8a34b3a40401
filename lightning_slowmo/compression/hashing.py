"""Random numbers that are a function of (seed, counter): the same bits on every worker, processor and device."""

import numpy as np
import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = 2**64 - 1
_ROUNDS = [(np.uint64(30), np.uint64(_FIRST)), (np.uint64(27), np.uint64(_SECOND)), (np.uint64(31), None)]
_STEPS = np.arange(1 << 14, dtype=np.uint64) * np.uint64(_GOLDEN)  # a length that leaves the cache to others

_BATCH = 1 << 15
"""Words that are made at once, or a few more: many small tensors follow one another."""


def mix(*numbers: int) -> int:
    """Hash integers of any size into one integer of 64 bits (SplitMix64; Steele, Lea and Flood 2014)."""
    state = 0
    for number in numbers:
        state = (state ^ number) + _GOLDEN & _MASK
        state = (state ^ state >> 30) * _FIRST & _MASK
        state = (state ^ state >> 27) * _SECOND & _MASK
        state ^= state >> 31
    return state


def hashed(seed: Tensor, counter: Tensor) -> Tensor:
    """The SplitMix64 stream of ``seed`` at ``counter``.

    Args:
        seed: int64 tensor that broadcasts with ``counter``.
        counter: int64 tensor.

    Returns:
        int64 tensor of uniform numbers in [0, 2**63).
    """
    return _words(seed, counter) & (2**63 - 1)


def seeded_generator(seed: int, rank: int = 0, round: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for one worker and one meeting.

    Equal arguments give equal streams, so that a resumed run draws what the interrupted one would have drawn. Different
    ranks and rounds give unrelated streams: quantization noise that workers share would not average out.

    Args:
        seed: seed of the run.
        rank: number of the worker.
        round: number of the meeting.
        device: where the random numbers are drawn. Compressors draw one number for each vector, wherever that is, so
            that a generator on the CPU serves vectors on a GPU, and both then draw the same.

    Returns:
        A new generator; the global one is neither read nor advanced.

    Example:
        >>> generator = seeded_generator(seed=1, rank=0, round=7)
        >>> int(torch.randint(100, (), generator=generator)) < 100
        True
    """
    return torch.Generator(device).manual_seed(mix(seed, rank, round))


def draw_key(generator: torch.Generator, device: torch.device) -> Tensor:
    """The next 64 bits of ``generator``, as an int64 tensor of one element on ``device``."""
    key = torch.empty(1, dtype=torch.int64, device=generator.device).random_(-(2**63), None, generator=generator)
    if key.device.type == device.type:
        return key.to(device)
    # A constant is an argument of the kernel that writes it, where a copy would wait for the device.
    return torch.full((1,), int(key), device=device)


class QuantizerNoise:
    """The random bits with which buckets of elements are rounded: the SplitMix64 stream of one key.

    Word ``-1 - b // 4`` of the stream has 16 bits for bucket ``b``: the ``b % 4``-th lowest. Word ``b * w + i // 8``
    has 8 bits for element ``i`` of bucket ``b``: the ``i % 8``-th lowest; ``w`` is an eighth of the bucket's length,
    rounded up. A word thus serves eight elements, and any part of the noise can be made by itself, in any order.

    Args:
        key: int64 tensor of one element.
        bucket: length of a bucket.
        buckets: number of buckets.
        longest: largest number of buckets that :meth:`fine` is asked for at once.
    """

    def __init__(self, key: Tensor, bucket: int, buckets: int, longest: int) -> None:
        self.key, self.words = key, -(-bucket // 8)
        if key.device.type == "cpu":  # numpy shifts without sign, in place: half the time of torch's operations
            self._start = int(key)
            self._made = np.empty(min(max(longest, 1 + _BATCH // self.words), buckets) * self.words, dtype=np.uint64)
            self._scratch = np.empty(min(len(self._made), len(_STEPS)), dtype=np.uint64)
            self._from = self._until = 0
            self._total = buckets * self.words
        self.coarse = _words(key, -1 - torch.arange(-(-buckets // 4), device=key.device)).view(torch.int16)[:buckets]

    def fine(self, first: int, rows: int, width: int) -> Tensor:
        """Bytes for the first ``width`` elements of ``rows`` buckets: ``uint8``, valid until the next call."""
        begin, end = first * self.words, (first + rows) * self.words
        if self.key.device.type == "cpu":
            if not self._from <= begin <= end <= self._until:
                self._make(begin)
            words = torch.from_numpy(self._made[begin - self._from : end - self._from].view(np.int64))
        else:
            words = _words(self.key, torch.arange(begin, end, device=self.key.device))
        return words.view(torch.uint8).view(rows, 8 * self.words)[:, :width]

    def _make(self, begin: int) -> None:
        """Make as many words from ``begin`` on as there is room for; those that are there already are moved."""
        there = self._until - begin if self._from <= begin <= self._until else 0
        self._made[:there] = self._made[begin - self._from : begin - self._from + there]
        count = min(len(self._made), self._total - begin)
        for done in range(there, count, len(_STEPS)):
            state = self._made[done : min(done + len(_STEPS), count)]
            scratch = self._scratch[: len(state)]
            np.add(_STEPS[: len(state)], np.uint64(self._start + (begin + done) * _GOLDEN & _MASK), out=state)
            for places, factor in _ROUNDS:
                np.right_shift(state, places, out=scratch)
                np.bitwise_xor(state, scratch, out=state)
                if factor:
                    np.multiply(state, factor, out=state)
        self._from, self._until = begin, begin + count


def _words(seed: Tensor, counter: Tensor) -> Tensor:
    """64 random bits, as int64, for each counter."""
    state = seed + counter * _signed(_GOLDEN)
    state = (state ^ _shifted(state, 30)) * _signed(_FIRST)
    state = (state ^ _shifted(state, 27)) * _signed(_SECOND)
    return state ^ _shifted(state, 31)


def _signed(constant: int) -> int:
    return constant - 2**64 if constant >= 2**63 else constant


def _shifted(state: Tensor, places: int) -> Tensor:
    """Logical right shift; torch's is arithmetic."""
    return (state >> places) & (2 ** (64 - places) - 1)
