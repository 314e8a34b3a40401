"""Synchronized BatchNorm inside nodes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class NodeBatchNorm:
    """Lightning's SyncBatchNorm plugin, restricted to the processes of a node.

    SyncBatchNorm communicates in every forward pass, which only the processes of one node do at the same time.

    Args:
        plugin: Lightning's own.
        node: process group of the node, or None if every process is a worker of its own.

    Raises:
        ValueError: if there is no node.
    """

    def __init__(self, plugin: Any, node: dist.ProcessGroup | None) -> None:
        if node is None:
            raise ValueError(
                "Trainer(sync_batchnorm=True) would make the workers wait for one another in every forward pass. Leave "
                "it out: statistics are averaged with the consensus. Or share BatchNorm inside nodes with "
                "SlowMoStrategy(workers_per_node='all')."
            )
        self.plugin, self.node = plugin, node

    def apply(self, model: torch.nn.Module) -> torch.nn.Module:
        """Convert BatchNorm layers."""
        return torch.nn.SyncBatchNorm.convert_sync_batchnorm(model, process_group=self.node)

    def revert(self, model: torch.nn.Module) -> torch.nn.Module:
        """Convert them back."""
        return self.plugin.revert(model)
