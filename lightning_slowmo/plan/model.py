"""The model: seconds, bytes and memory of one way to train, from shapes, a step's computation, and a link."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lightning_slowmo.algorithms import Algorithm
from lightning_slowmo.algorithms.base import require_elementwise
from lightning_slowmo.bucket_sizes import sizes_for
from lightning_slowmo.communication.probe import Link
from lightning_slowmo.compression import (
    QSGD,
    Cast,
    ChunkedTopK,
    Compressor,
    CountSketch,
    Identity,
    RandomK,
    Sign,
    SignTopK,
    TopK,
)
from lightning_slowmo.traffic import Sync, bytes_per_step, layout_of

BACKWARD_SHARE = 0.6
"""Share of a step's computation that is the backward pass, behind which DDP sends."""

DDP_BUCKETS = (2**20, 25 * 2**20)
"""Bytes of DDP's first bucket of gradients, and of all others."""

SECONDS_HANDLED = 5e-9
"""Seconds per element for packing, an outer step and unpacking, on one core of a server (measured)."""


@dataclass(frozen=True)
class Costs:
    """Seconds per element of a vector.

    Attributes:
        compress: to compress it.
        decompress: to decompress it.
    """

    compress: float
    decompress: float


COSTS: dict[type[Compressor], Costs] = {
    Identity: Costs(9e-9, 1e-9),
    Cast: Costs(3e-9, 1e-9),
    Sign: Costs(3e-9, 3e-9),
    QSGD: Costs(10e-9, 3.3e-9),
    TopK: Costs(7e-9, 2e-9),
    ChunkedTopK: Costs(7e-9, 2e-9),
    SignTopK: Costs(7e-9, 2e-9),
    RandomK: Costs(3.2e-9, 3.1e-9),
    CountSketch: Costs(6e-9, 30e-9),
}
"""What ``docs/compression.md`` has measured, with a nanosecond for copying an element (8 GB/s).

Chunks are taken to cost what whole tensors do.
"""


@dataclass(frozen=True)
class DDP:
    """DistributedDataParallel, for comparison.

    Args:
        element_bytes: bytes of a gradient's element on the wire: 4, or 2 with a bf16 hook.
        powersgd_rank: rank of PowerSGD's matrices; 0 for no such hook.
    """

    element_bytes: int = 4
    powersgd_rank: int = 0

    def wire_bytes(self, shape: Sequence[int]) -> int:
        """Bytes of one gradient on the wire."""
        numel = math.prod(shape)
        if self.powersgd_rank and len(shape) > 1:
            rows, columns = shape[0], numel // shape[0]
            rank = min(rows, columns, self.powersgd_rank)
            if 2 * (rows + columns) * rank < numel:  # the hook's min_compression_rate
                return 4 * (rows + columns) * rank
        return self.element_bytes * numel


@dataclass(frozen=True)
class Prediction:
    """What the model says of one way to train.

    Attributes:
        step: seconds per optimizer step.
        sent: bytes that a worker sends per step, the mean over workers.
        memory: bytes that a worker keeps beside parameters, gradients and the optimizer's state.
    """

    step: float
    sent: float
    memory: float


