"""What becomes of the optimizer's own buffers at an outer step: line 2 of SlowMo's Algorithm 1.

``"auto"`` is the paper's choice, made for each parameter by what its state consists of (see
:mod:`~lightning_slowmo.algorithms.optimizer_state`): a state of momentum alone is reset. A state that adapts step sizes
is maintained as a whole, as Adam's first moment and step count go with its second moment. So is a state with copies of
the parameters, which the engine averages (:mod:`~lightning_slowmo.algorithms.iterates`), and a state of which nothing
is known.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.optim import Adagrad, Optimizer

from lightning_slowmo.algorithms.optimizer_state import Entry, Role, holders_of_state, nested, roles, states, tensors
from lightning_slowmo.averaging.mean import average_tensors
from lightning_slowmo.communication.workers import SyncError, Workers

InnerBuffers = Literal["reset", "maintain", "average", "auto"]
"""Treatment of the optimizer's buffers: zero them, keep each worker's own, average them, or the paper's choice."""


def check(value: str) -> None:
    """Raise ValueError unless ``value`` is one of the known treatments."""
    if value not in get_args(InnerBuffers):
        raise ValueError(f"inner_buffers must be one of {', '.join(get_args(InnerBuffers))}, got {value!r}.")


def treat(value: InnerBuffers, optimizer: Optimizer, workers: Workers, but: Collection[int] = ()) -> None:
    """Do to the optimizer's buffers what is due at an outer step.

    Args:
        value: the treatment.
        optimizer: the user's own.
        workers: all of whom must call this.
        but: ids of parameters whose buffers stay.

    Raises:
        SyncError: if buffers are to be averaged and the workers do not hold the same ones.
        ValueError: if buffers are to be averaged that are quantized.
    """
    if value == "reset":
        reset(optimizer, but)
    elif value == "average":
        average(optimizer, workers, but)
    elif value == "auto":
        for state in _states(optimizer, but):
            if state.is_momentum():
                state.forget()


def reset(optimizer: Optimizer, but: Collection[int] = ()) -> None:
    """Make an optimizer forget: its next step is that of a fresh one, also in Adam's bias correction.

    Nearly all optimizers build the state of a parameter at its first step, so emptying it is a reset to zero that
    includes step counters, and dampening treats the next gradient as the first one.

    Args:
        optimizer: the user's own.
        but: ids of parameters whose state stays.

    Raises:
        ValueError: if the optimizer has built step sizes before its first step, and their first values are not known.
    """
    for state in _states(optimizer, but):
        state.forget()


class _State(NamedTuple):
    """The state of one parameter in one optimizer, which may be one that the user's optimizer holds."""

    holder: Optimizer
    group: dict[str, Any]
    parameter: Tensor
    values: dict[str, Any]
    entries: dict[str, Entry] | None
    rebuilds: bool

    def role(self, name: str) -> Role | None:
        return entry.role if self.entries is not None and (entry := self.entries.get(name)) else None

    def is_momentum(self) -> bool:
        """Whether there is momentum in it and nothing else, but counters."""
        found = {self.role(name) for name in self.values}
        return "momentum" in found and found <= {"momentum", "counter"}

    def forget(self) -> None:
        if isinstance(self.holder, Adagrad):  # which may have built it in its constructor
            self.values["step"].zero_()
            self.values["sum"].fill_(self.group["initial_accumulator_value"])
        elif self.rebuilds:
            self.values.clear()
        else:
            for name, value in self.values.items():
                self._begin_again(name, value)

    def _begin_again(self, name: str, value: Any) -> None:
        role = self.role(name)
        if role == "momentum":
            for tensor in tensors(value):
                tensor.zero_()
        elif role not in ("counter", "iterate"):  # an iterate follows its parameter; it is no buffer to be emptied
            raise ValueError(
                f"{type(self.holder).__name__} builds {name!r} in its constructor, so it cannot be reset: its first "
                "value is not known. Use inner_buffers='maintain', 'average' or 'auto'."
            )


def _states(optimizer: Optimizer, but: Collection[int]) -> Iterator[_State]:
    holders = holders_of_state(optimizer)
    if not holders:
        return
    known, all_holders = roles(optimizer), nested(optimizer)
    by_place: dict[tuple[int, int], dict[str, Entry]] = {}  # of each kind of parameter, made once
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if but and id(parameter) in but:
                continue
            for place, values in states(holders, parameter):
                found = known.of(index, parameter)
                entries = None
                if found is not None:
                    if (id(found), place) not in by_place:
                        by_place[id(found), place] = {name: e for (at, name), e in found.items() if at == place}
                    entries = by_place[id(found), place]
                yield _State(all_holders[place], group, parameter, values, entries, known.rebuilds)


def average(optimizer: Optimizer, workers: Workers, but: Collection[int] = ()) -> None:
    """Replace momenta, second moments and the like by their mean over the workers; counters stay.

    Args:
        optimizer: the user's own.
        workers: all of whom must call this.
        but: ids of parameters whose buffers stay.

    Raises:
        SyncError: if the workers' optimizers do not hold the same buffers.
        ValueError: if buffers are quantized: a mean of codes means nothing.
    """
    buffers = [tensor for state in _states(optimizer, but) for tensor in _to_average(state)]
    counts = workers.gather([len(buffers), sum(buffer.numel() for buffer in buffers)], "averaging the inner buffers")
    if any(count != counts[0] for count in counts):
        raise SyncError(
            "inner_buffers='average' needs the same optimizer buffers on every worker, but these hold "
            f"{', '.join(f'{int(n)} of {int(numel)} elements' for n, numel in counts)}. "
            "Does a worker have parameters that never received a gradient? Use 'maintain' or 'reset'."
        )
    average_tensors(buffers, workers)


def _to_average(state: _State) -> Iterator[Tensor]:
    """What moves with the gradients. The engine averages iterates, whatever the treatment is."""
    for name in sorted(state.values):
        value = state.values[name]
        if state.entries is None:  # nothing is known: what has the parameter's shape
            skip = not isinstance(value, Tensor) or value.shape != state.parameter.shape or name == "step"
        else:
            skip = state.role(name) in ("counter", "iterate")
        for tensor in () if skip else tensors(value):
            if tensor.is_floating_point():
                yield tensor
            elif tensor.is_complex():
                yield torch.view_as_real(tensor)
            elif tensor.numel() > 1:
                raise ValueError(
                    f"inner_buffers='average' cannot average {name!r} of {type(state.holder).__name__}, which is "
                    f"quantized ({tensor.dtype}): a mean of codes means nothing. Use 'maintain' or 'reset'."
                )
