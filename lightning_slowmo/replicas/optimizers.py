"""Optimizers that workers share: each worker's states and options take the place of those of the one before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_slowmo.replicas.rows import Rows


class OptimizerOnStage:
    """The stage's optimizer, and a worker's twin of it.

    The states of single parameters are the same objects in both, so they are entered anew only where there are others.

    Args:
        stage: which steps the stage's parameters.
        own: the worker's.
        parameters: the stage's.
        twins: the worker's parameter for each of them.
        static: whether the parameters are copied; otherwise new states are moved together.
    """

    def __init__(
        self, stage: Optimizer, own: Optimizer, parameters: Sequence[Tensor], twins: Sequence[Tensor], static: bool
    ) -> None:
        self._stage, self._own = stage, own
        self._to_stage: dict[Any, Any] = dict(zip(twins, parameters, strict=True))
        self._to_own: dict[Any, Any] = dict(zip(parameters, twins, strict=True))
        self._state: dict[Any, Any] = {}
        self._static = static
        self._entries = 0

    def put(self) -> None:
        """Let the stage have the worker's states, options and counters."""
        self._put_states()
        _copy_options(self._own, self._stage)
        _copy_counters(self._own, self._stage)

    def _put_states(self) -> None:
        if not _same(self._own.state, self._state):
            self._state = _entered(self._own.state, self._to_stage)
        self._stage.state.clear()
        self._stage.state.update(self._state)
        self._entries = 0 if self._static else _entries(self._state)

    def take(self) -> None:
        """Let the worker have what has become of them."""
        self._take_states()
        self.take_options()
        _copy_counters(self._stage, self._own)

    def _take_states(self) -> None:
        if not self._static and _entries(self._stage.state) > self._entries:
            move_together(self._stage.state.values(), apart_from=self._to_own)
        if not _same(self._stage.state, self._state):
            self._state = dict(self._stage.state)
            self._own.state.clear()
            self._own.state.update(_entered(self._state, self._to_own))

    def take_options(self) -> None:
        """Let the worker have the options of the stage's groups, such as learning rates."""
        _copy_options(self._stage, self._own)

    def follow(self, twin: Callable[[Tensor], Tensor]) -> bool:
        """Let the parameters of the worker's groups be those of the stage's.

        Args:
            twin: gives the worker's parameter for one of the stage's.

        Returns:
            Whether anything has changed.
        """
        theirs, own = self._stage.param_groups, self._own.param_groups
        if [len(group["params"]) for group in theirs] == [len(group["params"]) for group in own]:
            return False
        own[:] = [group | {"params": list(map(twin, group["params"]))} for group in theirs]
        return True


def _copy_options(source: Optimizer, target: Optimizer) -> None:
    for own, other in zip(source.param_groups, target.param_groups, strict=True):
        parameters = other["params"]
        other.update(own)
        other["params"] = parameters


def move_together(states: Iterable[Any], apart_from: Iterable[Tensor]) -> None:
    """Move the tensors of states to memory of their own, one behind the other.

    An optimizer makes them while activations and gradients lie around them. Once those are freed, every worker's leave
    holes into which no other's fit: a tenth of all memory.

    Args:
        states: by name, of one parameter each.
        apart_from: tensors whose memory states may share; such states stay where they are.
    """
    shared = Counter(tensor.data_ptr() for tensor in apart_from)
    found = [
        (state, name, value)
        for state in states
        if isinstance(state, dict)
        for name, value in state.items()
        if type(value) is Tensor and value.layout is torch.strided and value.device.type == "cpu"
    ]
    shared.update(value.data_ptr() for _, _, value in found)
    alone = [
        entry for entry in found if shared[entry[2].data_ptr()] == 1 and _owns_its_memory(entry[2])
    ]  # of others, something else may look at the same memory
    moved = Rows([value for _, _, value in alone]).tensors
    for (state, name, _), value in zip(alone, moved, strict=True):
        state[name] = value


def _owns_its_memory(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def _entries(state: Mapping[Any, Any]) -> int:
    """Number of values in all states of single parameters."""
    return sum(len(own) for own in state.values() if isinstance(own, dict))


def _entered(state: Mapping[Any, Any], places: Mapping[Any, Any]) -> dict[Any, Any]:
    """A state by other parameters."""
    return {places.get(key, key): value for key, value in state.items()}


def _same(state: Mapping[Any, Any], other: Mapping[Any, Any]) -> bool:
    """Whether two states have the same objects in the same order; their keys are different parameters."""
    return len(state) == len(other) and all(map(is_, state.values(), other.values()))


def _copy_counters(source: Optimizer, target: Optimizer) -> None:
    for name, value in vars(source).items():
        if isinstance(value, (int, float)):
            setattr(target, name, value)
