"""Mixing matrices of a fixed number of workers, step after step, and each worker's messages, which follow from them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cached_property, reduce
from typing import NamedTuple

import networkx as nx
import numpy as np

TOLERANCE = 1e-6
"""Sums of weights may be off by this much: a matrix that was made in float32 passes."""


class Exchange(NamedTuple):
    """What one worker does at one step.

    Attributes:
        self_weight: The share of its own model that the worker keeps.
        sends: ``(peer, weight)`` for every message that leaves, by rank: the share of this worker's model that is the
            peer's.
        receives: ``(peer, weight)`` for every message that arrives, by rank: the share of the peer's model.
    """

    self_weight: float
    sends: tuple[tuple[int, float], ...]
    receives: tuple[tuple[int, float], ...]


class Traffic(NamedTuple):
    """How many messages, each the size of the model, a worker sends in a step.

    Attributes:
        max: By the busiest worker in its busiest step.
        mean: On average over workers and steps.
    """

    max: int
    mean: float


class Schedule:
    """The mixing matrices of a fixed number of workers, step after step.

    Args:
        matrices: The matrices of one period, in order; after the last, the first comes again. Entry ``[i, j]`` is the
            share of worker j's model that goes into worker i's mix.

    Raises:
        ValueError: A matrix is not square, or not of the size of the others, has a negative entry, a column that does
            not sum to one, or a worker that keeps nothing of its own (two such workers can swap models for ever without
            agreeing); or what one worker knows never reaches another, however many periods pass.
    """

    def __init__(self, matrices: Iterable[np.ndarray]) -> None:
        self._matrices = tuple(np.array(matrix, dtype=np.float64) for matrix in matrices)
        if len({matrix.shape for matrix in self._matrices}) != 1:
            raise ValueError("a schedule needs at least one mixing matrix, and all of one size")
        for matrix in self._matrices:
            _check_weights(matrix)
            matrix.setflags(write=False)  # handed out as it is
        if self.period is not None:
            _check_connected(self._matrices)

    @property
    def workers(self) -> int:
        """The number of workers."""
        return len(self._matrices[0])

    @property
    def period(self) -> int | None:
        """The number of steps after which the weights repeat: 1 if they never change, None if they are random."""
        return len(self._matrices)

    def weights(self, step: int = 0) -> np.ndarray:
        """The mixing matrix of a step.

        Args:
            step: Rounds of gossip before this one, from 0.

        Returns:
            A read-only float64 array of shape (workers, workers), non-negative, with columns that sum to one.
        """
        return self._matrices[step % len(self._matrices)]

    def exchange(self, rank: int, step: int = 0) -> Exchange:
        """What one worker sends and receives at a step: its column and its row of the mixing matrix.

        Args:
            rank: The worker, from 0.
            step: Rounds of gossip before this one, from 0.

        Returns:
            Peers by increasing rank. Each send is the receive of its peer, with the same weight.

        Raises:
            ValueError: There is no such worker.
        """
        if not 0 <= rank < self.workers:
            raise ValueError(f"rank {rank} is not one of {self.workers} workers")
        matrix = self.weights(step)

        def peers(weights: np.ndarray) -> tuple[tuple[int, float], ...]:
            return tuple((int(peer), float(weights[peer])) for peer in np.flatnonzero(weights) if peer != rank)

        return Exchange(float(matrix[rank, rank]), sends=peers(matrix[:, rank]), receives=peers(matrix[rank]))

    @property
    def doubly_stochastic(self) -> bool:
        """Whether the rows sum to one as the columns do: if not, only push-sum gives the mean."""
        return all(np.allclose(matrix.sum(axis=1), 1, rtol=0, atol=TOLERANCE) for matrix in self._matrices)

    @property
    def traffic(self) -> Traffic:
        """How many messages a worker sends in a step."""
        sent = np.array([np.count_nonzero(matrix, axis=0) - 1 for matrix in self._matrices])
        return Traffic(int(sent.max()), float(sent.mean()))

    @cached_property
    def consensus_rate(self) -> float:
        """The factor by which a step of pure gossip shrinks the distance of the workers from their mean.

        With P = W_{p-1} ... W_1 W_0, the product over a period of p steps, it is |lambda_2(P)|^(1/p), where lambda_2 is
        the eigenvalue that is second in modulus: the rate that gossip settles to, also for the de-biased models of
        push-sum. Where P is normal, as for symmetric matrices and for the exponential graphs, it equals
        ||P - 11^T/n||_2^(1/p) and so bounds every period, from any start. It is 0 where gossip reaches the exact mean
        in finitely many steps. For random matchings, see :class:`RandomMatching`.
        """
        if self.workers == 1:
            return 0.0
        product = reduce(lambda done, matrix: matrix @ done, self._matrices)
        second = np.sort(np.abs(np.linalg.eigvals(product)))[-2]
        # Where a period leaves less than float32 can hold, the eigenvalue is round-off, which the root would blow up.
        return float(second ** (1 / len(self._matrices))) if second > 1e-7 else 0.0

    @property
    def spectral_gap(self) -> float:
        """1 - ``consensus_rate``, per step: for a static graph 1 - |lambda_2(W)|, which CHOCO-SGD calls rho."""
        return 1 - self.consensus_rate


class RandomMatchings(Schedule):
    """A new random matching at every step, which depends on (seed, step) alone.

    Args:
        workers: The number of workers, at least 2.
        seed: Not negative, the same on all workers.
    """

    def __init__(self, workers: int, seed: int) -> None:
        self._workers, self._seed = workers, seed
        # Checking one step is enough: the steps are the same up to the numbering of the workers.
        super().__init__([self.weights(0)])

    @property
    def period(self) -> None:
        """None: the weights never repeat."""
        return None

    def weights(self, step: int = 0) -> np.ndarray:
        """The mixing matrix of a step: partners average, of an odd number of workers one keeps its model."""
        # A generator of our own, so as not to disturb the user's, and its raw bits: these alone numpy promises not to
        # change between versions, and workers that disagree about the matching would wait for one another for ever.
        bits = np.random.PCG64(np.random.SeedSequence(self._seed, spawn_key=(step,))).random_raw(self._workers)
        pairs = np.argsort(bits)[: self._workers // 2 * 2].reshape(-1, 2)
        matrix = np.eye(self._workers)
        for one, other in (pairs.T, pairs.T[::-1]):
            matrix[one, one] = matrix[one, other] = 0.5
        return matrix

    @cached_property
    def consensus_rate(self) -> float:
        """The factor by which the root of the expected squared distance from the mean shrinks in a step."""
        # W is a projection: E|Wx|^2 = x^T E[W] x. By symmetry E[W] multiplies all that is orthogonal to 1 by the same
        # factor, 1 - n/2 times the probability of a pair, which is n // 2 over n (n - 1) / 2.
        return math.sqrt(1 - (self._workers // 2) / (self._workers - 1))


def validate(exchanges: Sequence[Exchange]) -> None:
    """Checks a step from both ends: every send has its receive, with the same weight, and no mass is lost.

    Exchanges of one schedule always pass. Those that were gathered from workers do not if the workers were given
    different graphs (random ones without a seed); without this check, they would wait for messages that never come.

    Args:
        exchanges: What each worker does, by rank.

    Raises:
        ValueError: Two ends disagree, or the shares of a worker do not sum to one.
    """
    sent = {(rank, peer): weight for rank, exchange in enumerate(exchanges) for peer, weight in exchange.sends}
    awaited = {(peer, rank): weight for rank, exchange in enumerate(exchanges) for peer, weight in exchange.receives}
    for sender, receiver in sorted(sent.keys() | awaited.keys()):
        share, expected = (ends.get((sender, receiver), 0.0) for ends in (sent, awaited))
        if not math.isclose(share, expected, rel_tol=TOLERANCE):
            raise ValueError(
                f"worker {sender} sends worker {receiver} a share of {share:.6g}, but worker {receiver} awaits one of "
                f"{expected:.6g}: do all workers have the same topology and seed?"
            )
    for rank, exchange in enumerate(exchanges):
        total = exchange.self_weight + sum(weight for _, weight in exchange.sends)
        if abs(total - 1) > TOLERANCE:
            raise ValueError(f"the shares of worker {rank} sum to {total}, not to 1")


def _check_weights(matrix: np.ndarray) -> None:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.size == 0:
        raise ValueError(f"a mixing matrix must be square and not empty, got shape {matrix.shape}")
    if not (matrix >= 0).all():
        raise ValueError("the weights of a mixing matrix must be numbers that are not negative")
    columns, rows = matrix.sum(axis=0), matrix.sum(axis=1)
    wrong = np.flatnonzero(~(np.abs(columns - 1) <= TOLERANCE))
    if wrong.size:
        hint = "; its rows do: transpose it" if np.allclose(rows, 1, rtol=0, atol=TOLERANCE) else ""
        raise ValueError(
            f"column {wrong[0]} of the mixing matrix sums to {columns[wrong[0]]:.6g}, not to 1: "
            f"W[i, j] is the share of worker j's model that goes to worker i{hint}"
        )
    if not matrix.diagonal().all():
        raise ValueError(f"worker {matrix.diagonal().argmin()} must keep a share of its own: its W[i, i] is 0")


def _check_connected(matrices: Sequence[np.ndarray]) -> None:
    # Transposed: networkx reads entry [j, i] as the edge from j to i.
    union = nx.from_numpy_array(sum(matrices).T, create_using=nx.DiGraph)  # type: ignore[union-attr]
    for component in nx.strongly_connected_components(union):
        if len(component) < len(union):
            raise ValueError(
                f"not connected: over a period of {len(matrices)} step(s), models do not travel both ways between "
                f"workers {sorted(component)} and the others"
            )
