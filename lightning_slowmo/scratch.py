"""Memory for buckets that are under way, used again and again."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_slowmo.parameters import Bucket


class Scratch:
    """Reusable buffers for the buckets in flight: at most ``count`` of them, so memory stays bounded.

    Args:
        count: how many buckets may be in flight.
    """

    def __init__(self, count: int = 3) -> None:
        self.count = count
        self._buffers: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}
        self._next = 0

    def take(self, bucket: Bucket) -> Tensor | None:
        """The next buffer in turn, long enough for the bucket; None for a bucket that needs none."""
        return None if bucket.in_place else self.allot(bucket, bucket.numel)

    def allot(self, bucket: Bucket, numel: int) -> Tensor:
        """The next buffer in turn, of at least ``numel`` elements of the bucket's dtype."""
        key = (self._next, bucket.dtype, bucket.device)
        self._next = (self._next + 1) % self.count
        if key not in self._buffers or self._buffers[key].numel() < numel:
            self._buffers[key] = torch.empty(numel, dtype=bucket.dtype, device=bucket.device)
        return self._buffers[key]
