"""What becomes of the optimizer's own buffers at an outer step: line 2 of SlowMo's Algorithm 1.

``"auto"`` is the paper's choice, made for each parameter by what its state consists of (see
:mod:`~lightning_slowmo.algorithms.optimizer_state`): plain momentum is reset; a state that adapts step sizes is
maintained as a whole, because the rest of it (Adam's first moment and its step count) fits nothing else; so is one with
copies of the parameters, which the engine averages; and so is one of which nothing is known.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Literal, get_args

from torch import Tensor
from torch.optim import Adagrad, Optimizer

from lightning_slowmo.algorithms.optimizer_state import nested, roles, states, tensors
from lightning_slowmo.communication.collectives import average_tensors
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
        reset(optimizer, {*but, *(id(parameter) for parameter in maintained(optimizer))})


def maintained(optimizer: Optimizer) -> Iterator[Tensor]:
    """The parameters whose buffers ``"auto"`` maintains."""
    known = roles(optimizer)
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            found = known.of(index, parameter)
            if found is None or any(entry.role in ("adapts", "iterate") for entry in found.values()):
                yield parameter


def reset(optimizer: Optimizer, but: Collection[int] = ()) -> None:
    """Make an optimizer forget: its next step is that of a fresh one, also in Adam's bias correction.

    Optimizers create the state of a parameter at its first step, so emptying it is a reset to zero that includes step
    counters, and dampening treats the next gradient as the first one. Adagrad creates it earlier.

    Args:
        optimizer: the user's own.
        but: ids of parameters whose state stays.
    """
    for holder in nested(optimizer):
        for group in holder.param_groups:
            for parameter in group["params"]:
                state = holder.state.get(parameter)
                if not state or id(parameter) in but:
                    continue
                if isinstance(holder, Adagrad):
                    state["step"].zero_()
                    state["sum"].fill_(group["initial_accumulator_value"])
                else:
                    state.clear()


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
    buffers = [
        tensor
        for index, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
        if id(parameter) not in but
        for tensor in _to_average(optimizer, index, parameter)
    ]
    counts = workers.gather([len(buffers), sum(buffer.numel() for buffer in buffers)], "averaging the inner buffers")
    if any(count != counts[0] for count in counts):
        raise SyncError(
            "inner_buffers='average' needs the same optimizer buffers on every worker, but these hold "
            f"{', '.join(f'{int(n)} of {int(numel)} elements' for n, numel in counts)}. "
            "Does a worker have parameters that never received a gradient? Use 'maintain' or 'reset'."
        )
    average_tensors(buffers, workers)


def _to_average(optimizer: Optimizer, group: int, parameter: Tensor) -> Iterator[Tensor]:
    """What moves with the gradients in a parameter's state. The engine averages iterates, whatever the treatment is."""
    known = roles(optimizer).of(group, parameter)
    for place, state in states(optimizer, parameter):
        for name in sorted(state):
            value = state[name]
            if known is None:  # then what has the parameter's shape
                skip = not isinstance(value, Tensor) or value.shape != parameter.shape or name == "step"
            else:
                entry = known.get((place, name))
                skip = entry is not None and entry.role in ("counter", "iterate")
            for tensor in () if skip else tensors(value):
                if tensor.is_floating_point() or tensor.is_complex():
                    yield tensor
                elif tensor.numel() > 1:
                    raise ValueError(
                        f"inner_buffers='average' cannot average {name!r} of {type(optimizer).__name__}, which is "
                        f"quantized ({tensor.dtype}): a mean of codes means nothing. Use 'maintain' or 'reset'."
                    )
