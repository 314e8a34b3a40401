"""The SplitMix64 stream of ``hashing.py`` in a kernel."""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl


@triton.jit
def random_word(key, counter):
    """64 random bits, uint64, for each counter (int64); the ``key`` is a scalar of int64."""
    state = key.to(tl.uint64) + counter.to(tl.uint64) * 0x9E3779B97F4A7C15
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB
    return state ^ (state >> 31)


@triton.jit
def random_number(key, counter):
    """63 random bits as int64: ``hashing.hashed``."""
    return random_word(key, counter).to(tl.int64) & 0x7FFFFFFFFFFFFFFF
