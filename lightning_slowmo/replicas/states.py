"""Optimizer states that lie in the host's memory: each worker's are copied to the stage and back."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_slowmo.replicas.crossing import Crossing, sent
from lightning_slowmo.replicas.host import HostMemory
from lightning_slowmo.replicas.optimizers import OptimizerOnStage
from lightning_slowmo.replicas.rows import Rows, in_a_row

Path = tuple[Any, ...]
"""Where a tensor is in an optimizer's state: the parameter's id, and the keys that lead there."""


class Slots:
    """The tensors into which all workers' states are copied, when they come to the stage of one optimizer.

    An optimizer wants some of its state beside its parameter, and some on the CPU (Adam counts steps there, unless it
    is fused or captured). Where its own step has made a tensor, the next one goes; what it has never made, but a
    checkpoint has brought, goes where torch itself puts it.

    Args:
        optimizer: the stage's.
        parameters: the stage's.
    """

    def __init__(self, optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
        self._optimizer = optimizer
        self._device = parameters[0].device
        self._parameters = {id(parameter): parameter for parameter in parameters}
        self._tensors: dict[Path, Tensor] = {}
        self._devices: dict[Path, torch.device] = {}
        self.note(found(optimizer.state))

    def note(self, present: Mapping[Path, Tensor]) -> None:
        """Remember where the optimizer has its tensors."""
        for path, tensor in present.items():
            self._devices[path] = tensor.device

    def of(self, states: Mapping[Path, Tensor]) -> list[Tensor]:
        """Where to copy a worker's states; those that nothing can be copied to are there already."""
        devices = {path: self.device_of(path, tensor) for path, tensor in states.items()}
        missing = [
            path
            for path, tensor in states.items()
            if in_a_row(tensor) and not _fits(self._tensors.get(path), tensor, devices[path])
        ]
        rows = Rows([torch.empty_like(states[path], device=devices[path]) for path in missing])
        self._tensors.update(zip(missing, rows.tensors, strict=True))
        return [
            self._tensors[path] if in_a_row(tensor) else sent(tensor, devices[path]) for path, tensor in states.items()
        ]

    def device_of(self, path: Path, tensor: Tensor) -> torch.device:
        """Where the optimizer wants a tensor of its state."""
        parameter = self._parameters.get(path[0])
        if path in self._devices:
            return self._devices[path]
        if parameter is None:
            return self._device
        if path[-1] == "step" and not self._counts_on_device(parameter):
            return tensor.device
        return parameter.device

    def _counts_on_device(self, parameter: Tensor) -> bool:
        groups = [group for group in self._optimizer.param_groups if any(p is parameter for p in group["params"])]
        return any(group.get("fused") or group.get("capturable") for group in groups)


