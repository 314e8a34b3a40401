"""Shards: what a process holds of tensors that the processes of one worker hold together.

Under FSDP2 and tensor parallelism a parameter is a ``DTensor``, of which every process of the worker has a part in its
memory. The processes at equal places of the workers have equal parts, so elementwise algorithms run between these as
between whole models. Only what is saved must know where a part lies in the whole.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor
from torch.nn import Module

from lightning_slowmo.pieces import Pieces
from lightning_slowmo.private import held, place_of_shard

MANY = 64
"""Stretches of a part in the whole from which it is quicker to make the whole and cut the part out."""


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a ``DTensor``."""
    return held(tensor) is not tensor


def reshard(module: Module | None) -> None:
    """Let go of the parameters that FSDP2 modules have gathered for a forward pass.

    They are copies, which would be out of date once the shards are written to; and as long as they are there, the
    module lists them in place of the shards.

    Args:
        module: the model; None if there is none.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if module is None or fsdp is None:  # then no module can be one of its kind
        return
    for submodule in module.modules():
        if isinstance(submodule, fsdp.FSDPModule):
            submodule.reshard()


def as_saved(parameter: Tensor, values: Tensor) -> Tensor | Pieces:
    """Values of what this process holds of a parameter, as they are saved: with their place in the whole.

    Args:
        parameter: that they belong to.
        values: in the shape of what this process holds of it, as real numbers.
    """
    if not is_sharded(parameter):
        return values
    whole, offsets, extents = _place(parameter)
    flat = values.reshape(-1)
    pieces = [(start, flat[at : at + length]) for start, length, at in _stretches(whole.shape, offsets, extents)]
    return Pieces.of(whole, values.dtype, pieces)


def own_part(parameter: Tensor, saved: Tensor | Pieces) -> Tensor | Pieces:
    """The part of saved values that belongs to what this process holds of a parameter.

    Args:
        parameter: that they belong to.
        saved: of the whole parameter, or pieces of it.

    Returns:
        The part; ``saved`` itself if the parameter is no shard, or does not have the saved shape.

    Raises:
        ValueError: if an element of the part is in no piece.
    """
    if not is_sharded(parameter):
        return saved
    whole, offsets, extents = _place(parameter)
    if tuple(saved.shape) != tuple(whole.shape):
        return saved
    stretches = list(_stretches(whole.shape, offsets, extents))
    if isinstance(saved, Pieces) and saved.stride == whole.stride() and len(stretches) < MANY:
        flat = torch.empty(prod(extents), dtype=saved.dtype)
        for start, length, at in stretches:
            saved.copy_to(flat[at : at + length], start)
        return flat.view(extents)
    everything = saved.whole() if isinstance(saved, Pieces) else saved
    return everything[tuple(slice(a, a + n) for a, n in zip(offsets, extents, strict=True))]


def _place(parameter: Tensor) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]]:
    """The whole parameter without memory, and where what this process holds lies in it."""
    offsets, extents = place_of_shard(parameter)
    shape = tuple(parameter.shape)
    if parameter.is_complex():  # real numbers are what is saved, see storage.as_real
        shape, offsets, extents = (*shape, 2), (*offsets, 0), (*extents, 2)
    return torch.empty(shape, device="meta"), offsets, extents


def _stretches(
    shape: tuple[int, ...], offsets: tuple[int, ...], extents: tuple[int, ...]
) -> Iterator[tuple[int, int, int]]:
    """The contiguous stretches of a part: the first element in the whole, the length, and the first in the part."""
    if not prod(extents):
        return
    inner = len(shape)  # dimensions from here on are in the part as a whole
    while inner and extents[inner - 1] == shape[inner - 1]:
        inner -= 1
    outer = max(inner - 1, 0)  # and of this one, some neighbours
    length = prod(extents[outer:])
    steps = [prod(shape[dimension + 1 :]) for dimension in range(len(shape))]
    base = sum(offset * step for offset, step in zip(offsets, steps, strict=True))
    places = itertools.product(*(range(extent) for extent in extents[:outer]))
    for number, place in enumerate(places):
        yield base + sum(i * step for i, step in zip(place, steps, strict=False)), length, number * length
