"""What a communication costs, in bytes, messages and elements: the terms in which algorithms describe themselves.

An algorithm says what it sends and what it keeps in two methods of its configuration, ``syncs(layout, workers)`` and
``state_numel(layout, workers)``, from shapes and settings alone: no process is started. Here are the parts that they
are put together from; no algorithm is known here. Plans, pictures and the benchmark's predictions follow from them.

Descriptions are of an ordinary run: after warm-ups, all workers healthy, at equal learning rates, every triggered
message sent. The first two syncs, which also find out which buffers change, are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from lightning_slowmo.bucket_sizes import DEFAULT_SIZES, BucketSizes
from lightning_slowmo.communication import Header, Reason
from lightning_slowmo.compression import Compressor, slice_segments
from lightning_slowmo.parameters import Layout
from lightning_slowmo.topology import Mixing, make

SAMPLED_CHUNKS = 64
"""The payload sizes of a vector in more chunks than this are estimated from so many evenly spaced ones."""

AT_ONCE = 2
"""Collectives of a group that gloo carries out at the same time: its threads. More in flight wait for them."""

TWICE = 2
"""Elements that count as handled for each that is synced where a second buffer is updated as well (measured)."""

MEETING_NUMBERS = len(Header(Reason.SYNC, pending=(0,)).numbers())
"""Numbers in the header of one optimizer."""


@dataclass(frozen=True)
class Sync:
    """One kind of communication that is repeated during training.

    Attributes:
        every: optimizer steps from one to the next, on average.
        sent: bytes that a worker sends, the mean over workers.
        busiest: bytes through the busiest worker's link, in the busier direction.
        messages: number of messages one after the other; each adds one latency.
        handled: elements that are packed, added up and unpacked; counted several times where more is done with them.
        compressed: elements that a worker compresses.
        decompressed: elements that a worker decompresses.
        compressor: what compresses them; None if nothing is compressed.
        behind: steps of computation during which the messages may travel; 0 if the worker waits for them. The worker's
            own work (``handled``, ``compressed``, ``decompressed``) is never hidden.
        gradients: whether gradients are exchanged; an average of the parameters does not replace that.
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


class Described(Protocol):
    """Anything that says what it sends and keeps: every configuration of an algorithm."""

    def syncs(self, layout: Layout, workers: int) -> list[Sync]:
        """All communication, by kind."""

    def state_numel(self, layout: Layout, workers: int) -> float:
        """Elements that a worker keeps."""


def syncs(algorithm: Described, layout: Layout, workers: int) -> list[Sync]:
    """What an algorithm sends, see :meth:`lightning_slowmo.Algorithm.syncs`."""
    return algorithm.syncs(layout, workers)


def state_numel(algorithm: Described, layout: Layout, workers: int) -> float:
    """What an algorithm keeps, see :meth:`lightning_slowmo.Algorithm.state_numel`."""
    return algorithm.state_numel(layout, workers)


def layout_of(
    shapes: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32, sizes: BucketSizes = DEFAULT_SIZES
) -> Layout:
    """The layout of parameters of which only the shapes are known; it takes no memory.

    Args:
        shapes: one for each parameter.
        dtype: of all parameters.
        sizes: of messages.
    """
    return Layout([[torch.empty(tuple(shape), dtype=dtype, device="meta") for shape in shapes]], sizes)


def bytes_per_step(every: Sequence[Sync]) -> float:
    """Bytes that a worker sends per optimizer step, the mean over workers and steps."""
    return sum(sync.sent / sync.every for sync in every)


# Single communications, ``every`` one step ----------------------------------------------------------------------------


def header(workers: int, numbers: int = MEETING_NUMBERS) -> Sync:
    """An all-gather of a few float64 numbers along a ring.

    Args:
        workers: how many.
        numbers: that each worker contributes; by default those of a meeting's header.
    """
    sent = 8 * numbers * (workers - 1)
    return Sync(1, sent, sent, workers - 1)


