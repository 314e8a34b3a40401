"""What an algorithm sends, and how much memory it takes, from its configuration alone: no process is started.

Every algorithm has its place in :func:`syncs` and in :func:`state_numel`, and nowhere else; plans, pictures and the
benchmark's predictions follow from them. They describe the ordinary run: after warm-ups, all workers healthy, at equal
learning rates, triggers always pulled, and the two first syncs, which also look for changing buffers, left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import singledispatch

import torch

from lightning_slowmo.algorithms import (
    BMUF,
    QPRSGD,
    Algorithm,
    AllReduce,
    APMSqueeze,
    DiLoCo,
    Gossip,
    LocalSGD,
    SensedSGD,
    SketchedSGD,
    SlowMo,
    SQuARM,
)
from lightning_slowmo.communication import Header, Reason
from lightning_slowmo.compression import Compressor, CountSketch, slice_segments
from lightning_slowmo.compression.indices import index_bytes
from lightning_slowmo.parameters import Layout, Scratch
from lightning_slowmo.topology import make

CHUNKS_LOOKED_AT = 64
"""Of a vector cut into more chunks, so many evenly spaced ones stand for all."""

TWICE = 2
"""What SQuARM and APMSqueeze do with an element beside compressing it, in units of a plain sync (measured)."""

TRANSFORM = 4
"""What one transform of SensedSGD's recovery does with an element, in the same unit (additions in the cache)."""

MEETING_NUMBERS = len(Header(Reason.SYNC, pending=(0,)).numbers())
"""Numbers in the header of one optimizer."""


@dataclass(frozen=True)
class Sync:
    """One kind of communication that comes again and again.

    Attributes:
        every: optimizer steps from one to the next, on average.
        sent: bytes that a worker sends, the mean over workers.
        busiest: bytes through the busiest worker's link, in the busier direction.
        messages: that wait for one another; each pays the latency.
        handled: elements that are packed, added up and unpacked; several times for those who do more with them.
        compressed: elements that a worker compresses.
        decompressed: elements that a worker decompresses.
        compressor: with what.
        behind: steps of computation during which the messages may travel; 0: the worker waits for them. Its own work
            on them it does in any case.
        gradients: whether it is gradients that are exchanged, which an outer average does not replace.
    """

    every: float
    sent: float
    busiest: float
    messages: float
    handled: int = 0
    compressed: float = 0
    decompressed: float = 0
    compressor: Compressor | None = None
    behind: float = 0
    gradients: bool = False


def layout_of(shapes: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32) -> Layout:
    """The layout of parameters of which only the shapes are known."""
    return Layout([[torch.empty(tuple(shape), dtype=dtype, device="meta") for shape in shapes]])


# What a meeting is made of --------------------------------------------------------------------------------------------


def header(workers: int, numbers: int = MEETING_NUMBERS) -> Sync:
    """An all-gather of a few float64 numbers, from worker to worker around a ring."""
    sent = 8 * numbers * (workers - 1)
    return Sync(1, sent, sent, workers - 1)


