"""How large the step of compressed gossip may be: where it stops to bring the workers together, and a good one below.

Between x, the workers' models, and h, what is known of them, one sync of compressed gossip is::

    r = (x - h) - C(x - h);    x <- x + gamma (W - I) (x - r);    x - h <- x_new - (x - r)

Along an eigenvector of W with eigenvalue 1 - mu, and with a = gamma mu, an element of x and of d = x - h becomes::

    x <- (1 - a) x + a r;    d <- -a x + (1 + a) r

What a compressor does to one element is described by three numbers: the *share* of a tensor's elements of which a
message tells anything, and for these the *gain* c and the relative *noise* nu of what is decoded: r is (1 - c) d plus
nu |d| times something of mean 0 and variance 1. An element of which nothing is told has r = d. The second moments of
(x, d) then follow a linear recursion, and gossip is stable in mean square while its spectral radius is below one.
Random elements are told at random; the largest are told in turn, as an element that waits drifts until it is one of
them.

The largest mu of W decides. It is exact on complete graphs, where all modes have it, for QSGD and RandomK; for
other graphs and compressors it is cautious, as ``tests/algorithms/test_consensus_step.py`` shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

from lightning_slowmo.compression import Compressor, TopK
from lightning_slowmo.topology import Mixing, Schedule, make

SAFETY = 2 / 3
"""The suggested step relative to the largest stable one: 1 without loss on a ring, about 0.45 for signs there, which is
what CHOCO-SGD's authors found by tuning. The steps of its theory are a thousand times smaller."""

SAMPLE = 10_000
"""Elements on which a compressor's gain and noise are measured."""


class Loss(NamedTuple):
    """What a compressor does to the elements of normally distributed tensors.

    Attributes:
        share: share of the elements of which a message tells anything.
        gain: of these, the factor of what is decoded.
        noise: of these, the rest of what is decoded, relative to the elements.
        in_turn: whether the elements are told in turn, and not at random.
    """

    share: float
    gain: float
    noise: float
    in_turn: bool

    @classmethod
    def of(cls, compressor: Compressor, segments: Sequence[int]) -> Loss:
        """Measure a compressor on tensors of these lengths; the longest one counts."""
        return _measured(compressor, max(segments, default=1))

    def radius(self, a: float) -> float:
        """The factor by which a sync multiplies second moments in the long run, along a mode of a = gamma mu."""
        missing = 1 - self.gain
        told = _moments([[1 - a, a * missing], [-a, (1 + a) * missing]])
        told += self.noise**2 * _moments([[0, a], [0, 1 + a]])
        if not self.in_turn:
            untold = _moments([[1 - a, a], [-a, 1 + a]])
            return _radius(self.share * told + (1 - self.share) * untold)
        waits = 1 / self.share - 1
        drift = waits * a  # an element that waits k syncs goes through the k-th power, which is linear in k
        return _radius(told @ _moments([[1 - drift, drift], [-drift, 1 + drift]])) ** self.share

    @property
    def largest(self) -> float:
        """The a from which on gossip is unstable; 0 if it is for all."""
        stable, unstable = 0.0, 4.0
        for _ in range(40):
            middle = (stable + unstable) / 2
            stable, unstable = (middle, unstable) if self.radius(middle) < 1 else (stable, middle)
        return stable if stable > 1e-9 else 0.0


def largest_consensus_step(
    topology: Any, compressor: Compressor, workers: int, mixing: Mixing = "uniform", segments: Sequence[int] = (SAMPLE,)
) -> float:
    """The consensus step from which on compressed gossip drives workers apart instead of together.

    Args:
        topology: who sends to whom, see :func:`lightning_slowmo.topology.make`; undirected.
        compressor: how differences are compressed.
        workers: how many.
        mixing: how the topology's graph is weighted.
        segments: lengths of the model's tensors, of which compressors keep shares.

    Returns:
        The step; infinity for one worker, 0 if the compressor loses more than it tells, so that no step would do.

    Raises:
        ValueError: if the topology cannot connect so many workers by one symmetric matrix.
    """
    eigenvalues = np.linalg.eigvalsh(symmetric(topology, mixing, workers).weights())
    largest = Loss.of(compressor, segments).largest
    if not largest:
        return 0.0
    return largest / (1 - float(eigenvalues[0])) if workers > 1 else math.inf


def suggest_consensus_step(
    topology: Any, compressor: Compressor, workers: int, mixing: Mixing = "uniform", segments: Sequence[int] = (SAMPLE,)
) -> float:
    """A consensus step at a distance from where compressed gossip diverges, at most 1.

    It has three digits: eigenvalues differ in the last bits from machine to machine, and workers must not.

    Args:
        topology: who sends to whom, see :func:`lightning_slowmo.topology.make`; undirected.
        compressor: how differences are compressed.
        workers: how many.
        mixing: how the topology's graph is weighted.
        segments: lengths of the model's tensors, of which compressors keep shares.

    Raises:
        ValueError: if the topology cannot connect so many workers by one symmetric matrix.

    Example:
        >>> from lightning_slowmo.compression import Identity, Sign
        >>> suggest_consensus_step("ring", Identity(), workers=8)
        1.0
        >>> suggest_consensus_step("ring", Sign("l1"), workers=8)
        0.464
    """
    largest = largest_consensus_step(topology, compressor, workers, mixing, segments)
    return min(1.0, float(f"{SAFETY * largest:.3g}"))


def symmetric(topology: Any, mixing: Mixing, workers: int) -> Schedule:
    """The schedule of a topology whose weights are symmetric and never change.

    Raises:
        ValueError: if it is none of these.
    """
    schedule = make(topology, mixing).on(workers)
    if schedule.period != 1 or not np.allclose(schedule.weights(), schedule.weights().T):
        raise ValueError(
            f"SQuARM needs the same symmetric weights at every step, which {topology!r} does not give. Use an "
            "undirected graph such as 'ring', with mixing='metropolis' if it is irregular."
        )
    return schedule


@cache
def _measured(compressor: Compressor, length: int) -> Loss:
    generator = torch.Generator().manual_seed(0)
    length_of_sample = max(1, min(length, SAMPLE))
    lengths = (length_of_sample,) * min(SAMPLE // length_of_sample, 100)
    sample = torch.randn(sum(lengths), generator=generator, dtype=torch.float64)
    decoded = compressor.decompress(compressor.compress(sample, lengths, generator), lengths, sample.dtype)
    share = compressor.share(length)
    if share < 1:
        sample, decoded = sample[decoded != 0], decoded[decoded != 0]
    energy = float(sample.square().sum())
    gain = float(sample @ decoded) / energy
    return Loss(share, gain, float((decoded - gain * sample).norm()) / energy**0.5, isinstance(compressor, TopK))


def _moments(step: list[list[float]]) -> np.ndarray:
    """What a linear step of (x, d) does to their products."""
    return np.kron(step, step)


def _radius(matrix: np.ndarray) -> float:
    return float(np.abs(np.linalg.eigvals(matrix)).max())
