"""How far a worker was from the mean."""

from __future__ import annotations

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
