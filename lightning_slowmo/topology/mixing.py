"""From a graph to a mixing matrix."""

from __future__ import annotations

from typing import Literal

import networkx as nx
import numpy as np

Mixing = Literal["uniform", "metropolis"]
"""How a graph is weighted, see :func:`mixing_matrix`."""


def mixing_matrix(graph: nx.Graph, mixing: Mixing = "uniform") -> np.ndarray:
    """The mixing matrix of a graph.

    Args:
        graph: An edge from j to i means that worker j sends to worker i; undirected edges go both ways. Nodes 0..n-1
            are ranks, others are numbered in the order of ``graph.nodes``. Self-loops and edge weights are not used.
        mixing: ``"uniform"``: each worker divides its model into equal shares for its out-neighbours and itself,
            1 / (out-degree + 1). Doubly stochastic if in-degrees and out-degrees are all the same.
            ``"metropolis"``: Metropolis-Hastings weights 1 / (1 + max(degree_i, degree_j)), the rest kept: doubly
            stochastic (and symmetric) on every undirected graph.

    Returns:
        A float64 array of shape (n, n), with columns that sum to one.

    Raises:
        ValueError: The graph has no nodes, or it is directed and ``mixing`` is ``"metropolis"``.
    """
    check_mixing(mixing)
    workers = len(graph)
    if workers == 0:
        raise ValueError("a graph without nodes connects nobody")
    ranks = list(range(workers))
    links = nx.to_numpy_array(graph, ranks if set(graph) == set(ranks) else list(graph), weight=None).T > 0
    np.fill_diagonal(links, False)
    degree = links.sum(axis=0)
    if mixing == "uniform":
        return (links + np.eye(workers)) / (1 + degree)
    if not np.array_equal(links, links.T):
        raise ValueError("Metropolis weights need an undirected graph: for a directed one, take mixing='uniform'")
    weights = links / (1 + np.maximum.outer(degree, degree))
    return weights + np.diag(1 - weights.sum(axis=0))


def check_mixing(mixing: str) -> None:
    """Raise ValueError unless ``mixing`` is the name of a weighting."""
    if mixing not in ("uniform", "metropolis"):
        raise ValueError(f"mixing must be 'uniform' or 'metropolis', got {mixing!r}")
