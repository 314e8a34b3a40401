"""What the Trainer's strategies and Fabric's do alike at first: refuse what cannot work, and join the processes."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch.distributed as dist

from lightning_slowmo import rendezvous
from lightning_slowmo.communication import nccl
from lightning_slowmo.core import StrategyCore


def check_ddp_kwargs(ddp_kwargs: dict[str, Any] | None, core: StrategyCore) -> dict[str, Any]:
    """The arguments for DistributedDataParallel inside nodes; none if there are none.

    Raises:
        ValueError: if nothing is wrapped in it.
    """
    if ddp_kwargs and core.workers_per_node is None:
        raise ValueError("ddp_kwargs apply inside nodes only, but workers_per_node is None: nothing is wrapped in DDP.")
    return ddp_kwargs or {}


def refuse_devices(strategy: Any, precision: Any, package: ModuleType, owner: str) -> None:
    """Refuse devices and plugins that cannot work, before anything is started.

    Args:
        strategy: that knows its devices.
        precision: its plugin.
        package: the Lightning or Fabric that it serves.
        owner: ``"Trainer"`` or ``"Fabric"``.

    Raises:
        ValueError: says what to write instead.
    """
    if strategy.root_device.type == "mps":
        raise ValueError(
            f"MPS devices cannot take part in torch.distributed. Use {owner}(accelerator='cpu', devices=...)."
        )
    plugins = package.plugins
    if isinstance(precision, (plugins.FSDPPrecision, plugins.DeepSpeedPrecision, plugins.XLAPrecision)):
        raise ValueError(
            f"{type(precision).__name__} belongs to a strategy that shards the model; {type(strategy).__name__} "
            f"keeps a whole model on each worker. Use {owner}(precision=...) instead."
        )


def join(strategy: Any, core: StrategyCore, join_group: Callable[[], None], owner: str) -> None:
    """Join the process group, then make the core's own groups beside it.

    Args:
        strategy: that knows its ranks.
        core: of the strategy.
        join_group: what Lightning's own strategy does to join the process group.
        owner: ``"Trainer"`` or ``"Fabric"``.

    Raises:
        RuntimeError: if there is a smaller process group already.
    """
    store = rendezvous.for_strategy(strategy, core.sync_timeout)
    with nccl.settings(nccl.ENDS_IN_TIME):
        join_group()
    del store  # the process group has its own by now
    if dist.get_world_size() < strategy.world_size:
        raise RuntimeError(
            f"torch.distributed was initialized with {dist.get_world_size()} process(es) before, by a {owner} with "
            f"fewer devices perhaps, but this one has {strategy.world_size}. Use a script for each, or a strategy that "
            "starts its own processes, such as 'slowmo_spawn'."
        )
    core.make_groups(strategy.node_rank, strategy.local_rank, strategy.root_device, strategy.process_group_backend)
