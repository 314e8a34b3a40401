"""Random numbers that are a function of (seed, counter): the same bits on every worker, processor and device."""

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
    state = seed + counter * _signed(_GOLDEN)
    state = (state ^ _shifted(state, 30)) * _signed(_FIRST)
    state = (state ^ _shifted(state, 27)) * _signed(_SECOND)
    return (state ^ _shifted(state, 31)) & (2**63 - 1)


def seeded_generator(seed: int, rank: int = 0, round: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for one worker and one meeting.

    Equal arguments give equal streams, so that a resumed run draws what the interrupted one would have drawn. Different
    ranks and rounds give unrelated streams: quantization noise that workers share would not average out.

    Args:
        seed: seed of the run.
        rank: number of the worker.
        round: number of the meeting.
        device: where the random numbers are drawn; it must be the device of the tensors that are compressed.

    Returns:
        A new generator; the global one is neither read nor advanced.

    Example:
        >>> generator = seeded_generator(seed=1, rank=0, round=7)
        >>> int(torch.randint(100, (), generator=generator)) < 100
        True
    """
    return torch.Generator(device).manual_seed(mix(seed, rank, round))


def random_bytes(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """``count`` random bytes, cut from 64-bit draws: an eighth of the draws that one number per byte would take."""
    words = torch.empty(-(-count // 8), dtype=torch.int64, device=device)
    return words.random_(-(2**63), None, generator=generator).view(torch.uint8)[:count]


def _signed(constant: int) -> int:
    return constant - 2**64 if constant >= 2**63 else constant


def _shifted(state: Tensor, places: int) -> Tensor:
    """Logical right shift; torch's is arithmetic."""
    return (state >> places) & (2 ** (64 - places) - 1)