def predict(
    way: Algorithm | DDP,
    shapes: Sequence[Sequence[int]],
    workers: int,
    step: float,
    link: Link,
    costs: Mapping[str, Costs] | None = None,
    handling: float = SECONDS_HANDLED,
    bucket_cap_mb: float | None = None,
    shards: int = 1,
) -> Prediction:
    """What a way to train would take.

    Args:
        way: a configuration, or DDP.
        shapes: of the parameters, float32.
        workers: how many.
        step: seconds of a step of one worker alone.
        link: of each worker.
        costs: of compressors, by their representation, where :data:`COSTS` is not to be used.
        handling: seconds per element of a sync's own work, compression aside.
        bucket_cap_mb: size of messages in MiB; None: as the strategy chooses it.
        shards: processes that make up a worker, each with a shard of the model; bytes and memory are one's, and they
            share the worker's link. DDP then stands for gradients of shards that are averaged at every step (HSDP).

    Raises:
        ValueError: if a number is out of its range, the algorithm is none for shards, does not say what it sends and
            keeps, or does not fit the workers.
    """
    _check_numbers(workers, step, link)
    if shards != 1:
        if not shards >= 1:
            raise ValueError(f"shards must be at least 1, got {shards!r}.")
        if isinstance(way, Algorithm):
            require_elementwise(way)
        shapes, link = [shard_of(shape, shards) for shape in shapes], replace(link, bandwidth=link.bandwidth / shards)
    layout = layout_of(shapes, sizes=sizes_for("cpu", workers, bucket_cap_mb))
    if isinstance(way, DDP):
        return _ddp(way, shapes, workers, step, link)
    if workers == 1:
        return Prediction(step, 0.0, 4.0 * way.state_numel(layout, 1))
    every = way.syncs(layout, workers)
    waits = 0.0
    for sync in every:
        hidden = min(transfer_seconds(sync, link), sync.behind * step)
        waits += (transfer_seconds(sync, link) - hidden + work_seconds(sync, costs, handling)) / sync.every
    scratch = 4 * layout.sizes.in_flight * max((b.numel for b in layout.buckets if not b.in_place), default=0)
    return Prediction(step + waits, bytes_per_step(every), 4 * way.state_numel(layout, workers) + scratch)


def shard_of(shape: Sequence[int], shards: int) -> tuple[int, ...]:
    """The shape of the largest shard of a tensor, as ``fully_shard`` cuts it: along its first dimension."""
    return (-(-shape[0] // shards), *shape[1:]) if shape else ()


def _check_numbers(workers: int, step: float, link: Link) -> None:
    """Raise ValueError if a number is out of its range; NaN always is."""
    if not workers >= 1:
        raise ValueError(f"workers must be at least 1, got {workers!r}.")
    for name, value in (("step", step), ("latency", link.latency)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a finite number of seconds, at least 0, got {value!r}.")
    if not link.bandwidth > 0:
        raise ValueError(f"bandwidth must be above 0 bits per second, got {link.bandwidth!r}.")


def transfer_seconds(sync: Sync, link: Link) -> float:
    """Seconds that the messages of a communication take on a link."""
    return sync.messages * link.latency + 8 * sync.busiest / link.bandwidth


def work_seconds(sync: Sync, costs: Mapping[str, Costs] | None = None, handling: float = SECONDS_HANDLED) -> float:
    """Seconds of a worker's own work in a communication."""
    seconds = handling * sync.handled
    if sync.compressor is not None:
        cost = (costs or {}).get(repr(sync.compressor)) or COSTS[type(sync.compressor)]
        seconds += cost.compress * sync.compressed + cost.decompress * sync.decompressed
    return seconds


def _ddp(way: DDP, shapes: Sequence[Sequence[int]], workers: int, step: float, link: Link) -> Prediction:
    """Buckets of gradients in the order of the backward pass, each sent when it is full and the one before is through.

    A bucket is full when its share of all elements is: the backward pass takes as long for each element.
    """
    numel = sum(math.prod(shape) for shape in shapes)
    buckets: list[tuple[int, int]] = []  # elements done at its end, bytes on the wire
    done = size = wire = 0
    for shape in reversed(shapes):
        done += math.prod(shape)
        size += 4 * math.prod(shape)
        wire += way.wire_bytes(shape)
        if size >= DDP_BUCKETS[min(len(buckets), 1)]:
            buckets.append((done, wire))
            size = wire = 0
    if size:
        buckets.append((done, wire))
    messages = (3 if way.powersgd_rank else 1) * 2 * (workers - 1)
    end = (1 - BACKWARD_SHARE) * step
    backward, sent = BACKWARD_SHARE * step, 0.0
    if workers > 1:
        for done, wire in buckets:
            through = 2 * (workers - 1) / workers * wire
            ready = (1 - BACKWARD_SHARE) * step + backward * done / numel
            end = max(end, ready) + messages * link.latency + 8 * through / link.bandwidth
            sent += through
    flag = math.ceil(math.log2(workers)) * link.latency  # Lightning's broadcast before every batch
    return Prediction(max(step, end) + flag, sent, 4.0 * numel)
