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

from lightning_slowmo.topology.drawing import draw
from lightning_slowmo.topology.mixing import Mixing, mixing_matrix
from lightning_slowmo.topology.schedule import Exchange, Schedule, Traffic, validate
from lightning_slowmo.topology.topologies import NAMES, Custom, Named, RandomMatching, Topology, make

__all__ = [
    "NAMES",
    "Custom",
    "Exchange",
    "Mixing",
    "Named",
    "RandomMatching",
    "Schedule",
    "Topology",
    "Traffic",
    "draw",
    "make",
    "mixing_matrix",
    "validate",
]
