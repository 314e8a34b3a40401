"""How large messages are: large enough that a link is busy with bytes and not with waiting, and alike on all workers.

An all-reduce of n workers takes 2 (n - 1) latencies whatever its size, so buckets should grow with the latency and the
bandwidth of the links, and with n. What a link can do is known from measuring it alone, which gives another number each
time, and other buckets would round sums otherwise: a resumed run would not go on bit for bit. So buckets grow with what
all runs agree on, n and the size of the model, and who knows the link says ``bucket_cap_mb``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class BucketSizes:
    """How parameters are cut into messages, and messages into pieces for arithmetic.

    Args:
        bucket_bytes: size at which a bucket is full, in bytes. Larger ones gain nothing on loopback
            (``benchmarks/sync_round.py``); smaller ones pay latency.
        in_place_bytes: size from which a parameter is communicated in place, in bytes: as a message it is large enough
            on its own.
        block_numel: elements on which arithmetic is done at a time on a CPU, so that several passes find them in the
            cache.
        in_flight: buckets under way at a time, each of which has a buffer.
        grown_bytes: size up to which the buckets of a large model grow, in bytes.
    """

    bucket_bytes: int = 8 * 2**20
    in_place_bytes: int = 4 * 2**20
    block_numel: int = 2**17
    in_flight: int = 3
    grown_bytes: int = 0

    def grown(self, total_bytes: int) -> BucketSizes:
        """The sizes for a model whose parameters together have so many bytes.

        Example:
            >>> sizes = sizes_for("cpu", workers=64)
            >>> [sizes.grown(total).bucket_bytes // 2**20 for total in (2**20, 2**30, 2**34)]
            [8, 64, 256]
        """
        full = min(self.grown_bytes, total_bytes // GROWN_BUCKETS)
        return self if full <= self.bucket_bytes else self.of(full)

    def of(self, bucket_bytes: int) -> BucketSizes:
        """With buckets of another size; what is smaller than half of one is packed, so that buckets fill."""
        in_place_bytes = max(self.in_place_bytes, bucket_bytes // 2)
        return replace(self, bucket_bytes=bucket_bytes, in_place_bytes=in_place_bytes, grown_bytes=0)


DEFAULT_SIZES = BucketSizes()

GPU_SIZES = BucketSizes(bucket_bytes=256 * 2**20, in_place_bytes=2**62, in_flight=2)
"""For parameters on GPUs. A bucket costs its launches, some 0.1 ms of the host, in which a GPU moves 100 MiB. Nothing
is sent in place: packing costs a copy, a small part of what a message takes on any link, and leaves the parameters as
they are until the sum is there, so that one pass takes the drift and writes the new values."""

GROWN_BUCKETS = 16
"""Buckets do not grow beyond this share of the model: those under way have buffers, and one is computed on while others
travel."""

BYTES_PER_WORKER = 4 * 2**20
"""What a bucket grows by with each worker. With two buckets under way, latencies take n x latency x bandwidth / (2 x
bucket) of the time that the bytes take: 15 % at 1 ms and 10 Gbit/s."""

LARGEST = 256 * 2**20
"""Bytes to which buckets grow by themselves."""


def sizes_for(device: torch.device | str, workers: int = 1, bucket_cap_mb: float | None = None) -> BucketSizes:
    """The sizes for parameters on a device.

    Args:
        device: where they are.
        workers: between how many they travel.
        bucket_cap_mb: size at which a bucket is full, in MiB as DDP's option of that name; None: by device, number of
            workers and size of the model.
    """
    sizes = GPU_SIZES if torch.device(device).type == "cuda" else DEFAULT_SIZES
    if bucket_cap_mb is not None:
        return sizes.of(int(bucket_cap_mb * 2**20))
    grown = min(LARGEST, BYTES_PER_WORKER * workers)
    return replace(sizes, grown_bytes=grown) if grown > sizes.bucket_bytes else sizes


def check_bucket_cap(value: Any) -> None:
    """Raise ValueError unless ``bucket_cap_mb`` is None or a size of a bucket."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (number and 2**-10 <= value <= 2**20):
        raise ValueError(f"bucket_cap_mb must be None or a number of MiB from 1/1024 to 1048576, got {value!r}.")