class OptimizerFromHost(OptimizerOnStage):
    """The stage's optimizer, and a worker's twin of it, whose states lie in the host's memory.

    Args:
        stage: which steps the stage's parameters.
        own: the worker's.
        parameters: the stage's.
        twins: the worker's parameter for each of them.
        slots: of the stage's optimizer; all workers' are the same.
        host: gives memory for the worker's states.
    """

    def __init__(
        self,
        stage: Optimizer,
        own: Optimizer,
        parameters: Sequence[Tensor],
        twins: Sequence[Tensor],
        slots: Slots,
        host: HostMemory,
    ) -> None:
        super().__init__(stage, own, parameters, twins, static=True)
        self._places = {id(twin): id(parameter) for parameter, twin in zip(parameters, twins, strict=True)}
        self._slots, self._host = slots, host
        self._kept: dict[Path, Tensor] = {}
        self._pairs: tuple[list[Tensor], list[Tensor]] = [], []
        self._crossing = Crossing([], [])
        self._entered: dict[Any, Any] = {}
        self._known: list[Any] | None = None  # of the worker's state when it came, if it can come so again
        self._settled: list[Any] | None = None  # of the stage's then, if it can be taken as it came

    def _put_states(self) -> None:
        if self._known is not None and _is_same(_entries(self._own.state), self._known):
            self._crossing.back()
            self._stage.state.clear()
            self._stage.state.update(self._entered)
            return
        states = found(self._own.state, self._places)
        places = self._slots.of(states)
        self._between(places, list(states.values())).back()
        by_id = dict(zip(map(id, states.values()), places, strict=True))
        self._enter(self._own.state, self._stage.state, self._to_stage, by_id)
        entries = _entries(self._own.state)
        if all(map(_is_simple, entries)) and all(self._kept.get(path) is tensor for path, tensor in states.items()):
            self._known, self._settled = entries, _entries(self._stage.state)
            self._entered = dict(self._stage.state)

    def _take_states(self) -> None:
        if self._settled is not None and _is_same(_entries(self._stage.state), self._settled):
            self._crossing.forth()
            return
        self._known = self._settled = None
        states = found(self._stage.state)
        self._slots.note(states)
        new = [
            path
            for path, tensor in states.items()
            if in_a_row(tensor) and not _fits(self._kept.get(path), tensor, self._host.device)
        ]
        if new:
            self._refuse_views(states)
            for device in dict.fromkeys(states[path].device for path in new):  # apart, as they lie on the stage
                paths = [path for path in new if states[path].device == device]
                self._kept.update(zip(paths, Rows([states[path] for path in paths], self._host).tensors, strict=True))
        kept = [
            self._kept[path] if in_a_row(tensor) else sent(tensor, self._host.device) for path, tensor in states.items()
        ]
        self._between(list(states.values()), kept).forth()
        by_id = dict(zip(map(id, states.values()), kept, strict=True))
        self._enter(self._stage.state, self._own.state, self._to_own, by_id)

    def _between(self, places: list[Tensor], kept: list[Tensor]) -> Crossing:
        """What copies those of the stage to those that are kept; mostly the same as before."""
        if not all(map(_is_same, self._pairs, (places, kept))):
            self._pairs = places, kept
            pairs = [(place, own) for place, own in zip(places, kept, strict=True) if in_a_row(place)]
            self._crossing = Crossing([place for place, _ in pairs], [own for _, own in pairs])
        return self._crossing

    @staticmethod
    def _enter(source: Any, target: Any, keys: Mapping[Any, Any], tensors: Mapping[int, Tensor]) -> None:
        """Let a state have what another has, with other parameters and tensors."""
        entered = {
            keys.get(key, key): _mapped(value, (), lambda _, tensor: tensors[id(tensor)])
            for key, value in source.items()
        }
        target.clear()
        target.update(entered)

    def _refuse_views(self, states: Mapping[Path, Tensor]) -> None:
        """Refuse tensors that look at the memory of parameters, or of one another: copies would not any more."""
        dense = {path: tensor for path, tensor in states.items() if in_a_row(tensor)}
        addresses = Counter(tensor.data_ptr() for tensor in (*self._to_own, *dense.values()))
        for path, tensor in dense.items():
            if tensor.data_ptr() and addresses[tensor.data_ptr()] > 1:  # those of no elements have no address
                raise RuntimeError(
                    f"{type(self._stage).__name__} has an entry {path[-1]!r} in its state that shares memory with a "
                    "parameter or with another entry, which copies in the host's memory cannot. Use as many workers "
                    "as the device holds, or another optimizer."
                )


def found(state: Mapping[Any, Any], places: Mapping[int, int] | None = None) -> dict[Path, Tensor]:
    """All tensors in an optimizer's state, each once.

    Args:
        state: by parameter, or by what the optimizer likes.
        places: the id by which a parameter is known, for the id of each; None: its own.
    """
    tensors: dict[int, tuple[Path, Tensor]] = {}

    def note(path: Path, tensor: Tensor) -> Tensor:
        tensors.setdefault(id(tensor), (path, tensor))
        return tensor

    for key, value in state.items():
        own = (places or {}).get(id(key), id(key)) if isinstance(key, Tensor) else key
        _mapped(value, (own,), note)
    return dict(tensors.values())


def _mapped(value: Any, path: Path, change: Callable[[Path, Tensor], Tensor]) -> Any:
    """A value of a state with other tensors; containers are made anew, and all else is the same."""
    if isinstance(value, Tensor):
        return change(path, value)
    if isinstance(value, dict):
        return {name: _mapped(each, (*path, name), change) for name, each in value.items()}
    if type(value) in (list, tuple, deque):
        return type(value)(_mapped(each, (*path, place), change) for place, each in enumerate(value))
    return value


def _fits(memory: Tensor | None, values: Tensor, device: torch.device) -> bool:
    """Whether values can be kept in the memory that there is."""
    return (
        memory is not None
        and (memory.shape, memory.dtype, memory.device) == (values.shape, values.dtype, device)
        and memory.stride() == values.stride()
    )


def _entries(state: Mapping[Any, Any]) -> list[Any]:
    """What is in the states of all parameters, in order."""
    return [value for own in state.values() for value in (own.values() if isinstance(own, dict) else (own,))]


def _is_simple(entry: Any) -> bool:
    """Whether an entry that is the same object as before has the same tensors: unlike a list, say."""
    return entry is None or isinstance(entry, (Tensor, int, float, str))


def _is_same(now: Sequence[Any], before: Sequence[Any]) -> bool:
    """Whether these are the same objects."""
    return len(now) == len(before) and all(map(is_, now, before))
