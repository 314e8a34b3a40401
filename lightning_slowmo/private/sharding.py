"""What FSDP2 does not say of a ``fully_shard`` module: which parameters travel together, and how they are cut."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def fsdp_shards(module: Any) -> list[tuple[Tensor, int]]:
    """The parameters that one ``fully_shard`` module gathers together: each DTensor, and elements of a padded shard.

    They are in the order in which their shards lie in what is gathered and reduced.

    Tested with torch 2.15 (``FSDPModule._get_fsdp_state``, ``FSDPState._fsdp_param_groups``, ``FSDPParamGroup``,
    ``FSDPParam``; with torch 2.10, ``FSDPState._fsdp_param_group``). Public replacement: none.
    """
    return [
        (each.sharded_param, each.padded_sharded_param_size.numel())
        for group in _fsdp_groups(module)
        for each in group.fsdp_params
    ]


def fsdp_sizes(module: Any) -> tuple[int, bool]:
    """Over how many processes a ``fully_shard`` module is cut, and whether it is cut differently after the forward.

    Tested with torch 2.15 (as :func:`fsdp_shards`; ``FSDPMeshInfo``). Public replacement: none.
    """
    [group] = _fsdp_groups(module)
    after = group.post_forward_mesh_info
    return group.mesh_info.shard_mesh_size, after is not None and after is not group.mesh_info


def fsdp_replica(module: Any) -> int:
    """Which of the replicas, between which gradients are averaged after they are reduced, this process belongs to.

    Tested with torch 2.15 (as :func:`fsdp_sizes`; ``HSDPMeshInfo.replicate_mesh_rank``). Public replacement: none.
    """
    [group] = _fsdp_groups(module)
    return int(getattr(group.mesh_info, "replicate_mesh_rank", 0))


def _fsdp_groups(module: Any) -> list[Any]:
    """The groups of parameters of a ``fully_shard`` module; none where all are those of modules inside it.

    Tested with torch 2.15 (``FSDPState._fsdp_param_groups``). Public replacement: none.
    """
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [state._fsdp_param_group] if state._fsdp_param_group is not None else []
