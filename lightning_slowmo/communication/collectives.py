"""Collective operations on whole parameter sets: bucket by bucket, a few in flight."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_slowmo.communication.workers import Sum, Workers
from lightning_slowmo.parameters import Block, Bucket, Layout, Scratch, Shards

Then = Callable[[Block, Tensor, float], None]
"""What is made of a mean: called with each block, the sum over the workers and their weight, as soon as the sum has
come (while the cache holds it). It overwrites the sum with what the parameters get instead of ``sum / weight``."""

DRIFT_SAMPLE = 2**18
"""Drift is measured on about this many coordinates: all of them in a smaller model."""

SAMPLE_PIECE = 64
"""Neighbouring coordinates that are sampled together, so that a sample costs few cache misses."""


class Drift:
    """How far this worker is from the mean, relative to the norm of the mean.

    Reading every coordinate twice more would cost a fifth of a sync, so a large model is sampled: evenly spaced pieces
    of :data:`SAMPLE_PIECE` coordinates.

    Args:
        numel: number of coordinates in total.
    """

    def __init__(self, numel: int) -> None:
        self._stride = max(1, numel // DRIFT_SAMPLE)
        self._squares: list[Tensor] = []

    def sample(self, flat: Tensor) -> Tensor:
        """A copy of the coordinates to remember until the mean is known."""
        return self._pieces(flat).clone()

    def compare(self, local: Tensor, total: Tensor, weight: float) -> None:
        """Take the difference of a sample to the mean, ``total / weight``, into account."""
        mean = self._pieces(total) / weight
        norms = torch.stack([torch.linalg.vector_norm(local.sub_(mean)), torch.linalg.vector_norm(mean)])
        self._squares.append(norms.double().square())

    def _pieces(self, flat: Tensor) -> Tensor:
        if self._stride == 1:
            return flat
        row = SAMPLE_PIECE * self._stride
        rows = flat.numel() // row
        return flat[: rows * row].view(rows, row)[:, :SAMPLE_PIECE] if rows else flat[:SAMPLE_PIECE]

    def value(self) -> float:
        """The relative distance; 0 if there is nothing to compare."""
        if not self._squares:
            return 0.0
        distance, norm = torch.stack([square.cpu() for square in self._squares]).sum(0).sqrt().tolist()
        return distance / norm if norm else distance


def average(
    buckets: Sequence[Bucket],
    workers: Workers,
    scratch: Scratch,
    weights: Sequence[float] | None = None,
    then: Then | None = None,
) -> float:
    """Replace parameters by their mean over the workers.

    Args:
        buckets: the parameters.
        workers: all of whom must call this.
        scratch: buffers for the buckets in flight.
        weights: weight of each worker, by rank; equal if None.
        then: what is made of the mean, if the parameters get something else.

    Returns:
        The drift: this worker's distance from the mean before, relative to the norm of the mean.
    """
    drift = Drift(_numel(buckets))
    in_flight: deque = deque()

    def arrive() -> None:
        bucket, local, sum = in_flight.popleft()
        flat = sum.wait()
        drift.compare(local, flat, sum.weight)
        _take_mean(bucket, flat, sum.weight, then)
        bucket.unpack(flat)

    for bucket in buckets:
        if len(in_flight) == scratch.count:
            arrive()
        flat = bucket.pack(scratch.take(bucket))
        local = drift.sample(flat)
        in_flight.append((bucket, local, workers.sum(flat, weights)))
    while in_flight:
        arrive()
    return drift.value()


@dataclass
class DelayedAverage:
    """A mean of parameters over the workers that is on its way while training goes on.

    With s the parameters that were sent and x those of some steps later, :meth:`correct` makes them::

        x <- y + (x - s)        y = mean(s), or what ``then`` makes of it

    that is, where they would be if the steps since had been taken from y. Written so, what has not moved since becomes
    y to the last bit.

    Attributes:
        buckets: the parameters.
        sent: s, one flat tensor per bucket.
        new: y as soon as it has arrived, one flat tensor per bucket.
        sums: the sums that become y; none once it has arrived.
        then: what is made of the mean.
        steps: local steps since it was sent.
        drift: this worker's distance from the mean, relative to the norm of the mean; 0 until that is known.
    """

    buckets: Sequence[Bucket]
    sent: list[Tensor]
    new: list[Tensor]
    sums: list[Sum] = field(default_factory=list)
    then: Then | None = None
    steps: int = 0
    drift: float = 0.0

    @classmethod
    def send(
        cls,
        buckets: Sequence[Bucket],
        workers: Workers,
        scratch: Scratch,
        weights: Sequence[float] | None = None,
        then: Then | None = None,
    ) -> DelayedAverage:
        """Send all buckets at once, in the same order as the other workers, and wait for nobody.

        Args:
            buckets: the parameters.
            workers: all of whom must call this.
            scratch: two buffers for each bucket, that are used by nobody else until the parameters are corrected.
            weights: weight of each worker, by rank; equal if None.
            then: what is made of the mean.
        """
        self = cls(buckets, [], [], then=then)
        for bucket in buckets:
            sent, new = (scratch.allot(bucket, bucket.numel)[: bucket.numel] for _ in range(2))
            self.sent.append(bucket.copy_to(sent))
            self.new.append(new.copy_(sent))
            self.sums.append(workers.sum(new, weights))
        return self

    def arrive(self) -> None:
        """Wait until the mean has come, and let ``then`` make y of it. The parameters stay as they are.

        Raises:
            SyncError: if a worker did not take part in time.
        """
        if not self.sums:
            return
        drift = Drift(_numel(self.buckets))
        for bucket, sent, sum in zip(self.buckets, self.sent, self.sums, strict=True):
            flat = sum.wait()
            drift.compare(drift.sample(sent), flat, sum.weight)
            _take_mean(bucket, flat, sum.weight, self.then)
        self.sums = []
        self.drift = drift.value()

    def correct(self, scratch: Scratch) -> None:
        """Correct the parameters. What has arrived stays as it is.

        Args:
            scratch: a buffer for the bucket in hand.
        """
        for bucket, sent, new in zip(self.buckets, self.sent, self.new, strict=True):
            flat = bucket.pack(scratch.take(bucket))
            for (_, x), (_, s), (_, y) in zip(*map(bucket.blocks, (flat, sent, new)), strict=True):
                x.sub_(s).add_(y)
            bucket.unpack(flat)


def _numel(buckets: Sequence[Bucket]) -> int:
    return sum(bucket.numel for bucket in buckets)


def _take_mean(bucket: Bucket, flat: Tensor, weight: float, then: Then | None) -> None:
    """Turn a sum over the workers into their mean, or into what is made of it."""
    for block, total in bucket.blocks(flat):
        if then is not None:
            then(block, total, weight)
        elif weight != 1:
            total.mul_(1 / weight)


def average_sharded(
    shards: Shards,
    workers: Workers,
    scratch: Scratch,
    weights: Sequence[float] | None,
    then: Then,
) -> float:
    """Replace the parameters by what ``then`` makes of their mean, each worker working on its own piece of them.

    Reduce-scatter, ``then``, all-gather: the traffic of an all-reduce, and no worker needs the others' slow state.

    Args:
        shards: the parameters, and the pieces of the workers.
        workers: all of whom must call this.
        scratch: buffers for the bucket in hand.
        weights: weight of each worker, by rank; equal if None.
        then: as for :func:`average`.

    Returns:
        The drift, measured on this worker's piece alone.
    """
    drift = Drift(max(1, shards.layout.numel // workers.size))
    for piece in shards.pieces:
        bucket, numel = piece.bucket, piece.block.stop - piece.block.start
        padded = scratch.allot(bucket, piece.length * workers.size)[: piece.length * workers.size]
        padded[bucket.numel :].zero_()
        padded[: bucket.numel].copy_(bucket.pack(scratch.take(bucket)))
        own = padded[workers.rank * piece.length :][: piece.length].clone()
        local = drift.sample(own[:numel])
        total_weight = workers.weigh(padded, weights)
        workers.scatter_sum(padded, own)
        drift.compare(local, own[:numel], total_weight)
        if numel:
            then(piece.block, own[:numel], total_weight)
        workers.gather_pieces(padded, own)
        bucket.unpack(padded[: bucket.numel])
    return drift.value()


def gather_shards(shards: Shards, buffers: Sequence[Tensor], workers: Workers) -> list[Tensor]:
    """The whole of slow state of which each worker keeps its pieces, on every worker.

    Args:
        shards: the pieces.
        buffers: this worker's, as :meth:`Shards.cut` made them.
        workers: all of whom must call this.

    Returns:
        Buffers in the whole layout, one flat tensor per run.
    """
    whole = [flat.to(buffers[run].device) for run, flat in enumerate(shards.layout.empty())]
    for piece in shards.pieces:
        device = piece.bucket.device
        own = torch.zeros(piece.length, dtype=piece.bucket.dtype, device=device)
        own[: piece.block.stop - piece.block.start].copy_(piece.block.of(buffers))
        padded = own.new_empty(piece.length * workers.size)
        workers.gather_pieces(padded, own)
        piece.bucket.of(whole).copy_(padded[: piece.bucket.numel])
    return whole


def average_tensors(tensors: Sequence[Tensor], workers: Workers, weights: Sequence[float] | None = None) -> None:
    """Replace float tensors by their mean over the workers, and others by worker 0's (for buffers).

    Args:
        tensors: of equal shapes and dtypes on all workers.
        workers: all of whom must call this.
        weights: weight of each worker, by rank; equal if None.
    """
    if workers.alone:
        return
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    average(Layout([floats]).buckets, workers, Scratch(), weights)
    broadcast_tensors([tensor for tensor in tensors if not tensor.is_floating_point()], workers)


def broadcast_tensors(tensors: Sequence[Tensor], workers: Workers, source: int = 0) -> None:
    """Replace tensors by those of one worker.

    Args:
        tensors: of equal shapes and dtypes on all workers.
        workers: all of whom must call this.
        source: rank of the worker whose tensors all get.
    """
    if workers.alone:
        return
    alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            alike.setdefault((tensor.dtype, tensor.device), []).append(tensor.detach())
    for same in alike.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in same])
        workers.broadcast(flat, source)
        for tensor, piece in zip(same, flat.split([tensor.numel() for tensor in same]), strict=True):
            tensor.copy_(piece.view(tensor.shape))
