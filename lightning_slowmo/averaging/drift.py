"""How far a worker was from the mean."""

from __future__ import annotations

import math

import torch
from torch import Tensor

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
        self._sums: dict[torch.device, Tensor] = {}

    def sample(self, flat: Tensor) -> Tensor:
        """A copy of the coordinates to remember until the mean is known."""
        return self._pieces(flat).clone()

    def compare(self, local: Tensor, total: Tensor, weight: float) -> None:
        """Take the difference of a sample to the mean, ``total / weight``, into account."""
        mean = self._pieces(total) / weight
        norms = torch.stack([torch.linalg.vector_norm(local.sub_(mean)), torch.linalg.vector_norm(mean)])
        self._squares.append(norms.double().square())

    def pattern(self, numel: int) -> tuple[int, int]:
        """Which coordinates of a bucket a kernel is to sample, the same ones as :meth:`sample`.

        Args:
            numel: of the bucket.

        Returns:
            Of every so many coordinates the first :data:`SAMPLE_PIECE`, and where to end.
        """
        if self._stride == 1:
            return SAMPLE_PIECE, numel
        row = SAMPLE_PIECE * self._stride
        return row, numel // row * row or SAMPLE_PIECE

    def squares(self, device: torch.device) -> Tensor:
        """Where a kernel adds, in float64, the squares of sampled differences to the mean, and those of the mean."""
        if device not in self._sums:
            self._sums[device] = torch.zeros(2, dtype=torch.float64, device=device)
            self._squares.append(self._sums[device])
        return self._sums[device]

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
        by_device: dict[torch.device, list[Tensor]] = {}
        for square in self._squares:
            by_device.setdefault(square.device, []).append(square)
        sums = [torch.stack(own).sum(0) if len(own) > 1 else own[0] for own in by_device.values()]
        each = [total.tolist() for total in sums]  # a GPU waits here, once
        distance, norm = (math.sqrt(sum(squares)) for squares in zip(*each, strict=True))
        return distance / norm if norm else distance