def all_reduce(layout: Layout, workers: int) -> Sync:
    """A ring all-reduce of every bucket, a few of them in flight: 2 (n - 1) / n of the bytes, in 2 (n - 1) messages."""
    sent = sum(2 * (workers - 1) * bucket.numel * bucket.dtype.itemsize // workers for bucket in layout.buckets)
    waves = -(-len(layout.buckets) // Scratch().count)
    return Sync(1, sent, sent, 2 * (workers - 1) * waves, handled=layout.numel)


def compressed_mean(layout: Layout, workers: int, compressor: Compressor, transport: str, feedback: bool) -> Sync:
    """A compressed mean in two shots or along a ring."""
    chunk_bytes = [_mean_chunk_bytes(compressor, bucket.segments, bucket.dtype, workers) for bucket in layout.buckets]
    sent, buckets = 2 * (workers - 1) * sum(chunk_bytes), len(layout.buckets)
    numel, share = layout.numel, layout.numel / workers
    if transport == "ring":
        return Sync(1, sent, sent, 2 * (workers - 1) * buckets, numel, numel, 2 * numel - share, compressor)
    decompressed = 2 * numel + (numel + share if feedback else 0)
    return Sync(1, sent, sent, 2 * (workers - 1) * buckets, numel, numel + share, decompressed, compressor)


def exchange(layout: Layout, workers: int, topology: object, mixing: str, compressor: Compressor | None = None) -> Sync:
    """A message to each neighbour, all at once."""
    degree = make(topology, mixing).traffic(workers)  # type: ignore[arg-type]
    if compressor is None:
        size = sum(bucket.numel * bucket.dtype.itemsize for bucket in layout.buckets)
        return Sync(1, degree.mean * size, degree.max * size, 1, layout.numel)
    size = sum(compressor.payload_bytes(bucket.segments, bucket.dtype) for bucket in layout.buckets)
    numel = layout.numel
    decompressed = (1 + degree.mean) * numel  # its own message, too
    return Sync(1, degree.mean * size, degree.max * size, len(layout.buckets), numel, numel, decompressed, compressor)


def together(every: float, *parts: Sync) -> Sync:
    """Parts that follow one another in one sync; at most one of them compresses."""
    compressor = next((part.compressor for part in parts if part.compressor is not None), None)
    totals = {
        name: sum(getattr(part, name) for part in parts)
        for name in ("sent", "busiest", "messages", "handled", "compressed", "decompressed")
    }
    return Sync(every, **totals, compressor=compressor)


def _mean_chunk_bytes(compressor: Compressor, segments: Sequence[int], dtype: torch.dtype, workers: int) -> float:
    """Bytes of the payload of one worker's chunk, on average."""
    length, count = sum(segments), min(workers, CHUNKS_LOOKED_AT)
    total = 0
    for index in range(count):
        rank = index * workers // count
        start, stop = length * rank // workers, length * (rank + 1) // workers
        total += compressor.payload_bytes(slice_segments(segments, start, stop), dtype)
    return total / count


# What each algorithm sends --------------------------------------------------------------------------------------------


@singledispatch
def syncs(algorithm: Algorithm, layout: Layout, workers: int) -> list[Sync]:
    """All communication of an algorithm.

    Args:
        algorithm: its configuration.
        layout: of the parameters.
        workers: how many, two at least.

    Raises:
        ValueError: if nobody has said here what the algorithm sends, or its topology does not fit the workers.
    """
    raise ValueError(f"What {type(algorithm).__name__} sends is not known here.")


@singledispatch
def state_numel(algorithm: Algorithm, layout: Layout, workers: int) -> float:
    """Elements that a worker keeps beside parameters, gradients and the optimizer's own state; see :func:`syncs`."""
    raise ValueError(f"What {type(algorithm).__name__} keeps is not known here.")


@syncs.register
def _(algorithm: AllReduce, layout: Layout, workers: int) -> list[Sync]:
    used = header(workers, len(layout.parameters))
    return [replace(together(1, header(workers), used, all_reduce(layout, workers)), gradients=True)]


@state_numel.register
def _(algorithm: AllReduce, layout: Layout, workers: int) -> float:
    return 0


@syncs.register
def _(algorithm: LocalSGD, layout: Layout, workers: int) -> list[Sync]:
    return _in_fragments(algorithm, header(workers), all_reduce(layout, workers))


@state_numel.register
def _(algorithm: LocalSGD, layout: Layout, workers: int) -> float:
    return layout.numel * _copies_in_flight(algorithm)


def _in_fragments(algorithm: Algorithm, head: Sync, whole: Sync) -> list[Sync]:
    """An average every ``sync_every`` steps, in its fragments and behind computation, if it has such settings."""
    period, parts = algorithm.sync_every, getattr(algorithm, "fragments", 1)  # type: ignore[attr-defined]
    sizes = ("sent", "busiest", "handled", "compressed", "decompressed")
    part = replace(whole, **{name: getattr(whole, name) / parts for name in sizes})
    if not (steps := getattr(algorithm, "overlap", 0)):
        return [together(period / parts, head, part)]
    return [replace(head, every=period / parts), replace(part, every=period / parts, behind=steps)]


def _copies_in_flight(algorithm: Algorithm) -> float:
    """Copies of the parameters that travel, and that say where they were sent from, while steps go on."""
    return 2 / getattr(algorithm, "fragments", 1) if getattr(algorithm, "overlap", 0) else 0


def _outer(algorithm: SlowMo | BMUF | DiLoCo, layout: Layout, workers: int) -> list[Sync]:
    """The average of an outer loop, which takes the place of its base's sync where both are due."""
    compressor, base = getattr(algorithm, "compressor", None), getattr(algorithm, "base", None)
    if compressor is not None:
        average = compressed_mean(layout, workers, compressor, "two_shot", feedback=True)
    elif isinstance(base, QPRSGD) and base.transport != "gossip":
        average = compressed_mean(layout, workers, base.compressor, base.transport, base.error_feedback)
    else:
        average = all_reduce(layout, workers)
    buffers = [all_reduce(layout, workers)] if getattr(algorithm, "inner_buffers", "") == "average" else []
    period = algorithm.sync_every
    if not getattr(algorithm, "average", True):
        return syncs(base, layout, workers) if base is not None else []
    outer = _in_fragments(algorithm, header(workers), together(1, average, *buffers))
    if base is None:
        return outer
    between = []
    for sync in syncs(base, layout, workers):
        if sync.gradients:
            between.append(sync)
        elif count := int((period - 1) // sync.every):
            between.append(replace(sync, every=period / count))
    return [*between, *outer]


def _outer_state(algorithm: SlowMo | BMUF | DiLoCo, layout: Layout, workers: int) -> float:
    """Anchor and slow momentum, what the base keeps, and what a compressor remembers."""
    base, compressor = getattr(algorithm, "base", None), getattr(algorithm, "compressor", None)
    own = layout.numel * (2 + _copies_in_flight(algorithm))
    if compressor is not None:
        return own + layout.numel * (2 + 1 / workers)
    return own + (state_numel(base, layout, workers) if base is not None else 0)


for _kind in (SlowMo, BMUF, DiLoCo):
    syncs.register(_kind)(_outer)
    state_numel.register(_kind)(_outer_state)


@syncs.register
def _(algorithm: Gossip, layout: Layout, workers: int) -> list[Sync]:
    sends = exchange(layout, workers, algorithm.topology, algorithm.mixing)
    return [header(workers), replace(sends, behind=algorithm.overlap)]


@state_numel.register
def _(algorithm: Gossip, layout: Layout, workers: int) -> float:
    topology = make(algorithm.topology, algorithm.mixing)
    # Whether weights are doubly stochastic does not change with the number of workers, and a small matrix is cheap.
    few = next(n for n in (min(workers, 16), workers) if topology.supports(n))
    weighted = algorithm.overlap > 0 or not topology.on(few).doubly_stochastic
    numerators = layout.numel * (weighted or algorithm.order == "combine_while_adapt")
    degree = topology.traffic(workers).mean
    return numerators + algorithm.overlap * (1 + degree) * layout.numel


@syncs.register
def _(algorithm: QPRSGD, layout: Layout, workers: int) -> list[Sync]:
    if algorithm.transport == "gossip":
        sends = exchange(layout, workers, algorithm.topology, algorithm.mixing, algorithm.compressor)
    else:
        sends = compressed_mean(layout, workers, algorithm.compressor, algorithm.transport, algorithm.error_feedback)
    return [together(algorithm.sync_every, header(workers), sends)]


@state_numel.register
def _(algorithm: QPRSGD, layout: Layout, workers: int) -> float:
    if algorithm.transport == "gossip":
        return 2 * layout.numel
    return layout.numel * (1 + (1 + 1 / workers if algorithm.error_feedback else 0))


@syncs.register
def _(algorithm: SQuARM, layout: Layout, workers: int) -> list[Sync]:
    sends = exchange(layout, workers, algorithm.topology, algorithm.mixing, algorithm.compressor)
    sends = replace(sends, handled=TWICE * sends.handled)  # the trigger, and the mix of estimates
    return [together(algorithm.sync_every, header(workers), header(workers, 1), sends)]


@state_numel.register
def _(algorithm: SQuARM, layout: Layout, workers: int) -> float:
    return 2 * layout.numel


@syncs.register
def _(algorithm: APMSqueeze, layout: Layout, workers: int) -> list[Sync]:
    small, large = _by_size(layout, algorithm.uncompressed_below)
    mean = compressed_mean(large, workers, algorithm.compressor, "two_shot", feedback=True)
    mean = replace(mean, handled=TWICE * mean.handled)  # momentum in and out, and the preconditioned step
    return [together(1, header(workers), header(workers, 1), all_reduce(small, workers), mean)]


@state_numel.register
def _(algorithm: APMSqueeze, layout: Layout, workers: int) -> float:
    return layout.numel * (4 + 1 / workers)  # anchor, momentum, second moment, and what messages have left out


def _by_size(layout: Layout, below: int) -> tuple[Layout, Layout]:
    """The layouts of the tensors of fewer elements, and of the others."""
    parts = ([p for p in layout.parameters if (p.numel() < below) == is_small] for is_small in (True, False))
    small, large = (Layout([part]) for part in parts)
    return small, large


def _dense_and_sparse(algorithm: SketchedSGD | SensedSGD, layout: Layout, workers: int) -> tuple[Sync, Layout]:
    """What both exchange of small tensors and of who has gradients, and the layout of the large tensors."""
    small, large = _by_size(layout, algorithm.uncompressed_below)
    flags = header(workers, 3 + len(layout.parameters))
    return together(1, header(workers), flags, all_reduce(small, workers)), large


def _sum(numel: int, itemsize: int, workers: int) -> Sync:
    """An all-reduce of one tensor."""
    sent = 2 * (workers - 1) * numel * itemsize // workers
    return Sync(1, sent, sent, 2 * (workers - 1))


@syncs.register
def _(algorithm: SketchedSGD, layout: Layout, workers: int) -> list[Sync]:
    dense, large = _dense_and_sparse(algorithm, layout, workers)
    parts = [dense]
    for run in large.runs:
        numel, size = run.numel, run.dtype.itemsize
        asked = algorithm.asked(numel)
        parts.append(replace(_sum(asked, size, workers), handled=TWICE * numel))  # momentum and residual
        if asked < numel:
            sketch = algorithm.sketch(numel, 0)
            table = _sum(sketch.rows * sketch.columns, size, workers)
            parts.append(replace(table, compressed=numel, decompressed=numel, compressor=CountSketch()))
    return [replace(together(1, *parts), gradients=True)]


@state_numel.register
def _(algorithm: SketchedSGD, layout: Layout, workers: int) -> float:
    _, large = _dense_and_sparse(algorithm, layout, workers)
    return layout.numel + large.numel  # momentum of all, and what has not been applied of the large


@syncs.register
def _(algorithm: SensedSGD, layout: Layout, workers: int) -> list[Sync]:
    dense, large = _dense_and_sparse(algorithm, layout, workers)
    parts = [dense]
    for run in large.runs:
        rows, blocks = algorithm.sensing().shape(run.numel)
        width, height, size = -(-blocks // workers), algorithm.sensing().height(run.numel), run.dtype.itemsize
        found = width * algorithm.kept(run.numel)
        payload = found * size + index_bytes(height * width, found)
        sent = (workers - 1) * (rows * width * size + payload)
        transforms = 1 + (7 * algorithm.iterations + 2) / workers  # to measure everything, and to recover a share
        parts.append(Sync(1, sent, sent, 2 * (workers - 1), handled=round(TRANSFORM * transforms * run.numel)))
    return [replace(together(1, *parts), gradients=True)]


@state_numel.register
def _(algorithm: SensedSGD, layout: Layout, workers: int) -> float:
    _, large = _dense_and_sparse(algorithm, layout, workers)
    tables = 0
    for run in large.runs:
        rows, blocks = algorithm.sensing().shape(run.numel)
        tables += 2 * rows * -(-blocks // workers)
    return layout.numel - large.numel + tables


def bytes_per_step(every: Sequence[Sync]) -> float:
    """Bytes that a worker sends, the mean over workers and steps."""
    return sum(sync.sent / sync.every for sync in every)
