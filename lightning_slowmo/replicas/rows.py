"""Memory in which tensors lie one behind the other: means are taken where they lie, and one copy moves them all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_slowmo.private import foreach_copy_
from lightning_slowmo.replicas.host import HostMemory
from lightning_slowmo.storage import is_dense

ALIGNMENT = 16
"""Bytes at whose multiples compiled kernels want their inputs to begin."""

Kind = tuple[torch.dtype, torch.device]


class Rows:
    """Copies of tensors, those of a dtype and device one behind the other.

    Args:
        originals: what to copy, with their strides.
        host: gives memory for the copies; None: they lie where the originals do.

    Attributes:
        tensors: a copy of each.
        wholes: the memory of each kind, and the copies of tensors that do not lie in a row (sparse ones, say).
        aligned: whether every tensor begins at an address for which kernels are made.
    """

    def __init__(self, originals: Sequence[Tensor], host: HostMemory | None = None) -> None:
        places: list[tuple[Kind, int] | None] = []  # None: not in a row
        ends: dict[Kind, int] = {}
        for original in originals:
            values = original.detach()
            kind = values.dtype, host.device if host else values.device
            start = ends.get(kind, 0)
            places.append((kind, start) if in_a_row(values) else None)
            if places[-1]:
                ends[kind] = start + values.numel()
        rows = {kind: _memory(numel, kind, host) for kind, numel in ends.items()}
        self.tensors: list[Tensor] = []
        self.wholes: list[Tensor] = list(rows.values())
        for original, place in zip(originals, places, strict=True):
            values = original.detach()
            if place is None:
                self.tensors.append(values.to(host.device, copy=True) if host else values.clone())
                self.wholes.append(self.tensors[-1])
            else:
                row = rows[place[0]]
                self.tensors.append(row.as_strided(values.shape, values.stride(), place[1]).copy_(values))
        offsets = [tensor.storage_offset() * tensor.element_size() for tensor in self.tensors]
        self.aligned = not any(offset % ALIGNMENT for offset in offsets)


class Copying:
    """Copies tensors to others again and again: one kernel for those of one kind.

    Args:
        sources: what is copied.
        targets: as many tensors of the same shapes, which are overwritten.
    """

    def __init__(self, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        kinds: dict[Kind, list[tuple[Tensor, Tensor]]] = {}
        for source, target in zip(sources, targets, strict=True):
            kinds.setdefault(_kind(source), []).append((source, target))
        self._kinds = [tuple(map(list, zip(*pairs, strict=True))) for pairs in kinds.values()]

    def forth(self) -> None:
        """Copy the sources to the targets."""
        for sources, targets in self._kinds:
            foreach_copy_(targets, sources)

    def back(self) -> None:
        """Copy the targets to the sources."""
        for sources, targets in self._kinds:
            foreach_copy_(sources, targets)


def in_a_row(values: Tensor) -> bool:
    """Whether a tensor without gradients can lie in a row: an ordinary one that fills its memory."""
    return type(values) in (Tensor, Parameter) and is_dense(values)


def _memory(numel: int, kind: Kind, host: HostMemory | None) -> Tensor:
    return host.take(numel, kind[0]) if host else torch.empty(numel, dtype=kind[0], device=kind[1])


def _kind(tensor: Tensor) -> Kind:
    return tensor.dtype, tensor.device
