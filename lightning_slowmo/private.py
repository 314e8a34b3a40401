"""Placeholder of the trainer branch's file: private members of torch that are used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def foreach_copy_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy many tensors at once."""
    torch._foreach_copy_(list(targets), list(sources))


def foreach_norm(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Norms of many tensors at once."""
    return list(torch._foreach_norm(list(tensors)))


def default_store() -> Any:
    """The rendezvous store."""
    import torch.distributed as dist

    return dist.distributed_c10d._get_default_store()


def version_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place."""
    return tensor._version
