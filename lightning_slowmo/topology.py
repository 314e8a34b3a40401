"""Who talks to whom in gossip, at which step, and with which weights.

A *topology* says how workers are connected. It is a small frozen value that a configuration can hold: picklable, and
equal to another when its fields are. Bound to a number of workers it becomes a *schedule*, the mixing matrices
W_0, W_1, ... of the steps. ``W[i, j]`` is the share of worker j's model that goes into worker i's mix, so that one
round of gossip is ``x <- W x``. Columns sum to one: no mass is lost, and the sum over workers is conserved. Where the
rows do as well (W is *doubly* stochastic) the push-sum weights stay at one and plain gossip converges to the mean;
where they do not, the mean needs push-sum.

======================  ========================================================  =====================
name                    at every step, a worker sends to                          workers
======================  ========================================================  =====================
ring                    both neighbours                                           any
torus                   its four neighbours on the most nearly square grid        any but a prime
hypercube               the ranks that differ from its own in one bit             a power of two
complete                everybody                                                 any
star                    worker 0, which sends to everybody                        any
exponential             rank + 1, 2, 4, ... (directed)                            any
one_peer_exponential    one of these: rank + 2^(step mod ceil(log2 n))            any
bipartite_exponential   one partner, odd with even, at hops 1, -1, 3, -3, 5, ...  even
random_matching         one random partner, afresh at every step (seeded)         any; odd: one sits out
======================  ========================================================  =====================

Any networkx graph or mixing matrix of one's own does as well, and so does a sequence of them, taken in turn. One worker
alone has nobody to talk to and keeps its model, whatever the topology.

Example:
    >>> from lightning_slowmo import topology
    >>> ring = topology.make("ring").on(workers=4)
    >>> ring.weights()[0].round(3)
    array([0.333, 0.333, 0.   , 0.333])
    >>> topology.make("one_peer_exponential").on(workers=8).exchange(rank=0, step=2)
    Exchange(self_weight=0.5, sends=((4, 0.5),), receives=((4, 0.5),))

References:
    Assran et al., "Stochastic Gradient Push for Distributed Deep Learning", 2019 (arXiv:1811.10792): push-sum, and the
    exponential graphs. Lian et al., "Can Decentralized Algorithms Outperform Centralized Algorithms?", 2017
    (arXiv:1705.09056): the ring. Xiao and Boyd, "Fast Linear Iterations for Distributed Averaging", 2004: mixing
    weights and spectral gap. Boyd et al., "Randomized Gossip Algorithms", 2006: random pairs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, reduce
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import networkx as nx
import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

Mixing = Literal["uniform", "metropolis"]

# Sums of weights may be off by this much: a matrix that was made in float32 passes.
_TOLERANCE = 1e-6


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
        return all(np.allclose(matrix.sum(axis=1), 1, rtol=0, atol=_TOLERANCE) for matrix in self._matrices)

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


class _RandomMatchings(Schedule):
    """A fresh matching at every step, drawn from (seed, step) alone."""

    def __init__(self, workers: int, seed: int) -> None:
        self._workers, self._seed = workers, seed
        super().__init__([self.weights(0)])  # one step stands for all: they differ in who is whose partner only

    @property
    def period(self) -> None:
        return None

    def weights(self, step: int = 0) -> np.ndarray:
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
        # W is a projection: E|Wx|^2 = x^T E[W] x. By symmetry E[W] multiplies all that is orthogonal to 1 by the same
        # factor, 1 - n/2 times the probability of a pair, which is n // 2 over n (n - 1) / 2.
        return math.sqrt(1 - (self._workers // 2) / (self._workers - 1))


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
        if self.name not in _GRAPHS:
            raise ValueError(f"unknown topology {self.name!r}: choose one of {', '.join(NAMES)}")
        _check_mixing(self.mixing)

    def _rule(self) -> tuple[str, Callable[[int], bool]]:
        return _SIZES.get(self.name) or super()._rule()

    def _schedule(self, workers: int) -> Schedule:
        return Schedule(mixing_matrix(graph, self.mixing) for graph in _GRAPHS[self.name](workers))

    def traffic(self, workers: int) -> Traffic:
        """Counted on the graphs, as the matrices of ten thousand workers would not fit into memory."""
        if workers == 1 or not self.supports(workers):
            return super().traffic(workers)
        return _traffic(self.name, workers)


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
        return _RandomMatchings(workers, self.seed)

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


def _rounds(workers: int) -> int:
    """ceil(log2 n), without the rounding of a float logarithm."""
    return (workers - 1).bit_length()


def _hops(workers: int, *hops: int) -> nx.DiGraph:
    """Each rank sends to rank + hop, for all hops."""
    return nx.DiGraph((rank, (rank + hop) % workers) for hop in hops for rank in range(workers))


def _torus_sides(workers: int) -> tuple[int, int]:
    """The most nearly square factorisation, the shorter side first: 1 for a prime."""
    side = next(side for side in range(math.isqrt(workers), 0, -1) if workers % side == 0)
    return side, workers // side


def _bipartite_exponential(workers: int) -> list[nx.Graph]:
    """Odd ranks r pair up with r + 1, r - 1, r + 3, r - 3, r + 5, r - 5, r + 9, ..., each partner once a period.

    Hops of 1 and 1 + 2^i are odd, and so lead from an odd rank to an even one.
    """
    lengths = [1] + [1 + 2**i for i in range(1, _rounds(workers))]
    hops = dict.fromkeys(hop % workers for length in lengths for hop in (length, -length))
    return [nx.Graph((rank, (rank + hop) % workers) for rank in range(1, workers, 2)) for hop in hops]


# The graphs of one period on n >= 2 workers. No edge is double: two workers in a ring have one neighbour, not the same
# one twice, and mix with 1/2 and 1/2; a torus of 2 x 2 is a ring of 4.
_GRAPHS: dict[str, Callable[[int], list[nx.Graph]]] = {
    "ring": lambda n: [nx.cycle_graph(n)],
    "torus": lambda n: [nx.grid_2d_graph(*_torus_sides(n), periodic=True)],
    "hypercube": lambda n: [nx.hypercube_graph(_rounds(n))],
    "complete": lambda n: [nx.complete_graph(n)],
    "star": lambda n: [nx.star_graph(n - 1)],
    "exponential": lambda n: [_hops(n, *(2**k for k in range(_rounds(n))))],
    "one_peer_exponential": lambda n: [_hops(n, 2**k) for k in range(_rounds(n))],
    "bipartite_exponential": _bipartite_exponential,
}


@lru_cache(maxsize=1024)
def _traffic(name: str, workers: int) -> Traffic:
    """How many messages a worker sends, counted on the graphs."""
    graphs = _GRAPHS[name](workers)
    degrees = [[degree for _, degree in (g.out_degree if g.is_directed() else g.degree)] for g in graphs]
    return Traffic(int(np.max(degrees)), float(np.mean(degrees)))


_SIZES: dict[str, tuple[str, Callable[[int], bool]]] = {
    "torus": ("a number that is not prime (4, 6, 8, 9, 10, 12, ...)", lambda n: _torus_sides(n)[0] > 1),
    "hypercube": ("a power of two (2, 4, 8, 16, ...)", lambda n: n & (n - 1) == 0),
    "bipartite_exponential": ("an even number (2, 4, 6, 8, ...)", lambda n: n % 2 == 0),
}

NAMES: tuple[str, ...] = (*_GRAPHS, RandomMatching.name)
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
    _check_mixing(mixing)
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
    _check_mixing(mixing)
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


def validate(exchanges: Sequence[Exchange]) -> None:
    """Checks a step from both ends: every send has its receive, with the same weight, and no mass is lost.

    Exchanges of one schedule always pass. Those that were gathered from workers may not, if the workers were given
    different graphs (a random one without a seed), and it is better to hear of it than to wait for a message.

    Args:
        exchanges: What each worker does, by rank.

    Raises:
        ValueError: Two ends disagree, or the shares of a worker do not sum to one.
    """
    sent = {(rank, peer): weight for rank, exchange in enumerate(exchanges) for peer, weight in exchange.sends}
    awaited = {(peer, rank): weight for rank, exchange in enumerate(exchanges) for peer, weight in exchange.receives}
    for sender, receiver in sorted(sent.keys() | awaited.keys()):
        share, expected = (ends.get((sender, receiver), 0.0) for ends in (sent, awaited))
        if not math.isclose(share, expected, rel_tol=_TOLERANCE):
            raise ValueError(
                f"worker {sender} sends worker {receiver} a share of {share:.6g}, but worker {receiver} awaits one of "
                f"{expected:.6g}: do all workers have the same topology and seed?"
            )
    for rank, exchange in enumerate(exchanges):
        total = exchange.self_weight + sum(weight for _, weight in exchange.sends)
        if abs(total - 1) > _TOLERANCE:
            raise ValueError(f"the shares of worker {rank} sum to {total}, not to 1")


def draw(
    topology: Any, workers: int, *, steps: int | None = None, figure: Figure | SubFigure | None = None
) -> Figure | SubFigure:
    """Draws a topology, one panel a step.

    A line stands for messages both ways with equal weights, an arrow for a message one way; the wider, the larger the
    weight. Workers that sit a step out are pale.

    Args:
        topology: Anything that :func:`make` takes.
        workers: The world size.
        steps: How many steps to draw; by default one period, or three steps of a random topology.
        figure: The matplotlib figure or sub-figure to draw into; by default a new one.

    Returns:
        The figure. It is not shown, nor known to pyplot: ``draw("ring", 8).savefig("ring.png")``.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The topology does not connect that many workers.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("lightning_slowmo.topology.draw needs matplotlib: pip install matplotlib") from error

    topology = make(topology)
    schedule = topology.on(workers)
    steps = steps or schedule.period or 3
    busiest, mean = schedule.traffic
    side = max(2.2, 0.13 * workers)  # inches a panel
    figure = figure or Figure(figsize=(max(side * steps, 2.9), side + 0.7), layout="constrained")
    figure.suptitle(topology.name.replace("_", " "), fontsize=11, weight="bold")
    traffic = f"messages per worker and step: {mean:.3g}" + (f", at most {busiest}" if busiest > mean else "")
    figure.supxlabel(f"{traffic}\nspectral gap: {schedule.spectral_gap:.3g}", fontsize=8.5)
    places = _places(topology.name, workers)
    for step, axes in enumerate(figure.subplots(1, steps, squeeze=False)[0]):
        weights = schedule.weights(step)
        for receiver, sender in np.argwhere(weights):
            weight, back = weights[receiver, sender], weights[sender, receiver]
            mutual = math.isclose(weight, back)
            if receiver == sender or (mutual and receiver < sender):
                continue
            there, here = places[receiver], places[sender]
            # Bend where an arrow comes back, and where a third worker is on the line: the detour by it is no detour.
            detours = np.sort(abs(places - here) + abs(there - places) - abs(there - here))
            bend = 0.15 if back and not mutual else 0.25 if (detours[2:] < 0.01).any() else 0
            style: dict[str, Any] = {"arrowstyle": "-" if mutual else "-|>", "connectionstyle": f"arc3,rad={bend}"}
            style |= {"linewidth": 0.6 + 3 * weight, "shrinkA": 8, "shrinkB": 8, "color": "#5b7c99"}
            axes.annotate("", (there.real, there.imag), (here.real, here.imag), arrowprops=style)
        colours = np.where(weights.diagonal() < 1, "#d9822b", "#eccfae")
        axes.scatter(places.real, places.imag, s=190, c=colours, zorder=3, clip_on=False)
        for rank, place in enumerate(places):
            axes.text(place.real, place.imag, str(rank), size=8, color="white", ha="center", va="center_baseline")
        axes.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), aspect="equal")
        axes.set_title(f"step {step}" if steps > 1 else "", fontsize=9)
        axes.axis("off")
    return figure


