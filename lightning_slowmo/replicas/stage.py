"""The stage: one model on which many workers train, one after the other.

The module and the optimizers that a user made are the *stage*. A :class:`Replica` holds what a process would hold:
parameters, buffers, optimizer states, options of the parameter groups, gradients and random numbers. Algorithms run on
the replica's own twins of module and optimizers; training steps run on the stage, which holds one replica at a time.

On a CPU the stage's tensors are let point to the replica's memory, which copies nothing. On a GPU values are copied in
and out, so that the stage keeps its addresses and a captured graph serves all workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.optim import Optimizer

from lightning_slowmo.private.twins import nested_optimizers, twin_of_module, twin_of_optimizer
from lightning_slowmo.replicas.buffers import BuffersOnStage
from lightning_slowmo.replicas.crossing import Crossing, Landing, wait_for
from lightning_slowmo.replicas.host import HostMemory
from lightning_slowmo.replicas.optimizers import OptimizerOnStage
from lightning_slowmo.replicas.parameters import ParametersOnStage
from lightning_slowmo.replicas.randomness import Randomness
from lightning_slowmo.replicas.rows import Copying, Rows
from lightning_slowmo.replicas.states import OptimizerFromHost, Slots


class Replica:
    """What one worker has of its own.

    Args:
        module: whose parameters and buffers are copied.
        optimizers: whose states and options are copied; together with those that they hold.
        host: gives memory for the replica; None: it lies where the module does.

    Attributes:
        module: a twin of the module with the replica's parameters and buffers; all else is the module's.
        optimizers: twins of the optimizers, on the replica's parameters.
        all_optimizers: the same with those that they hold.
        parameters: the replica's, in the order of their memory.
        twins: the same for each of the stage's, by id.
        rows: their memory.
        randomness: the states of its random number generators.
    """

    def __init__(self, module: Module, optimizers: Sequence[Optimizer], host: HostMemory | None = None) -> None:
        originals = list(_parameters(module, optimizers))
        self.rows = Rows(originals, host)
        self.parameters: list[Tensor] = []
        for parameter, values in zip(originals, self.rows.tensors, strict=True):
            twin = Parameter(values, requires_grad=parameter.requires_grad)
            vars(twin).update(vars(parameter))  # marks such as "no weight decay"
            self.parameters.append(twin)
        self.twins = dict(zip(map(id, originals), self.parameters, strict=True))
        buffers = list(module.buffers())
        copies = Rows(buffers, host).tensors if host else [buffer.detach().clone() for buffer in buffers]
        self.module = twin_of_module(module, self.twins | dict(zip(map(id, buffers), copies, strict=True)))
        memo: dict[int, Any] = dict(self.twins)
        device = host.device if host else None
        self.optimizers = [twin_of_optimizer(optimizer, memo, device) for optimizer in optimizers]
        self.all_optimizers = [each for optimizer in self.optimizers for each in nested_optimizers(optimizer)]
        self.randomness = Randomness(originals[0].device)


class Stage:
    """One module and its optimizers, which hold one worker's values at a time.

    Args:
        module: on which training steps run.
        optimizers: which step its parameters.
        count: number of workers; all begin with the module's present values.
        static: whether parameters and buffers keep their addresses, and values are copied in and out; None: where
            parameters are on a GPU, or replicas on the host.
        on_host: whether replicas lie in the host's memory, in pinned one if the parameters are on a GPU; otherwise
            they lie where the module does.

    Attributes:
        replicas: what each worker has of its own.
        current: which worker is on the stage; None if nobody is, and the replicas may be changed.

    Raises:
        ValueError: if the model has no parameters.
    """

    def __init__(
        self,
        module: Module,
        optimizers: Sequence[Optimizer],
        count: int,
        static: bool | None = None,
        on_host: bool = False,
    ) -> None:
        self._optimizers = [each for optimizer in optimizers for each in nested_optimizers(optimizer)]
        self._parameters = list(_parameters(module, optimizers))
        if not self._parameters:
            raise ValueError("There is nothing to train: the model has no parameters.")
        on_gpu = any(parameter.is_cuda for parameter in self._parameters)
        static = on_host or (on_gpu if static is None else static)
        self._host = HostMemory(count, pinned=on_gpu) if on_host else None
        self._home = [parameter.data for parameter in self._parameters]
        self.replicas = [Replica(module, optimizers, self._host) for _ in range(count)]
        rows = self._lie_in_a_row() if static else None
        seat = self._seats_on_host(module, rows) if self._host else partial(self._seat, module, static, rows)
        self._seats = list(map(seat, self.replicas))
        self.current: int | None = None

    def _lie_in_a_row(self) -> Rows | None:
        """Let the parameters lie one behind the other, if kernels can take them as they lie then."""
        rows = Rows(self._parameters)
        if not rows.aligned:
            return None
        for parameter, place in zip(self._parameters, rows.tensors, strict=True):
            parameter.data = place
        return rows

    def _seat(self, module: Module, static: bool, rows: Rows | None, replica: Replica) -> Seat:
        """What a worker exchanges with the stage."""
        copying = None
        if rows is not None:
            copying = Copying(rows.wholes, replica.rows.wholes)
        elif static:
            copying = Copying(self._home, replica.rows.tensors)
        return Seat(
            ParametersOnStage(self._parameters, replica.parameters, copying),
            BuffersOnStage(module, replica.module, static),
            [
                OptimizerOnStage(stage, own, self._parameters, replica.parameters, static)
                for stage, own in zip(self._optimizers, replica.all_optimizers, strict=True)
            ],
        )

    def _seats_on_host(self, module: Module, rows: Rows | None) -> Callable[[Replica], Seat]:
        """What makes seats of workers whose values lie in the host's memory."""
        host, places = self._host, rows.tensors if rows else self._home
        assert host is not None
        landing, crowd = Landing(), None if rows else Landing()
        slots = [Slots(optimizer, self._parameters) for optimizer in self._optimizers]
        device = self._parameters[0].device

        def seat(replica: Replica) -> Seat:
            return Seat(
                ParametersOnStage(self._parameters, replica.parameters, Crossing(places, replica.rows.tensors, crowd)),
                BuffersOnStage(module, replica.module, True, landing, (device, host.device)),
                [
                    OptimizerFromHost(stage, own, self._parameters, replica.parameters, slot, host)
                    for stage, own, slot in zip(self._optimizers, replica.all_optimizers, slots, strict=True)
                ],
            )

        return seat

    def put(self, index: int) -> None:
        """Let a worker stand on the stage."""
        if self.current == index:
            return
        self.clear()
        seat = self._seats[index]
        seat.parameters.put()
        seat.buffers.put()
        for optimizer in seat.optimizers:
            optimizer.put()
        self.replicas[index].randomness.restore()
        torch.clear_autocast_cache()  # of another worker's weights
        self.current = index

    def clear(self, drop_gradients: bool = False) -> None:
        """Let the worker on the stage take along what has become of its values; then the replicas may be changed.

        Args:
            drop_gradients: whether they have been used, and are not needed any more.
        """
        if self.current is None:
            return
        seat = self._seats[self.current]
        seat.parameters.take(drop_gradients)
        seat.buffers.take()
        for optimizer in seat.optimizers:
            optimizer.take()
        self.replicas[self.current].randomness.note()
        if self._host is not None:
            wait_for(self._parameters[0].device)
        self.current = None

    def follow(self) -> bool:
        """Let the replicas' parameters be trained, or frozen, and be in the groups, as those of the stage are now.

        Returns:
            Whether anything has changed.

        Raises:
            RuntimeError: if the stage has parameters that it did not have at the start.
        """
        changed = False
        for place, parameter in enumerate(self._parameters):
            if parameter.requires_grad != self.replicas[0].parameters[place].requires_grad:
                changed = True
                for replica in self.replicas:
                    replica.parameters[place].requires_grad_(parameter.requires_grad)
        for seat, replica in zip(self._seats, self.replicas, strict=True):
            for optimizer in seat.optimizers:
                changed |= optimizer.follow(partial(_twin, replica=replica))
        return changed

    def spread_options(self) -> None:
        """Give all workers the options of the parameter groups, such as learning rates, that the stage has now."""
        for seat in self._seats:
            for optimizer in seat.optimizers:
                optimizer.take_options()

    def retire(self) -> None:
        """Give the module memory of its own back, with the present values."""
        with torch.no_grad():
            for parameter, home in zip(self._parameters, self._home, strict=True):
                if parameter.data_ptr() != home.data_ptr():
                    home.copy_(parameter)
                    parameter.data = home
        self.current = None


@dataclass(frozen=True)
class Seat:
    """What a worker exchanges with the stage when it comes and goes.

    Attributes:
        parameters: with their gradients.
        buffers: of the module.
        optimizers: those of the user, and those that they hold.
    """

    parameters: ParametersOnStage
    buffers: BuffersOnStage
    optimizers: list[OptimizerOnStage]


def _parameters(module: Module, optimizers: Sequence[Optimizer]) -> Iterator[Tensor]:
    """All parameters, each once: first in the order of the optimizers' groups, in which they are averaged."""
    groups = (group["params"] for optimizer in optimizers for group in optimizer.param_groups)
    yield from {id(p): p for p in chain(chain.from_iterable(groups), module.parameters())}.values()


def _twin(parameter: Tensor, replica: Replica) -> Tensor:
    try:
        return replica.twins[id(parameter)]
    except KeyError:
        raise RuntimeError(
            "The model got new parameters during training, which simulated workers cannot follow. Make them before fit "
            "and freeze them until they are needed."
        ) from None
