"""One worker's tensors, or state, for all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_slowmo.communication.workers import Workers
from lightning_slowmo.tensors import as_bytes


def broadcast_tensors(tensors: Sequence[Tensor], workers: Workers, source: int = 0) -> None:
    """Replace tensors by those of one worker. They travel as bytes, whatever their dtype: gloo knows few.

    Args:
        tensors: of equal shapes and dtypes on all workers.
        workers: all of whom must call this.
        source: rank of the worker whose tensors all get.
    """
    if workers.alone:
        return
    alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            alike.setdefault((tensor.dtype, tensor.device), []).append(tensor.detach())
    for same in alike.values():
        flat = torch.cat([as_bytes(tensor) for tensor in same])
        workers.broadcast(flat, source)
        for tensor, piece in zip(same, flat.split([tensor.numel() * tensor.itemsize for tensor in same]), strict=True):
            tensor.copy_(piece.view(tensor.dtype).view(tensor.shape))


def broadcast_state(state: Any, workers: Workers, source: int = 0) -> Any:
    """The state of one worker for all: nested dictionaries, lists and tuples of tensors and plain values.

    Nothing is unpickled: what is no tensor travels as JSON.

    Args:
        state: this worker's; only that of the source matters, the others' may be anything.
        workers: all of whom must call this.
        source: rank of the worker whose state all get.
    """
    if workers.alone:
        return state
    tensors: list[Tensor] = []
    outline = json.loads(workers.gather_text(json.dumps(_outlined(state, tensors)))[source])
    filled: list[Tensor] = []
    result = _filled(outline, filled)
    if workers.rank == source:
        for target, tensor in zip(filled, tensors, strict=True):
            target.copy_(tensor)
    broadcast_tensors(filled, workers, source)
    return result


def _outlined(value: Any, tensors: list[Tensor]) -> Any:
    """A value as JSON can hold it, its tensors collected and replaced by their dtypes and shapes."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": [str(value.dtype).removeprefix("torch."), list(value.shape)]}
    if isinstance(value, dict):
        return {"dict": [[key, _outlined(item, tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_outlined(item, tensors) for item in value]}
    return value


def _filled(outline: Any, tensors: list[Tensor]) -> Any:
    """The value of an outline, with new tensors, which are collected."""
    if not isinstance(outline, dict):
        return outline
    [(kind, content)] = outline.items()
    if kind == "tensor":
        dtype, shape = content
        tensors.append(torch.empty(shape, dtype=getattr(torch, dtype)))
        return tensors[-1]
    if kind == "dict":
        return {key: _filled(item, tensors) for key, item in content}
    items = [_filled(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items