def _places(name: str, workers: int) -> np.ndarray:
    """Where to draw the ranks, in the complex plane: on a circle, unless another form shows the graph better."""
    ranks = np.arange(workers)
    places = 1j * np.exp(-2j * np.pi * ranks / workers)  # clockwise from the top
    if name == "star":
        places = np.sign(ranks) * 1j * np.exp(-2j * np.pi * (ranks - 1) / max(workers - 1, 1))
    elif name == "torus":
        row, column = divmod(ranks, _torus_sides(workers)[1])
        places = column - 1j * row
    elif name == "hypercube":  # two bits choose the corner of a square, the next two that of the square of squares
        bit = np.arange(_rounds(workers))
        places = (ranks[:, None] >> bit & 1) @ (1j**bit * (0.5 + 0.3j) ** (bit // 2))
    low, high = (complex(end(places.real), end(places.imag)) for end in (np.min, np.max))
    return (places - (low + high) / 2) / (max((high - low).real, (high - low).imag) / 2 or 1)


def _check_mixing(mixing: str) -> None:
    if mixing not in ("uniform", "metropolis"):
        raise ValueError(f"mixing must be 'uniform' or 'metropolis', got {mixing!r}")


def _check_weights(matrix: np.ndarray) -> None:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.size == 0:
        raise ValueError(f"a mixing matrix must be square and not empty, got shape {matrix.shape}")
    if not (matrix >= 0).all():
        raise ValueError("the weights of a mixing matrix must be numbers that are not negative")
    columns, rows = matrix.sum(axis=0), matrix.sum(axis=1)
    wrong = np.flatnonzero(~(np.abs(columns - 1) <= _TOLERANCE))
    if wrong.size:
        hint = "; its rows do: transpose it" if np.allclose(rows, 1, rtol=0, atol=_TOLERANCE) else ""
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
