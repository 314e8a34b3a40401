"""How workers are connected, before it is known how many there are: by a name, at random, or by matrices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import numpy as np

from lightning_slowmo.topology.graphs import GRAPHS, SIZES, graph_traffic
from lightning_slowmo.topology.mixing import Mixing, check_mixing, mixing_matrix
from lightning_slowmo.topology.schedule import RandomMatchings, Schedule, Traffic


class Topology(ABC):
    """How workers are connected, before it is known how many there are; made by :func:`make`.

    Attributes:
        name: What error messages and pictures call it.
    """

    name: str

    @abstractmethod
    def _schedule(self, workers: int) -> Schedule:
        """The schedule of two workers or more, a supported number."""

    def _rule(self) -> tuple[str, Callable[[int], bool]]:
        """The supported numbers of workers beside 1, in words and as a test."""
        return "any number", lambda workers: True

    @property
    def sizes(self) -> str:
        """The numbers of workers beside 1 that can be connected so, in words."""
        return self._rule()[0]

    def supports(self, workers: int) -> bool:
        """Whether that many workers can be connected so; one always can."""
        return workers == 1 or (workers > 1 and self._rule()[1](workers))

    def on(self, workers: int) -> Schedule:
        """The schedule of that many workers.

        Args:
            workers: The world size, at least 1.

        Raises:
            ValueError: This topology cannot connect that many workers, or its graph is directed and has no Metropolis
                weights.
        """
        if not self.supports(workers):
            raise ValueError(f"{self.name} cannot connect {workers} workers: it takes {self.sizes}, or 1 alone")
        return self._schedule(workers) if workers > 1 else Schedule([np.eye(1)])

    def traffic(self, workers: int) -> Traffic:
        """How many messages each of that many workers sends in a step: what the schedule says, if need be without it.

        Args:
            workers: The world size, at least 1.

        Raises:
            ValueError: This topology cannot connect that many workers.
        """
        return self.on(workers).traffic


@dataclass(frozen=True)
class Named(Topology):
    """A graph known by its name.

    Args:
        name: One of :data:`NAMES` but ``random_matching``.
        mixing: The weights, see :func:`mixing_matrix`.

    Raises:
        ValueError: There is no such name or no such mixing.
    """

    name: str
    mixing: Mixing = "uniform"

    def __post_init__(self) -> None:
        if self.name not in GRAPHS:
            raise ValueError(f"unknown topology {self.name!r}: choose one of {', '.join(NAMES)}")
        check_mixing(self.mixing)

    def _rule(self) -> tuple[str, Callable[[int], bool]]:
        return SIZES.get(self.name) or super()._rule()

    def _schedule(self, workers: int) -> Schedule:
        return Schedule(mixing_matrix(graph, self.mixing) for graph in GRAPHS[self.name](workers))

    def traffic(self, workers: int) -> Traffic:
        """Counted on the graphs, as the matrices of ten thousand workers would not fit into memory."""
        if workers == 1 or not self.supports(workers):
            return super().traffic(workers)
        return graph_traffic(self.name, workers)


@dataclass(frozen=True)
class RandomMatching(Topology):
    """Random pairs that average with each other, afresh at every step; of an odd number of workers, one sits out.

    The pairs follow from (seed, step) alone: all workers agree on them without a word, and a resumed run draws the same
    ones. A step multiplies the expected square of the distance from the mean by exactly
    1 - floor(n/2) / (n - 1) = lambda_2(E[W]); the ``consensus_rate`` of the schedule is its root.

    Args:
        seed: Not negative, the same on all workers.

    Raises:
        ValueError: The seed is negative.
    """

    seed: int = 0
    name: str = field(default="random_matching", init=False, repr=False)

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"the seed of a random matching must not be negative, got {self.seed}")

    def _schedule(self, workers: int) -> Schedule:
        return RandomMatchings(workers, self.seed)

    def traffic(self, workers: int) -> Traffic:
        """One message; nothing from the one that sits out."""
        return Traffic(min(1, workers - 1), workers // 2 * 2 / workers) if workers > 1 else Traffic(0, 0.0)


@dataclass(frozen=True)
class Custom(Topology):
    """Mixing matrices of one's own, taken in turn.

    Args:
        matrices: One matrix or a sequence of them (nested lists, numpy, CPU tensors), kept as tuples of numbers.
            Columns that sum to one within 1e-6 are scaled to do so in float64.

    Raises:
        ValueError: They make no valid :class:`Schedule`.
    """

    matrices: Any
    name: str = field(default="custom", init=False, repr=False)

    def __post_init__(self) -> None:
        try:
            matrices = np.array(self.matrices, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"neither a name, nor a graph, nor numbers in a matrix: {self.matrices!r}") from error
        matrices = matrices[None] if matrices.ndim == 2 else matrices
        if matrices.ndim != 3:
            raise ValueError(f"expected a mixing matrix or a sequence of them, got an array of shape {matrices.shape}")
        Schedule(matrices)
        sums = matrices.sum(axis=1, keepdims=True)
        matrices /= np.where(abs(sums - 1) > 1e-12, sums, 1)  # leaves a symmetric float64 matrix symmetric
        object.__setattr__(self, "matrices", tuple(tuple(map(tuple, matrix)) for matrix in matrices.tolist()))

    def _rule(self) -> tuple[str, Callable[[int], bool]]:
        return f"exactly {len(self.matrices[0])}", lambda workers: workers == len(self.matrices[0])

    def _schedule(self, workers: int) -> Schedule:
        return Schedule(np.array(self.matrices))


NAMES: tuple[str, ...] = (*GRAPHS, RandomMatching.name)
"""The topologies that go by a name."""


def make(topology: Any, mixing: Mixing = "uniform", seed: int = 0) -> Topology:
    """The topology that a name, a graph or a matrix stands for.

    Args:
        topology: One of :data:`NAMES`; a networkx graph, directed or not; a mixing matrix (nested lists, numpy, CPU
            tensor); a sequence of graphs or of matrices, taken in turn; or a :class:`Topology`, given back as it is.
        mixing: How a graph is weighted, see :func:`mixing_matrix`. Matrices bring their weights with them.
        seed: For ``random_matching``; the others do not use it.

    Raises:
        ValueError: The name is unknown, or the graph or matrix is no valid :class:`Schedule`, or ``mixing`` is at odds
            with what was given.

    Example:
        >>> make("star", mixing="metropolis") == make("star", mixing="metropolis")
        True
        >>> make([[0.5, 0.25], [0.5, 0.75]]).on(workers=2).doubly_stochastic
        False
    """
    check_mixing(mixing)
    if isinstance(topology, str):
        return RandomMatching(seed) if topology == RandomMatching.name else Named(topology, mixing)
    if isinstance(topology, nx.Graph):
        return Custom(mixing_matrix(topology, mixing))
    if isinstance(topology, Sequence) and topology and all(isinstance(graph, nx.Graph) for graph in topology):
        return Custom([mixing_matrix(graph, mixing) for graph in topology])
    if isinstance(topology, Named) and mixing not in ("uniform", topology.mixing):
        raise ValueError(f"mixing={mixing!r} is at odds with {topology}")
    if isinstance(topology, Topology):
        return topology
    if mixing != "uniform":
        raise ValueError(f"a matrix has its weights already: mixing={mixing!r} is for names and graphs")
    return Custom(topology)
