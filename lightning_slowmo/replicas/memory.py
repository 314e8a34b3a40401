"""What workers in one process take of memory, and whether of their device's or the host's: known before they train."""

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
from lightning_slowmo.replicas.host import bytes_taken
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

    def on_host(self, workers: int) -> int:
        """Bytes that so many workers take of the host's memory.

        Pinned blocks are powers of two; and while the consensus is validated or saved, it is once more the parameters.
        """
        pinned = bytes_taken(self.model, workers) + bytes_taken(self.optimizer, workers)
        return pinned + workers * (self.slow + self.model)

    def place(self, workers: int, free: int, free_on_host: int, offloaded: bool) -> str | None:
        """Where the workers' values lie: on their device if it holds them, else in the host's memory.

        Activations and gradients of one worker at a time come on top of what is counted on the device.

        Args:
            workers: how many.
            free: bytes that the device has left.
            free_on_host: bytes that the host has left.
            offloaded: whether the algorithm's state lies in the CPU's memory anyway.

        Returns:
            Why they lie in the host's memory, in a sentence; None if they lie on the device.

        Raises:
            ValueError: if neither holds them; says how much is needed, and what would fit.
        """
        each = self.total - self.slow * offloaded
        if workers * each <= free:
            return None
        kept = "parameters and optimizer states" if offloaded else "parameters, optimizer states and slow state"
        need = f"{workers} workers need {_gigabytes(workers * each)} for {kept}"
        said = f"{need}, and the device has {_gigabytes(free)} left"
        helps = not offloaded and workers * (self.total - self.slow) <= free
        needed = self.on_host(workers)
        if needed <= free_on_host:
            hint = " With offload_slow_state='cpu' they would lie on the device." if helps else ""
            return (
                f"{said}. So they lie in the host's memory, of which they take {_gigabytes(needed)} with what a "
                f"consensus needs; workers are copied to the device for their turns, and averages run on the CPU.{hint}"
            )
        fit = next((n for n in range(workers - 1, 0, -1) if n * each <= free or self.on_host(n) <= free_on_host), 0)
        ways = [f"at most {fit} workers"] if fit else ["a smaller model"]
        ways += ["offload_slow_state='cpu'"] if helps else []
        raise ValueError(
            f"{said}; in the host's memory it would be {_gigabytes(needed)}, and that has {_gigabytes(free_on_host)} "
            f"left. Use {', or '.join(ways)}."
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
