"""Two levels: processes that make up one worker, and workers that meet now and then.

The processes of a worker share every gradient (DDP inside nodes), or a model of which each holds a shard.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from lightning_slowmo.communication.workers import Workers

PerNode = int | Literal["all"]
"""How many processes of a machine make up one node."""


class Levels(NamedTuple):
    """This process's place on both levels.

    Attributes:
        node: the processes of this node, for gradients.
        workers: the processes at the same place of every node, for the slow algorithm; so the nodes' links are used by
            all places at once, each for its own copy.
    """

    node: Workers
    workers: Workers


def check_per_node(per_node: object) -> None:
    """Raise ValueError unless ``per_node`` is a positive integer, ``"all"`` or None."""
    if per_node in (None, "all") or (isinstance(per_node, int) and not isinstance(per_node, bool) and per_node >= 1):
        return
    raise ValueError(f"workers_per_node must be an integer of at least 1, 'all' or None, got {per_node!r}.")


def two_levels(everyone: Workers, per_node: PerNode, node_rank: int, local_rank: int) -> Levels:
    """Split all processes in both ways; every process must call this.

    Who shares a machine is asked of everyone, not divided out of ranks: launchers number processes in other ways too
    (a cyclic SLURM layout puts ranks 0 and 2 on the first of two nodes).

    Args:
        everyone: all processes.
        per_node: processes that make up a node; ``"all"`` of a machine's, or a number that divides them.
        node_rank: number of this process's machine.
        local_rank: number of this process on its machine.

    Raises:
        ValueError: if the machines cannot be cut into equal nodes.
    """
    machines: dict[float, list[tuple[float, int]]] = {}
    for rank, (machine, local) in enumerate(everyone.gather([node_rank, local_rank], "finding the nodes")):
        machines.setdefault(machine, []).append((local, rank))
    nodes: list[list[int]] = []
    for machine, places in sorted(machines.items()):
        ranks = [rank for _, rank in sorted(places)]
        size = len(ranks) if per_node == "all" else per_node
        if len(ranks) % size:
            raise ValueError(
                f"workers_per_node={per_node} does not divide the {len(ranks)} processes of machine {int(machine)}."
            )
        nodes += [ranks[start : start + size] for start in range(0, len(ranks), size)]
    if len({len(node) for node in nodes}) > 1:
        raise ValueError(f"Nodes must have equally many processes, got {[len(node) for node in nodes]}.")
    columns = [list(column) for column in zip(*nodes, strict=True)]
    return Levels(everyone.split(nodes, headers=False), everyone.split(columns))


def consecutive(everyone: Workers, per_worker: int) -> Levels:
    """Split all processes so that every ``per_worker`` consecutive ranks are one worker; every process must call this.

    Args:
        everyone: all processes.
        per_worker: how many make up one worker; it divides their number.
    """
    ranks = range(everyone.size)
    workers = [list(ranks[start : start + per_worker]) for start in ranks[::per_worker]]
    columns = [list(ranks[place::per_worker]) for place in range(per_worker)]
    return Levels(everyone.split(workers), everyone.split(columns))


def members(workers: Workers, everyone: Workers) -> list[list[int]]:
    """The processes that make up each worker, by its rank; every process must call this.

    Args:
        workers: between which this process exchanges parameters: those at its own place in every worker.
        everyone: all processes.
    """
    found: list[list[int]] = [[] for _ in range(workers.size)]
    for process, (worker,) in enumerate(everyone.gather([workers.rank], "finding the workers")):
        found[int(worker)].append(process)
    return found
