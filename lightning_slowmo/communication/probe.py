"""How fast the links between the workers are, measured through the very calls that training makes."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from lightning_slowmo.communication.pipeline import complete
from lightning_slowmo.communication.workers import Workers

ENOUGH_SECONDS = 0.3
"""A message that travels so long shows the bandwidth: what buffers swallow at its beginning no longer counts."""

LARGEST_MESSAGE = 2**28
"""Bytes beyond which messages are not made longer, however fast the link."""


@dataclass(frozen=True)
class Link:
    """What a worker's connection can do.

    Attributes:
        bandwidth: bits per second, in either direction at once.
        latency: seconds for a short message, the work of sending and receiving it included.
    """

    bandwidth: float
    latency: float


def measure_link(workers: Workers, device: torch.device | str = "cpu", repeats: int = 5) -> Link:
    """Measure bandwidth and latency, all workers at once: each sends to the next one, as in a ring all-reduce.

    Args:
        workers: all of whom must call this, two at least.
        device: where messages lie.
        repeats: of each measurement; the median counts.

    Returns:
        The same on all workers: the bandwidth of the slowest transfer, and the median latency.

    Raises:
        ValueError: if there is only one worker.
        SyncError: if a worker did not take part in time.
    """
    if workers.alone:
        raise ValueError("A link needs two workers at least, and this one is alone. Start several, say with torchrun.")
    workers.gather([0.0])  # connects
    hops = [_seconds_of_header(workers) for _ in range(5 * repeats)]
    latency = statistics.median(hops) / (workers.size - 1)
    numel, slowest = 2**16, _slowest_shift(workers, 2**16, device)
    while slowest < ENOUGH_SECONDS and numel < LARGEST_MESSAGE:
        numel *= max(2, min(16, int(ENOUGH_SECONDS / max(slowest, 1e-6)) + 1))
        numel = min(numel, LARGEST_MESSAGE)
        slowest = _slowest_shift(workers, numel, device)
    seconds = statistics.median([_slowest_shift(workers, numel, device) for _ in range(repeats)])
    everyone = workers.gather([latency], "a measured latency")
    return Link(8 * numel / seconds, statistics.median(row[0] for row in everyone))


def _seconds_of_header(workers: Workers) -> float:
    start = time.perf_counter()
    workers.gather([0.0])
    return time.perf_counter() - start


def _slowest_shift(workers: Workers, numel: int, device: torch.device | str) -> float:
    """Seconds until everybody has a message of its neighbour; the same number on all workers."""
    message = torch.zeros(numel, dtype=torch.uint8, device=device)
    following, previous = (workers.rank + 1) % workers.size, (workers.rank - 1) % workers.size
    workers.gather([0.0])
    start = time.perf_counter()
    complete(workers.send_and_receive(message, [following], [previous]))
    if message.is_cuda:
        torch.cuda.synchronize(message.device)
    seconds = time.perf_counter() - start
    return max(row[0] for row in workers.gather([seconds], "a measured transfer"))
