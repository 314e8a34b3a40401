"""The graphs that go by a name: edges alone, without weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import networkx as nx
import numpy as np

from lightning_slowmo.topology.schedule import Traffic


def rounds(workers: int) -> int:
    """ceil(log2 n), without the rounding of a float logarithm."""
    return (workers - 1).bit_length()


def _hops(workers: int, *hops: int) -> nx.DiGraph:
    """Each rank sends to rank + hop, for all hops."""
    return nx.DiGraph((rank, (rank + hop) % workers) for hop in hops for rank in range(workers))


def torus_sides(workers: int) -> tuple[int, int]:
    """The most nearly square factorisation, the shorter side first: 1 for a prime."""
    side = next(side for side in range(math.isqrt(workers), 0, -1) if workers % side == 0)
    return side, workers // side


def _bipartite_exponential(workers: int) -> list[nx.Graph]:
    """Odd ranks r pair up with r + 1, r - 1, r + 3, r - 3, r + 5, r - 5, r + 9, ..., each partner once a period.

    Hops of 1 and 1 + 2^i are odd, and so lead from an odd rank to an even one.
    """
    lengths = [1] + [1 + 2**i for i in range(1, rounds(workers))]
    hops = dict.fromkeys(hop % workers for length in lengths for hop in (length, -length))
    return [nx.Graph((rank, (rank + hop) % workers) for rank in range(1, workers, 2)) for hop in hops]


GRAPHS: dict[str, Callable[[int], list[nx.Graph]]] = {
    "ring": lambda n: [nx.cycle_graph(n)],
    "torus": lambda n: [nx.grid_2d_graph(*torus_sides(n), periodic=True)],
    "hypercube": lambda n: [nx.hypercube_graph(rounds(n))],
    "complete": lambda n: [nx.complete_graph(n)],
    "star": lambda n: [nx.star_graph(n - 1)],
    "exponential": lambda n: [_hops(n, *(2**k for k in range(rounds(n))))],
    "one_peer_exponential": lambda n: [_hops(n, 2**k) for k in range(rounds(n))],
    "bipartite_exponential": _bipartite_exponential,
}
"""The graphs of one period on n >= 2 workers.

No edge is double: two workers in a ring have one neighbour, not the same one twice, and mix with 1/2 and 1/2; a torus
of 2 x 2 is a ring of 4.
"""


@lru_cache(maxsize=1024)
def graph_traffic(name: str, workers: int) -> Traffic:
    """How many messages a worker sends, counted on the graphs."""
    graphs = GRAPHS[name](workers)
    degrees = [[degree for _, degree in (g.out_degree if g.is_directed() else g.degree)] for g in graphs]
    return Traffic(int(np.max(degrees)), float(np.mean(degrees)))


SIZES: dict[str, tuple[str, Callable[[int], bool]]] = {
    "torus": ("a number that is not prime (4, 6, 8, 9, 10, 12, ...)", lambda n: torus_sides(n)[0] > 1),
    "hypercube": ("a power of two (2, 4, 8, 16, ...)", lambda n: n & (n - 1) == 0),
    "bipartite_exponential": ("an even number (2, 4, 6, 8, ...)", lambda n: n % 2 == 0),
}
"""The numbers of workers beside 1 that a graph can connect, in words and as a test; any number if it is not here."""
