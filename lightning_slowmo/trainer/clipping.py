"""Clipping by norm where some parameters are shared along one dimension of the mesh and others along two.

torch takes no norm of tensors on different meshes, which FSDP2 with tensor parallelism in some layers makes: there each
mesh's norm is reduced by itself, and these are put together as plain numbers, equal on all processes of the worker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm


def clip_by_norm(parameters: Iterable[Tensor], max_norm: float) -> None:
    """``torch.nn.utils.clip_grad_norm_`` over any mixture of meshes; all processes of a worker must call this.

    Args:
        parameters: with gradients, or without; sharded, or whole and equal on these processes.
        max_norm: largest 2-norm of all gradients together.
    """
    meshes: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            meshes.setdefault(getattr(parameter.grad, "device_mesh", None), []).append(parameter)
    together = list(meshes.values())
    if len(together) == 1:
        clip_grad_norm_(together[0], max_norm)
    elif together:
        norms = [_norm([p.grad for p in members if p.grad is not None]) for members in together]
        total = torch.linalg.vector_norm(torch.stack(norms))
        for members in together:
            clip_grads_with_norm_(members, max_norm, total)


def clip_over_meshes(plugin: Any) -> Callable[[], None]:
    """Let a precision plugin clip by norm as :func:`clip_by_norm` does.

    Args:
        plugin: whatever of Lightning's; what it does around clipping, such as unscaling, stays.

    Returns:
        A function that gives it its own way back.
    """
    plugin.clip_grad_by_norm = lambda optimizer, clip_val: clip_by_norm(plugin.main_params(optimizer), clip_val)
    return lambda: delattr(plugin, "clip_grad_by_norm")


def _norm(gradients: list[Tensor]) -> Tensor:
    """The norm of gradients on one mesh, as a plain number of at least float32."""
    norm: Any = get_total_norm(gradients)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return norm.to(torch.promote_types(norm.dtype, torch.float32))
