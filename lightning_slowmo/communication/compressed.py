"""Means over the workers of which compressed messages are sent: in two shots, or along a ring.

Both cut the vector into one *chunk* per worker, its *owner*. In **two shots** every worker compresses each chunk and
sends it to its owner, who adds up what it decodes, compresses the sum once more, and sends that to everybody. Along the
**ring** a partial sum of each chunk goes from worker to worker, compressed anew at every hop; the owner, where it ends,
compresses the whole sum, and those bits travel on unchanged.

In both, everybody decodes the owner's bits (the owner too), so the replicas are equal to the last bit. Sizes of
payloads follow from lengths alone, so none is exchanged. With n workers and payloads of c(d) bytes for d elements, a
worker sends 2 (n - 1) c(d / n) bytes.

Both are transfers, see :mod:`~lightning_slowmo.communication.pipeline`: one vector is compressed and decoded while the
messages of another travel.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_slowmo.communication.pipeline import Transfer, start
from lightning_slowmo.communication.workers import Workers
from lightning_slowmo.compression import Compressor, slice_segments


@dataclass(frozen=True)
class Chunk:
    """Elements ``[start, stop)`` of a vector, which one worker owns, and the pieces of tensors in it."""

    start: int
    stop: int
    segments: tuple[int, ...]

    def of(self, flat: Tensor) -> Tensor:
        """This chunk's elements."""
        return flat[self.start : self.stop]


