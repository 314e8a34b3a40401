"""A module's buffers by name: which of them all workers share, and the way back after the consensus lay in their place.

Persistent buffers belong to the consensus. Those that are not persistent stay each worker's own: such caches may grow,
and differ in shape. *Masks* are persistent buffers of zeros and ones in the shape of a parameter of the same module, as
``torch.nn.utils.prune`` makes them: a mean of masks is no mask, so they must be equal, and are not averaged.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from lightning_slowmo.private import is_persistent
from lightning_slowmo.tensors import are_binary, describe


class Slot(NamedTuple):
    """A place for a buffer in a module, and what lies there.

    Attributes:
        name: in the whole model.
        owner: the module.
        key: name in it.
        tensor: the buffer.
        persistent: whether it is part of the module's ``state_dict``.
    """

    name: str
    owner: Module
    key: str
    tensor: Tensor
    persistent: bool

    @property
    def like_a_parameter(self) -> bool:
        """Whether it has the shape of a parameter of its module, and could be a mask for it."""
        dense = self.tensor.layout is torch.strided and not self.tensor.is_quantized and self.tensor.dim() > 0
        if not dense or not self.persistent:
            return False
        return any(self.tensor.shape == parameter.shape for parameter in self.owner.parameters(recurse=False))

    def put(self, tensor: Tensor) -> None:
        """Let a tensor be the buffer."""
        if not hasattr(self.owner, self.key):
            self.owner.register_buffer(self.key, tensor, self.persistent)
        elif not isinstance(getattr(self.owner, self.key), Parameter):
            setattr(self.owner, self.key, tensor)


def slots(module: Module | None) -> Iterator[Slot]:
    """All buffers that a module has at present; tied ones under each of their names."""
    for prefix, owner in () if module is None else module.named_modules():
        for key, tensor in owner.named_buffers(recurse=False, remove_duplicate=False):
            yield Slot(f"{prefix}.{key}" if prefix else key, owner, key, tensor, is_persistent(owner, key))


def shared(module: Module | None) -> list[Slot]:
    """The buffers that belong to the consensus, each once."""
    found: dict[int, Slot] = {}
    for slot in slots(module):
        if slot.persistent:
            found.setdefault(id(slot.tensor), slot)
    return list(found.values())


class Aside:
    """All buffers of a module as they are now, local ones too: an evaluation must not change how training goes on.

    Args:
        module: the model; None if there is none.
    """

    def __init__(self, module: Module | None) -> None:
        self.module = module
        copies: dict[int, Tensor] = {}
        self._slots = list(slots(module))
        for slot in self._slots:
            if id(slot.tensor) not in copies:
                copies[id(slot.tensor)] = slot.tensor.detach().clone()
        self._copies = [copies[id(slot.tensor)] for slot in self._slots]

    @property
    def values(self) -> dict[str, Tensor]:
        """The buffers' values, by name."""
        return {slot.name: own for slot, own in zip(self._slots, self._copies, strict=True)}

    def put_back(self, masks: Collection[str]) -> None:
        """Restore the buffers by name, whatever became of them since. New ones stay.

        Args:
            masks: names of masks. One that has become another mask stays: the workers have pruned the consensus.
        """
        present = {slot.name: slot.tensor for slot in slots(self.module) if slot.like_a_parameter}
        for slot, own in zip(self._slots, self._copies, strict=True):
            if slot.name in masks and slot.name in present and all(are_binary([present[slot.name]])):
                continue
            if slot.tensor.layout is torch.strided and slot.tensor.shape == own.shape:
                slot.tensor.detach().copy_(own)
            else:
                slot.tensor.data = own
            slot.put(slot.tensor)


def load(module: Module | None, state: Mapping[str, Tensor] | Sequence[Tensor]) -> None:
    """Give a module's buffers saved values, by name; those that it makes later are left to it, with a warning.

    Args:
        module: the model.
        state: values by name, one of which may have another shape than the buffer has now; or a list in the order of
            the module's buffers, as older checkpoints have it.
    """
    if not isinstance(state, Mapping):
        names = [name for name, _ in ([] if module is None else module.named_buffers())]
        state = dict(zip(names, state, strict=True))
    present = {slot.name: slot for slot in slots(module)}
    for name, saved in state.items():
        slot = present.get(name)
        if slot is not None and describe(saved) == describe(slot.tensor):
            slot.tensor.detach().copy_(saved)
        elif slot is not None:  # it had grown
            slot.put(saved.to(slot.tensor.device, copy=True))
    missing = [name for name in state if name not in present]
    if missing:
        warnings.warn(
            f"The checkpoint holds this worker's {', '.join(missing)}, which the model does not have at present. They "
            "are left out.",
            stacklevel=2,
        )
