"""What workers in one process take of a device's memory, and whether it has that much: known before training starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.optim import Optimizer

from lightning_slowmo.algorithms import Algorithm
from lightning_slowmo.parameters import Layout
from lightning_slowmo.private.twins import nested_optimizers, twin_of_optimizer
from lightning_slowmo.storage import accumulation_dtype


@dataclass(frozen=True)
class Memory:
    """Bytes that one worker keeps between its turns.

    Attributes:
        model: parameters and buffers.
        optimizer: states of the optimizers, as far as they are known.
        slow: what the algorithm keeps, such as anchor and slow momentum.
    """

    model: int
    optimizer: int
    slow: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.model + self.optimizer + self.slow

    def check(self, workers: int, free: int, offloaded: bool) -> None:
        """Refuse what a device cannot hold. Activations and gradients of one worker at a time come on top of it.

        Args:
            workers: how many.
            free: bytes that the device has left.
            offloaded: whether the algorithm's state lies in the CPU's memory.

        Raises:
            ValueError: if it cannot; says how much is needed, and what would fit.
        """
        each = self.total - self.slow * offloaded
        if workers * each <= free:
            return
        kept = "parameters and optimizer states" if offloaded else "parameters, optimizer states and slow state"
        ways = [f"at most {free // each} workers"]
        if not offloaded and workers * (self.total - self.slow) <= free:
            ways.append("offload_slow_state='cpu'")
        raise ValueError(
            f"{workers} workers need {_gigabytes(workers * each)} for {kept}, and the device has {_gigabytes(free)} "
            f"left. Use {', or '.join([*ways, 'the CPU (accelerator=' + repr('cpu') + ')'])}."
        )


def memory_of_worker(module: Module, optimizers: Sequence[Optimizer], algorithm: Algorithm, workers: int) -> Memory:
    """What one of many workers keeps.

    Args:
        module: the model.
        optimizers: of its parameters.
        algorithm: of the workers.
        workers: how many.
    """
    model = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return Memory(
        sum(map(_bytes, model.values())),
        sum(map(_state_after_a_step, optimizers)),
        sum(_slow_state(optimizer, algorithm, workers) for optimizer in optimizers),
    )


def _slow_state(optimizer: Optimizer, algorithm: Algorithm, workers: int) -> int:
    layout = Layout(group["params"] for group in optimizer.param_groups)
    try:
        copies = algorithm.state_numel(layout, workers) / max(1, layout.numel)
    except ValueError:  # an algorithm of the user's, which does not say
        return 0
    return int(copies * sum(run.numel * accumulation_dtype(run.dtype).itemsize for run in layout.runs))


def _state_after_a_step(optimizer: Optimizer) -> int:
    """Bytes of an optimizer's state after a step without values; those that it has now if it cannot take one."""
    memo: dict[int, Any] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in memo:
                memo[id(parameter)] = twin = Parameter(parameter.detach().to("meta"), parameter.requires_grad)
                twin.grad = torch.empty_like(twin) if parameter.requires_grad else None
    stepped = twin_of_optimizer(optimizer, memo)
    for each in nested_optimizers(stepped):
        vars(each).pop("step", None)  # where a scheduler counts the steps of the one that there is
    try:
        stepped.step()
    except Exception:  # whatever an optimizer does that takes values: then less is known
        stepped = optimizer
    states = [state for each in nested_optimizers(stepped) for state in each.state.values() if isinstance(state, dict)]
    tensors = {id(value): value for state in states for value in state.values() if isinstance(value, Tensor)}
    return sum(map(_bytes, tensors.values()))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"
