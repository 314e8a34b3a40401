"""Random numbers that are a function of (seed, counter): the same bits on every worker, processor and device."""

import numpy as np
import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = 2**64 - 1


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
            self._key = key.numpy().view(np.uint64)
            self._steps = np.arange(longest * self.words, dtype=np.uint64) * np.uint64(_GOLDEN)
            self._state, self._scratch = np.empty_like(self._steps), np.empty_like(self._steps)
        self.coarse = _words(key, -1 - torch.arange(-(-buckets // 4), device=key.device)).view(torch.int16)[:buckets]

    def fine(self, first: int, rows: int, width: int) -> Tensor:
        """Bytes for the first ``width`` elements of ``rows`` buckets: ``uint8``, valid until the next call."""
        begin, count = first * self.words, rows * self.words
        if self.key.device.type == "cpu":
            state, scratch = self._state[:count], self._scratch[:count]
            np.add(self._steps[:count], self._key + np.uint64(begin * _GOLDEN & _MASK), out=state)
            for places, factor in ((30, _FIRST), (27, _SECOND), (31, 1)):
                np.right_shift(state, np.uint64(places), out=scratch)
                np.bitwise_xor(state, scratch, out=state)
                if factor > 1:
                    np.multiply(state, np.uint64(factor), out=state)
            words = torch.from_numpy(state.view(np.int64))
        else:
            words = _words(self.key, torch.arange(begin, begin + count, device=self.key.device))
        return words.view(torch.uint8).view(rows, 8 * self.words)[:, :width]


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
