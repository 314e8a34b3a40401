"""What becomes of the optimizer's own buffers at an outer step: line 2 of SlowMo's Algorithm 1."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, get_args

from torch import Tensor
from torch.optim import Adagrad, Optimizer

from lightning_slowmo.averaging.mean import average_tensors
from lightning_slowmo.communication.workers import SyncError, Workers

InnerBuffers = Literal["reset", "maintain", "average", "auto"]
"""Treatment of the optimizer's buffers: zero them, keep each worker's own, average them, or the paper's choice."""


def check(value: str) -> None:
    """Raise ValueError unless ``value`` is one of the known treatments."""
    if value not in get_args(InnerBuffers):
        raise ValueError(f"inner_buffers must be one of {', '.join(get_args(InnerBuffers))}, got {value!r}.")


def resolve(value: InnerBuffers, optimizer: Optimizer) -> Literal["reset", "maintain", "average"]:
    """Replace ``"auto"`` by the paper's choice: reset momentum, but maintain what adapts step sizes.

    An optimizer counts as Adam-like if its groups have ``betas``, or are known to hold second moments.
    """
    if value != "auto":
        return value
    adaptive = any({"betas", "rho", "lr_decay", "beta2_decay"} & group.keys() for group in optimizer.param_groups)
    return "maintain" if adaptive else "reset"


def reset(optimizer: Optimizer, but: Collection[int] = ()) -> None:
    """Make an optimizer forget: its next step is that of a fresh one, also in Adam's bias correction.

    Every optimizer of torch creates the state of a parameter at its first step, so emptying it is a reset to zero that
    includes step counters, and dampening treats the next gradient as the first one. Only Adagrad creates it earlier.

    Args:
        optimizer: the user's own.
        but: ids of parameters whose state stays.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if not state or id(parameter) in but:
                continue
            if isinstance(optimizer, Adagrad):
                state["step"].zero_()
                state["sum"].fill_(group["initial_accumulator_value"])
            else:
                state.clear()


def average(optimizer: Optimizer, workers: Workers, but: Collection[int] = ()) -> None:
    """Replace the buffers that have a parameter's shape (momenta, second moments) by their mean over the workers.

    Args:
        optimizer: the user's own.
        workers: all of whom must call this.
        but: ids of parameters whose buffers stay.

    Raises:
        SyncError: if the workers' optimizers do not hold the same buffers.
    """
    buffers: list[Tensor] = [
        value
        for group in optimizer.param_groups
        for parameter in group["params"]
        for name, value in sorted(optimizer.state.get(parameter, {}).items())
        if id(parameter) not in but
        and isinstance(value, Tensor)
        and value.shape == parameter.shape
        and (value.is_floating_point() or value.is_complex())
        and name != "step"  # a scalar as well, and to be told from the buffers of scalar parameters by name alone
    ]
    counts = workers.gather([len(buffers), sum(buffer.numel() for buffer in buffers)], "averaging the inner buffers")
    if any(count != counts[0] for count in counts):
        raise SyncError(
            "inner_buffers='average' needs the same optimizer buffers on every worker, but these hold "
            f"{', '.join(f'{int(n)} of {int(numel)} elements' for n, numel in counts)}. "
            "Does a worker have parameters that never received a gradient? Use 'maintain' or 'reset'."
        )
    average_tensors(buffers, workers)