def chunks(segments: Sequence[int], workers: int) -> list[Chunk]:
    """Cut a vector of consecutive tensors into one chunk per worker; in a short vector some are empty."""
    length = sum(segments)
    bounds = [length * rank // workers for rank in range(workers + 1)]
    pairs = itertools.pairwise(bounds)
    return [Chunk(start, stop, slice_segments(segments, start, stop)) for start, stop in pairs]


def mean_bytes(compressor: Compressor, segments: Sequence[int], dtype: torch.dtype, workers: int, rank: int) -> int:
    """Bytes that a worker sends for one compressed mean in two shots, exactly.

    Along the ring a worker forwards other chunks than its own, so the sum over all workers is the same, and each one's
    share differs by no more than the chunks' payloads do.
    """
    sizes = [compressor.payload_bytes(chunk.segments, dtype) for chunk in chunks(segments, workers)]
    return sum(sizes) - sizes[rank] + (workers - 1) * sizes[rank]


def two_shot(
    workers: Workers,
    flat: Tensor,
    segments: Sequence[int],
    compressor: Compressor,
    generator: torch.Generator | None = None,
    weights: Sequence[float] | None = None,
    residual: Tensor | None = None,
    owner_residual: Tensor | None = None,
) -> Transfer[Tensor]:
    """The mean over the workers in two shots, each compressed.

    Args:
        workers: all of whom must call this.
        flat: this worker's vector; not changed.
        segments: lengths of the tensors in it.
        compressor: for both shots.
        generator: this worker's own source of randomness, if the compressor draws any.
        weights: the weight of each worker, by rank; equal if None. One of weight 0 sends zeros, whatever its values.
        residual: what this worker's messages have left out so far, as long as ``flat``; it is added to this message and
            overwritten with what is missing then. None: what is lost is lost.
        owner_residual: the same for the sums of the chunk that this worker owns.

    Returns:
        A transfer whose result is the mean as all workers decode it, the same bits on each.

    Raises:
        SyncError: when run, if a worker did not take part in time.
        ValueError: when run, if the vector is not finite.
    """
    cut, sizes, shares = _plan(workers, flat, segments, compressor, weights)
    own = cut[workers.rank]
    takes_part = shares[workers.rank] > 0
    message = flat if residual is None else flat + residual
    if not takes_part:
        message = torch.zeros_like(flat)
    payloads = [compressor.compress(chunk.of(message), chunk.segments, generator) for chunk in cut]
    sent = start(workers.all_to_all(payloads, [sizes[workers.rank]] * workers.size))
    if residual is not None and takes_part:
        for chunk, payload in zip(cut, payloads, strict=True):
            decoded = compressor.decompress(payload, chunk.segments, flat.dtype)
            torch.sub(chunk.of(message), decoded, out=chunk.of(residual))
    yield
    received = sent.wait()
    total = torch.zeros(own.stop - own.start, dtype=flat.dtype, device=flat.device)
    for payload, share in zip(received, shares, strict=True):
        if share:
            total.add_(compressor.decompress(payload, own.segments, flat.dtype), alpha=share)
    if owner_residual is not None:
        total.add_(owner_residual)
    payload = compressor.compress(total, own.segments, generator)
    sent = start(workers.all_to_all([payload] * workers.size, sizes))
    if owner_residual is not None:
        torch.sub(total, compressor.decompress(payload, own.segments, flat.dtype), out=owner_residual)
    yield
    mean = torch.empty_like(flat)
    for chunk, arrived in zip(cut, sent.wait(), strict=True):
        compressor.decompress(arrived, chunk.segments, flat.dtype, out=chunk.of(mean))
    return mean


def ring(
    workers: Workers,
    flat: Tensor,
    segments: Sequence[int],
    compressor: Compressor,
    generator: torch.Generator | None = None,
    weights: Sequence[float] | None = None,
) -> Transfer[Tensor]:
    """The mean over the workers along a ring, compressed anew at every hop.

    Each compression is of a partial sum, so the error grows with the ring's length: with an unbiased compressor the
    mean is unbiased, and its variance about (n + 1) / 2 times that of compressing once.

    Args:
        workers: all of whom must call this.
        flat: this worker's vector; not changed.
        segments: lengths of the tensors in it.
        compressor: for every hop.
        generator: this worker's own source of randomness, if the compressor draws any.
        weights: the weight of each worker, by rank; equal if None. One of weight 0 adds zeros, whatever its values.

    Returns:
        A transfer whose result is the mean as all workers decode it, the same bits on each.

    Raises:
        SyncError: when run, if a worker did not take part in time.
        ValueError: when run, if the vector is not finite.
    """
    cut, sizes, shares = _plan(workers, flat, segments, compressor, weights)
    share = shares[workers.rank]
    mine = flat * share if share else torch.zeros_like(flat)
    rank, size = workers.rank, workers.size
    at = (rank - 1) % size  # so that after size - 1 hops this worker holds the whole sum of its own chunk
    total = cut[at].of(mine)
    payload = compressor.compress(total, cut[at].segments, generator)
    for _ in range(size - 1):
        at = (at - 1) % size
        [arrived] = yield from _pass_on(workers, payload, sizes[at])
        total = compressor.decompress(arrived, cut[at].segments, flat.dtype).add_(cut[at].of(mine))
        payload = compressor.compress(total, cut[at].segments, generator)
    mean = torch.empty_like(flat)

    def decode() -> None:
        compressor.decompress(payload, cut[at].segments, flat.dtype, out=cut[at].of(mean))

    for _ in range(size - 1):
        sent = start(_pass_on(workers, payload, sizes[(at - 1) % size]))
        decode()
        yield
        [payload] = sent.wait()
        at = (at - 1) % size
    decode()
    return mean


def _plan(
    workers: Workers, flat: Tensor, segments: Sequence[int], compressor: Compressor, weights: Sequence[float] | None
) -> tuple[list[Chunk], list[int], list[float]]:
    """The chunks of a vector, the sizes of their payloads, and the shares of the workers in the mean, by rank."""
    cut = chunks(segments, workers.size)
    sizes = [compressor.payload_bytes(chunk.segments, flat.dtype) for chunk in cut]
    weights = [1.0] * workers.size if weights is None else weights
    return cut, sizes, [weight / sum(weights) for weight in weights]


def _pass_on(workers: Workers, payload: Tensor, size: int) -> Transfer[list[Tensor]]:
    """Send a payload to the next worker on the ring and receive one of a known size from the one before."""
    following, previous = (workers.rank + 1) % workers.size, (workers.rank - 1) % workers.size
    return workers.send_and_receive(payload, [following], [previous], [size])
