"""Two levels: processes of one node that share every gradient, and nodes that meet now and then."""

from __future__ import annotations

from datetime import timedelta
from typing import Literal, NamedTuple, cast

import torch
import torch.distributed as dist

from lightning_slowmo.communication.workers import Workers

PerNode = int | Literal["all"]
"""How many processes of a machine make up one node."""


class Levels(NamedTuple):
    """This process's place on both levels.

    Attributes:
        node: process group of this node, for gradients.
        workers: the processes at the same place of every node, for the slow algorithm; so the nodes' links are used by
            all places at once, each for its own copy.
    """

    node: dist.ProcessGroup
    workers: Workers


def check_per_node(per_node: object) -> None:
    """Raise ValueError unless ``per_node`` is a positive integer, ``"all"`` or None."""
    if per_node in (None, "all") or (isinstance(per_node, int) and not isinstance(per_node, bool) and per_node >= 1):
        return
    raise ValueError(f"workers_per_node must be an integer of at least 1, 'all' or None, got {per_node!r}.")


def two_levels(
    everyone: Workers,
    per_node: PerNode,
    node_rank: int,
    local_rank: int,
    timeout: timedelta,
    device: torch.device | str = "cpu",
) -> Levels:
    """Make the process groups of both levels; every process must call this.

    Who shares a machine is asked of everyone, not divided out of ranks: launchers number processes in other ways too
    (a cyclic SLURM layout puts ranks 0 and 2 on the first of two nodes).

    Args:
        everyone: all processes.
        per_node: processes that make up a node; ``"all"`` of a machine's, or a number that divides them.
        node_rank: number of this process's machine.
        local_rank: number of this process on its machine.
        timeout: how long to wait at the slow level.
        device: where the parameters are; decides the backend.

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
    backend = dist.Backend.default_device_backend_map[torch.device(device).type]
    # Every process takes part in making every group, in the same order.
    node_groups = [dist.new_group(node, backend=backend, timeout=timeout) for node in nodes]
    own = next(index for index, node in enumerate(nodes) if everyone.rank in node)
    place = nodes[own].index(everyone.rank)
    levels = None
    for column, peers in enumerate(zip(*nodes, strict=True)):
        ranks = list(peers)
        data = dist.new_group(ranks, backend=backend, timeout=timeout)
        control = dist.new_group(ranks, backend="gloo", timeout=timeout)
        if column == place:
            names = [everyone.names[rank] for rank in ranks]
            workers = Workers(cast(dist.ProcessGroup, data), cast(dist.ProcessGroup, control), timeout, names)
            levels = Levels(cast(dist.ProcessGroup, node_groups[own]), workers)
    assert levels is not None  # each process has a place in its node
    return levels