def all_reduce(layout: Layout, workers: int) -> Sync:
    """A ring all-reduce of every bucket: 2 (n - 1) / n of the bytes, and 2 (n - 1) messages for each wave of buckets.

    A wave is what travels at the same time, :data:`AT_ONCE` buckets or as many as are in flight: their latencies are
    one, while their bytes share the link (``benchmarks/latency.py``).

    Args:
        layout: of what is averaged.
        workers: n.

    Example:
        >>> all_reduce(layout_of([(1000, 1000)]), workers=4)
        Sync(every=1, sent=6000000, busiest=6000000, messages=6, handled=1000000, compressed=0, decompressed=0, \
compressor=None, behind=0, gradients=False)
    """
    sent = sum(2 * (workers - 1) * bucket.numel * bucket.dtype.itemsize // workers for bucket in layout.buckets)
    waves = -(-len(layout.buckets) // min(layout.sizes.in_flight, AT_ONCE))
    return Sync(1, sent, sent, 2 * (workers - 1) * waves, handled=layout.numel)


def tensor_sum(numel: int, itemsize: int, workers: int) -> Sync:
    """A ring all-reduce of one tensor, the work on its elements left out.

    Args:
        numel: elements.
        itemsize: bytes of each.
        workers: how many.
    """
    sent = 2 * (workers - 1) * numel * itemsize // workers
    return Sync(1, sent, sent, 2 * (workers - 1))


def compressed_mean(layout: Layout, workers: int, compressor: Compressor, transport: str, feedback: bool) -> Sync:
    """A mean of which compressed messages are sent, see :mod:`lightning_slowmo.communication.compressed`.

    Args:
        layout: of what is averaged.
        workers: how many.
        compressor: of the messages.
        transport: ``"ring"`` or ``"two_shot"``.
        feedback: whether what messages leave out is computed, to be added to the next ones.
    """
    chunk_bytes = [_mean_chunk_bytes(compressor, bucket.segments, bucket.dtype, workers) for bucket in layout.buckets]
    sent, buckets = 2 * (workers - 1) * sum(chunk_bytes), len(layout.buckets)
    numel, share = layout.numel, layout.numel / workers
    if transport == "ring":
        return Sync(1, sent, sent, 2 * (workers - 1) * buckets, numel, numel, 2 * numel - share, compressor)
    decompressed = 2 * numel + (numel + share if feedback else 0)
    return Sync(1, sent, sent, 2 * (workers - 1) * buckets, numel, numel + share, decompressed, compressor)


def gathered_mean(layout: Layout, workers: int, compressor: Compressor) -> Sync:
    """A mean of compressed messages of which every worker gets everybody's, along a ring.

    Args:
        layout: of what is averaged.
        workers: how many.
        compressor: of the messages.
    """
    size = sum(compressor.payload_bytes(bucket.segments, bucket.dtype) for bucket in layout.buckets)
    sent, numel, messages = (workers - 1) * size, layout.numel, (workers - 1) * len(layout.buckets)
    told = sum(compressor.share(length) * length for bucket in layout.buckets for length in bucket.segments)
    return Sync(1, sent, sent, messages, TWICE * numel, numel, workers * told, compressor)


def exchange(
    layout: Layout, workers: int, topology: Any, mixing: Mixing = "uniform", compressor: Compressor | None = None
) -> Sync:
    """A message to each neighbour, all at once.

    Args:
        layout: of what is sent.
        workers: how many.
        topology: who is whose neighbour, see :func:`lightning_slowmo.topology.make`.
        mixing: how its graph is weighted.
        compressor: of the messages; None sends them in full.

    Raises:
        ValueError: if the topology cannot connect so many workers.
    """
    degree = make(topology, mixing).traffic(workers)
    if compressor is None:
        size = sum(bucket.numel * bucket.dtype.itemsize for bucket in layout.buckets)
        return Sync(1, degree.mean * size, degree.max * size, 1, layout.numel)
    size = sum(compressor.payload_bytes(bucket.segments, bucket.dtype) for bucket in layout.buckets)
    numel = layout.numel
    decompressed = (1 + degree.mean) * numel  # its own message, too
    return Sync(1, degree.mean * size, degree.max * size, len(layout.buckets), numel, numel, decompressed, compressor)


def _mean_chunk_bytes(compressor: Compressor, segments: Sequence[int], dtype: torch.dtype, workers: int) -> float:
    """Bytes of the payload of one worker's chunk, on average."""
    length, count = sum(segments), min(workers, SAMPLED_CHUNKS)
    total = 0
    for index in range(count):
        rank = index * workers // count
        start, stop = length * rank // workers, length * (rank + 1) // workers
        total += compressor.payload_bytes(slice_segments(segments, start, stop), dtype)
    return total / count


# Combinations ---------------------------------------------------------------------------------------------------------


def together(every: float, *parts: Sync) -> Sync:
    """Parts that follow one another in one sync; at most one of them compresses.

    Args:
        every: optimizer steps from one such sync to the next.
        parts: whose bytes, messages and elements are added up.
    """
    compressor = next((part.compressor for part in parts if part.compressor is not None), None)
    totals = {
        name: sum(getattr(part, name) for part in parts)
        for name in ("sent", "busiest", "messages", "handled", "compressed", "decompressed")
    }
    return Sync(every, **totals, compressor=compressor)


def averages(sync_every: int, head: Sync, whole: Sync, overlap: int = 0, fragments: int = 1) -> list[Sync]:
    """An average of the parameters every ``sync_every`` steps, perhaps in fragments and behind computation.

    Args:
        sync_every: optimizer steps between two averages of the same parameter.
        head: the header of one meeting, for which workers always wait.
        whole: the average of all parameters.
        overlap: steps of computation behind which an average travels.
        fragments: parts of the parameters, averaged in turn.
    """
    sizes = ("sent", "busiest", "handled", "compressed", "decompressed")
    part = replace(whole, **{name: getattr(whole, name) / fragments for name in sizes})
    if not overlap:
        return [together(sync_every / fragments, head, part)]
    return [replace(head, every=sync_every / fragments), replace(part, every=sync_every / fragments, behind=overlap)]


def copies_in_flight(overlap: int, fragments: int) -> float:
    """Copies of the parameters that an average behind computation needs: what travels, and what was sent.

    Args:
        overlap: steps of computation behind which an average travels.
        fragments: parts of the parameters, averaged in turn.
    """
    return 2 / fragments if overlap else 0


def between_averages(base: Sequence[Sync], sync_every: int) -> list[Sync]:
    """What a base algorithm sends inside an outer loop, whose average replaces the base's sync where both are due.

    Args:
        base: what the base sends by itself.
        sync_every: optimizer steps between two averages of the outer loop.
    """
    left = []
    for sync in base:
        if sync.gradients:
            left.append(sync)
        elif count := int((sync_every - 1) // sync.every):
            left.append(replace(sync, every=sync_every / count))
    return left


def split_by_size(layout: Layout, below: int) -> tuple[Layout, Layout]:
    """The layouts of the tensors of fewer than ``below`` elements, and of the others."""
    small = [p for p in layout.parameters if p.numel() < below]
    large = [p for p in layout.parameters if p.numel() >= below]
    return Layout([small], layout.sizes), Layout([large], layout.sizes)
