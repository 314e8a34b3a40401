"""The kernels: gather parameters into a message, move them by an outer rule, look whether they are finite.

Parameters are found by tables: a row for each *tile*, a piece of a parameter on which one program works, with the index
of the parameter, the tile's first element in it, its first element in the bucket, and its length; and the address of
each parameter. Where ``VECTOR`` is more than 1, all of these are multiples of it, and 16 bytes are read at once.
"""

# mypy: disable-error-code="no-untyped-def, assignment"
# Arguments of a kernel are what Triton makes of them, and a tuple of values grows.

import triton
import triton.language as tl

TILE = 4096
"""Elements of a tile."""

FIELDS = 4
"""Numbers in a row of a table of tiles."""


@triton.jit
def _tile(tiles, addresses, KIND: tl.constexpr, VECTOR: tl.constexpr):
    """Where a program's tile lies in its parameter, which element of the bucket it begins with, and its length."""
    row = tiles + tl.program_id(0).to(tl.int64) * 4
    address = tl.load(addresses + tl.load(row))
    parameter = tl.multiple_of(address.to(tl.pointer_type(KIND)), 16 if VECTOR > 1 else KIND.primitive_bitwidth // 8)
    begin = tl.multiple_of(tl.load(row + 1), VECTOR)
    place = tl.multiple_of(tl.load(row + 2), VECTOR)
    length = tl.multiple_of(tl.load(row + 3).to(tl.int32), VECTOR)
    return parameter + begin, place, length


@triton.jit
def gather(tiles, addresses, flat, KIND: tl.constexpr, TILE: tl.constexpr, VECTOR: tl.constexpr):
    """Copy the parameters of a bucket to a flat tensor, in the dtype of that."""
    parameter, place, length = _tile(tiles, addresses, KIND, VECTOR)
    lane = tl.arange(0, TILE)
    values = tl.load(parameter + lane, mask=lane < length)
    tl.store(flat + place + lane, values.to(flat.dtype.element_ty), mask=lane < length)


@triton.jit
def find_nonfinite(tiles, addresses, flag, KIND: tl.constexpr, TILE: tl.constexpr, VECTOR: tl.constexpr):
    """Set a flag if an element of a parameter of a bucket is infinite or NaN."""
    parameter, _, length = _tile(tiles, addresses, KIND, VECTOR)
    lane = tl.arange(0, TILE)
    values = tl.load(parameter + lane, mask=lane < length, other=0)
    if KIND.primitive_bitwidth < 32:
        values = values.to(tl.float32)
    found = tl.max((values - values != 0).to(tl.int32), axis=0)  # inf - inf is NaN
    tl.store(flag, 1, mask=found > 0)  # all programs that write write the same


@triton.jit
def correct(tiles, addresses, sent, new, KIND: tl.constexpr, TILE: tl.constexpr, VECTOR: tl.constexpr):
    """Let the parameters x of a bucket become y + (x - s), with y in ``new`` and s in ``sent``."""
    parameter, place, length = _tile(tiles, addresses, KIND, VECTOR)
    lane = tl.arange(0, TILE)
    mask = lane < length
    x = tl.load(parameter + lane, mask=mask, other=0).to(new.dtype.element_ty)
    x = x - tl.load(sent + place + lane, mask=mask, other=0) + tl.load(new + place + lane, mask=mask, other=0)
    tl.store(parameter + lane, x.to(KIND), mask=mask)


@triton.jit
def move(
    tiles,  # of the parameters, if TABLE
    addresses,  # likewise
    own,  # this worker's values before the sum, if not TABLE, for the drift
    flat,  # the sum; overwritten with the new values unless TABLE
    anchor,  # of the bucket, if STATE
    momentum,  # likewise
    numbers,  # float64: the share that makes the mean of the sum, then the scale of each operation
    squares,  # float64: sums of the squares of own - mean and of mean over the sampled elements
    numel,  # of the bucket
    period,  # every so many elements
    piece,  # so many are sampled
    limit,  # up to here
    OPERATIONS: tl.constexpr,
    RESULTS: tl.constexpr,
    TABLE: tl.constexpr,
    STATE: tl.constexpr,
    DRIFT: tl.constexpr,
    KIND: tl.constexpr,
    TILE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Make new parameters of a sum, by an outer rule or the mean alone, in one pass."""
    lane = tl.arange(0, TILE)
    if TABLE:
        parameter, place, length = _tile(tiles, addresses, KIND, VECTOR)
    else:
        place = tl.program_id(0).to(tl.int64) * TILE
        length = tl.minimum(numel - place, TILE).to(tl.int32)
        parameter = own + place
    mask = lane < length
    FLOAT: tl.constexpr = flat.dtype.element_ty
    total = tl.load(flat + place + lane, mask=mask, other=0)
    share = tl.load(numbers).to(FLOAT)

    if DRIFT:
        first = place.to(tl.int32)
        if (first + length - 1) // period * period + piece > first:  # the tile has elements of a sample
            position = first + lane
            sampled = mask & (position % period < piece) & (position < limit)
            mean = tl.where(sampled, total * share, 0.0)
            distance = tl.where(sampled, tl.load(parameter + lane, mask=sampled, other=0).to(FLOAT) - mean, 0.0)
            tl.atomic_add(squares, tl.sum(distance * distance, axis=0).to(tl.float64))
            tl.atomic_add(squares + 1, tl.sum(mean * mean, axis=0).to(tl.float64))

    if STATE:
        old = tl.load(anchor + place + lane, mask=mask, other=0)
        velocity = tl.load(momentum + place + lane, mask=mask, other=0)
        values = (old, old.to(KIND).to(FLOAT), total, velocity)
        for step in tl.static_range(len(OPERATIONS)):
            scale = tl.load(numbers + 1 + step).to(FLOAT)
            if OPERATIONS[step][0]:
                made = tl.fma(values[OPERATIONS[step][2]], scale, values[OPERATIONS[step][1]])
            else:
                made = values[OPERATIONS[step][1]] * scale
            values = values + (made,)  # noqa: RUF005  Triton knows no starred expressions
        new = values[RESULTS[0]]
        tl.store(anchor + place + lane, new, mask=mask)
        tl.store(momentum + place + lane, values[RESULTS[1]], mask=mask)
    else:
        new = total * share

    if TABLE:
        tl.store(parameter + lane, new.to(KIND), mask=mask)
    else:
        tl.store(flat + place + lane, new, mask=mask)
