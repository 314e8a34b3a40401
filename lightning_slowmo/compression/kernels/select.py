"""The largest elements of each tensor, exactly, for all tensors at once: a radix select over magnitude bits.

1. For each tensor a bound that is reached by a few more elements than are wanted, from a sample of it.
2. For 11 bits at a time, the highest first: a histogram of these bits over the elements that agree with the bits found
   so far (in the first round: that reach the bound), then the bits of the smallest element that is kept.
3. Count, for each tile, elements above that threshold and elements equal to it; add up the counts; list the indices.

Should the sample mislead, so that fewer elements than wanted reach the bound, step 2 begins again without a bound for
that tensor. All of it is decided on the device.
"""

from functools import lru_cache
from math import ceil, sqrt

# mypy: allow-untyped-defs, allow-incomplete-defs
import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_slowmo.compression.kernels.finite import INTEGERS, magnitude
from lightning_slowmo.compression.kernels.launch import launch
from lightning_slowmo.compression.kernels.tables import FIELDS, TILE, kept, simple_tiles

SAMPLE = 1 << 14
"""Elements of a tensor from which a bound is derived; a smaller tensor is its own sample."""

_DIGIT = 11
_BINS = 1 << _DIGIT


@triton.jit
def _bound(
    values, plan, state, segments,
    LARGEST: tl.constexpr, BITS: tl.constexpr, SAMPLE: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """The largest magnitude that ``rank`` elements of the sample reach, at least that of the smallest number."""
    segment = tl.program_id(0).to(tl.int64)
    row = plan + segment * FIELDS
    begin, length, wanted = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    size, rank, stride = tl.load(row + 3), tl.load(row + 4), tl.load(row + 5)
    lane = tl.arange(0, SAMPLE)
    place = (lane * stride) % tl.maximum(length, 1)
    bits = magnitude(tl.load(values + begin + place, mask=lane < size, other=0), LARGEST)
    bits = tl.where(lane < size, bits, -1)
    bound = length * 0
    for place_of_bit in range(BITS):
        higher = bound | ((length * 0 + 1) << (BITS - 1 - place_of_bit))
        reached = tl.sum((bits >= higher).to(tl.int32))
        bound = tl.where(reached >= rank, higher, bound)
    tl.store(state + segment, tl.maximum(bound, 1))  # zeros are not counted: what is missing must be zeros
    tl.store(state + segments + segment, 0)
    tl.store(state + 2 * segments + segment, wanted)
    tl.store(state + 3 * segments + segment, 0)


@triton.jit
def _histogram(
    values, table, state, bins, segments,
    LARGEST: tl.constexpr, SHIFT: tl.constexpr, DIGIT: tl.constexpr, FIRST: tl.constexpr, AGAIN: tl.constexpr,
    BINS: tl.constexpr, TILE: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    tile = table + tl.program_id(0).to(tl.int64) * FIELDS
    segment = tl.load(tile + 4)
    wanted = tl.load(state + 3 * segments + segment) != 0 if AGAIN else segment >= 0
    if wanted:
        offset = tl.arange(0, TILE)
        mask = offset < tl.load(tile + 2)
        bits = magnitude(tl.load(values + tl.load(tile) + offset, mask=mask, other=0), LARGEST)
        if FIRST:
            counted = mask & (bits >= tl.load(state + segment))
        else:
            counted = mask & ((bits >> (SHIFT + DIGIT)) == tl.load(state + segments + segment)) & (bits > 0)
        digit = ((bits >> SHIFT) & ((1 << DIGIT) - 1)).to(tl.int32)
        first = tl.min(tl.where(counted, digit, BINS))
        last = tl.max(tl.where(counted, digit, -1))
        if first == last:  # as in a tensor of equal elements, which would all queue for one counter
            tl.atomic_add(bins + segment * BINS + first, tl.sum(counted.to(tl.int32)), sem="relaxed")
        else:
            tl.atomic_add(bins + segment * BINS + digit, 1, mask=counted, sem="relaxed")


@triton.jit
def _next_digit(
    bins, state, segments, DIGIT: tl.constexpr, FIRST: tl.constexpr, AGAIN: tl.constexpr, BINS: tl.constexpr
):
    """Append to each threshold the digit of the smallest element kept; count how many with this digit are kept."""
    segment = tl.program_id(0).to(tl.int64)
    wanted = tl.load(state + 3 * segments + segment) != 0 if AGAIN else segment >= 0
    if wanted:
        digit = tl.arange(0, BINS)
        count = tl.load(bins + segment * BINS + digit)
        missing = tl.load(state + 2 * segments + segment)
        total = tl.sum(count)
        reached = total - tl.cumsum(count, axis=0) + count  # elements with this digit or a larger one
        if FIRST and total < missing and tl.load(state + segment) > 1:
            tl.store(state + segment, 1)
            tl.store(state + 3 * segments + segment, 1)
        else:
            chosen = tl.max(tl.where(reached >= missing, digit, 0))  # 0, too, if zeros have to make up the number
            above = tl.sum(tl.where(digit > chosen, count, 0))
            threshold = tl.load(state + segments + segment)
            tl.store(state + segments + segment, (threshold << DIGIT) | chosen)
            tl.store(state + 2 * segments + segment, missing - above)


@triton.jit
def _compared(values, tile, state, segments, LARGEST: tl.constexpr, TILE: tl.constexpr):
    """Which elements of a tile are above the threshold of their tensor, and which are equal, as ones and zeros."""
    offset = tl.arange(0, TILE)
    mask = offset < tl.load(tile + 2)
    bits = magnitude(tl.load(values + tl.load(tile) + offset, mask=mask, other=0), LARGEST)
    threshold = tl.load(state + segments + tl.load(tile + 4))
    return (mask & (bits > threshold)).to(tl.int32), (mask & (bits == threshold)).to(tl.int32)


@triton.jit
def _count_kept(
    values, table, state, before, segments, LARGEST: tl.constexpr, TILE: tl.constexpr, FIELDS: tl.constexpr
):
    """Both counts of each tile in one number, so that one running sum serves both."""
    number = tl.program_id(0).to(tl.int64)
    above, equal = _compared(values, table + number * FIELDS, state, segments, LARGEST, TILE)
    tl.store(before + number + 1, (tl.sum(above).to(tl.int64) << 32) | tl.sum(equal).to(tl.int64))
    tl.store(before, number * 0, mask=number == 0)


@triton.jit
def _list_kept(
    values, table, first, kept, state, before, indices, segments,
    LARGEST: tl.constexpr, TILE: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    tile = table + number * FIELDS
    segment = tl.load(tile + 4)
    above, equal = _compared(values, tile, state, segments, LARGEST, TILE)
    earlier = tl.load(before + number) - tl.load(before + tl.load(first + segment))
    above_before = (earlier >> 32) + tl.cumsum(above, axis=0) - above
    equal_before = (earlier & 0xFFFFFFFF) + tl.cumsum(equal, axis=0) - equal
    room = tl.load(state + 2 * segments + segment)
    chosen = (above > 0) | ((equal > 0) & (equal_before < room))
    place = tl.load(kept + segment * 4 + 3) + above_before + tl.minimum(equal_before, room)
    tl.store(indices + place, tl.load(tile) + tl.arange(0, TILE), mask=chosen)


def top_indices(flat: Tensor, segments: tuple[int, ...], counts: tuple[int, ...]) -> Tensor:
    """Indices in ``flat`` of the ``counts`` largest magnitudes of each tensor, increasing; of equals the lowest."""
    device, number = flat.device, len(segments)
    integers = INTEGERS[flat.dtype.itemsize]
    values, largest, bits = flat.view(integers), torch.iinfo(integers).max, 8 * flat.dtype.itemsize - 1
    cut = simple_tiles(segments, device)
    sizes = {"LARGEST": largest, "TILE": TILE, "FIELDS": FIELDS}
    # Rows: bound, threshold as far as it is known, number of equals that are still missing, whether the bound failed.
    state = torch.empty(4, number, dtype=torch.int64, device=device)
    plan, sample = _plan(segments, counts, device), {"BITS": bits, "SAMPLE": SAMPLE, "FIELDS": 6}
    launch(_bound, number, values, plan, state, number, LARGEST=largest, num_warps=16, **sample)
    rounds = -(-bits // _DIGIT)
    bins = torch.zeros(rounds + 1, number, _BINS, dtype=torch.int32, device=device)
    for turn in range(rounds + 1):
        rest = bits - _DIGIT * max(0, turn - 1)  # bits that are not known yet; the second turn repeats the first
        shift = max(0, rest - _DIGIT)
        step = {"DIGIT": rest - shift, "FIRST": turn < 2, "AGAIN": turn == 1, "BINS": _BINS, "num_warps": 8}
        launch(_histogram, cut.number, values, cut.table, state, bins[turn], number, SHIFT=shift, **sizes, **step)
        launch(_next_digit, number, bins[turn], state, number, **step)
    before = torch.empty(cut.number + 1, dtype=torch.int64, device=device)
    indices = torch.empty(sum(counts), dtype=torch.int64, device=device)
    launch(_count_kept, cut.number, values, cut.table, state, before, number, num_warps=8, **sizes)
    tables = cut.table, cut.first, kept(segments, counts, device)
    launch(_list_kept, cut.number, values, *tables, state, before.cumsum(0), indices, number, num_warps=8, **sizes)
    return indices


@lru_cache(maxsize=64)
def _plan(segments: tuple[int, ...], counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each tensor begins, its length, how many to keep; size of its sample, rank of the bound, and stride."""
    rows, begin = [], 0
    for length, count in zip(segments, counts, strict=True):
        row = [begin, length, count, length, count, 1]
        if length > SAMPLE:
            # Multiples of the golden section of the length: evenly spread, and in step with no period of the weights.
            expected = count / length * SAMPLE
            rank = ceil(expected + 4 * sqrt(expected) + 4)  # four standard deviations: few samples mislead
            row[3:] = [SAMPLE, rank, int(0.6180339887 * length)]
        rows.append(row)
        begin += length
    return torch.tensor(rows, dtype=torch.int64).to(device)
