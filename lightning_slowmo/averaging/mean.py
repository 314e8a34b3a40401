"""Exact means of buckets and of tensors: one all-reduce of every bucket, a few of them under way at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_slowmo.averaging.averager import OnSum
from lightning_slowmo.averaging.drift import Drift
from lightning_slowmo.averaging.kernels import table_of
from lightning_slowmo.averaging.outer_step import OuterStep
from lightning_slowmo.communication.broadcast import broadcast_tensors
from lightning_slowmo.communication.pipeline import Transfer, pipeline
from lightning_slowmo.communication.workers import Workers
from lightning_slowmo.parameters import Bucket, Layout
from lightning_slowmo.private import held
from lightning_slowmo.scratch import Scratch
from lightning_slowmo.storage import local
from lightning_slowmo.tensors import is_averaged


def average(
    buckets: Sequence[Bucket],
    workers: Workers,
    scratch: Scratch,
    weights: Sequence[float] | None = None,
    on_sum: OnSum | None = None,
) -> float:
    """Replace parameters by their mean over the workers.

    Args:
        buckets: the parameters.
        workers: all of whom must call this.
        scratch: buffers for the buckets under way.
        weights: weight of each worker, by rank; equal if None.
        on_sum: makes the new values from the sum; None: the mean.

    Returns:
        The drift: this worker's distance from the mean before, relative to the norm of the mean.
    """
    drift = Drift(sum(bucket.numel for bucket in buckets))
    largest = max((bucket.numel for bucket in buckets), default=0)  # so that the first sync allots all there will be

    def transfer(bucket: Bucket) -> Transfer[None]:
        table = table_of(bucket) if fuses(bucket, on_sum) else None
        if table is not None:  # the parameters keep their values until the sum is there, and one pass does the rest
            total = table.gather(scratch.allot(bucket, largest))
            weight = yield from workers.sum(total, weights)
            table.scatter(total, weight, drift, **state_of(on_sum, bucket, weight))
            return
        flat = bucket.pack(scratch.take(bucket))
        local = drift.sample(flat)
        weight = yield from workers.sum(flat, weights)
        drift.compare(local, flat, weight)
        take_mean(bucket, flat, weight, on_sum)
        bucket.unpack(flat)

    pipeline(map(transfer, buckets), depth=scratch.count)
    return drift.value()


def fuses(bucket: Bucket, on_sum: OnSum | None) -> bool:
    """Whether a kernel can do all that becomes of a bucket's sum, if there are kernels where it lies."""
    if bucket.in_place:
        return False
    return on_sum is None or (isinstance(on_sum, OuterStep) and on_sum.is_on(bucket))


def state_of(on_sum: OnSum | None, bucket: Bucket, weight: float) -> dict[str, Any]:
    """What the kernels need beside the sum: nothing for the mean alone."""
    return on_sum.state(bucket, weight) if isinstance(on_sum, OuterStep) else {}


def take_mean(bucket: Bucket, flat: Tensor, weight: float, on_sum: OnSum | None) -> None:
    """Turn a sum over the workers into their mean, or into what ``on_sum`` makes of it."""
    for block, total in bucket.blocks(flat):
        if on_sum is not None:
            on_sum(block, total, weight)
        elif weight != 1:
            total.mul_(1 / weight)


def average_tensors(tensors: Sequence[Tensor], workers: Workers, weights: Sequence[float] | None = None) -> None:
    """Replace tensors by their mean over the workers, and those of which none makes sense by worker 0's (for buffers).

    Means are of floats of 16 bits or more and of complex numbers; codes, integers and booleans have none.

    Args:
        tensors: of equal shapes and dtypes on all workers; of a ``DTensor``, what each holds of it.
        workers: all of whom must call this.
        weights: weight of each worker, by rank; equal if None.
    """
    if workers.alone:
        return
    numbers = [local(tensor) for tensor in tensors if is_averaged(tensor)]
    average(Layout([numbers], workers.sizes).buckets, workers, Scratch(), weights)
    broadcast_tensors([held(tensor) for tensor in tensors if not is_averaged(tensor)], workers)
