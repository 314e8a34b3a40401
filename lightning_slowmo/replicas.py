"""Many workers that share one model: what each has of its own, and the stage on which they stand one after the other.

The module and the optimizers that a user made are the *stage*. A :class:`Replica` holds what a process would hold:
parameters, buffers, optimizer states, options of the parameter groups, gradients and random numbers. Algorithms run on
the replica's own twins of module and optimizers; training steps run on the stage, which holds one replica at a time.

On a CPU the stage's tensors are let point to the replica's memory, which copies nothing. On a GPU values are copied in
and out, so that the stage keeps its addresses and a captured graph serves all workers.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.optim import Optimizer

from lightning_slowmo.private import foreach_copy_, is_persistent
from lightning_slowmo.private.twins import buffers_of, nested_optimizers, twin_of_module, twin_of_optimizer
from lightning_slowmo.storage import is_dense


class Randomness:
    """The states of the random number generators, of one worker.

    Args:
        device: whose generator counts besides the CPU's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.note()

    def note(self) -> None:
        """Take the present states."""
        self._python, self._cpu = random.getstate(), torch.get_rng_state()
        self._numpy = numpy.random.get_state()  # noqa: NPY002  # what users' code and seed_everything use
        self._cuda = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None

    def restore(self) -> None:
        """Let the generators go on from these states."""
        random.setstate(self._python)
        numpy.random.set_state(self._numpy)  # noqa: NPY002
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)


class Replica:
    """What one worker has of its own.

    Args:
        module: whose parameters and buffers are copied.
        optimizers: whose states and options are copied; together with those that they hold.

    Attributes:
        module: a twin of the module with the replica's parameters and buffers; all else is the module's.
        optimizers: twins of the optimizers, on the replica's parameters.
        twins: the replica's parameter for each of the stage's, by id.
    """

    def __init__(self, module: Module, optimizers: Sequence[Optimizer]) -> None:
        self.twins: dict[int, Tensor] = {}
        parameters = list(_parameters(module, optimizers))
        for parameter, values in zip(parameters, _rows(parameters), strict=True):
            twin = Parameter(values, requires_grad=parameter.requires_grad)
            vars(twin).update(vars(parameter))  # marks such as "no weight decay"
            self.twins[id(parameter)] = twin
        buffers = {id(buffer): buffer.detach().clone() for buffer in module.buffers()}
        self.module = twin_of_module(module, self.twins | buffers)
        memo: dict[int, Any] = dict(self.twins)
        self.optimizers = [twin_of_optimizer(optimizer, memo) for optimizer in optimizers]
        self.randomness = Randomness(parameters[0].device)


class Stage:
    """One module and its optimizers, which hold one worker's values at a time.

    Args:
        module: on which training steps run.
        optimizers: which step its parameters.
        count: number of workers; all begin with the module's present values.

    Attributes:
        replicas: what each worker has of its own.
        current: which worker is on the stage; None if nobody is, and the replicas may be changed.
    """

    def __init__(self, module: Module, optimizers: Sequence[Optimizer], count: int) -> None:
        self._own_submodules = list(module.modules())
        self._optimizers = [each for optimizer in optimizers for each in nested_optimizers(optimizer)]
        self._parameters = list(_parameters(module, optimizers))
        if not self._parameters:
            raise ValueError("There is nothing to train: the model has no parameters.")
        self._static = any(parameter.is_cuda for parameter in self._parameters)
        self._home = [parameter.data for parameter in self._parameters]
        self.replicas = [Replica(module, optimizers) for _ in range(count)]
        self._tensors = [[each.twins[id(p)] for p in self._parameters] for each in self.replicas]
        self._nested = [[n for o in each.optimizers for n in nested_optimizers(o)] for each in self.replicas]
        self._submodules = [list(each.module.modules()) for each in self.replicas]
        self._kinds = _by_kind(self._parameters)
        self.current: int | None = None

    def put(self, index: int) -> None:
        """Let a worker stand on the stage."""
        if self.current == index:
            return
        self.clear()
        replica = self.replicas[index]
        if self._static:
            for places in self._kinds:
                foreach_copy_([self._parameters[i].data for i in places], [self._tensors[index][i] for i in places])
        for parameter, own in zip(self._parameters, self._tensors[index], strict=True):
            if not self._static:
                parameter.data = own.data
            parameter.grad = own.grad
        self._move_buffers(self._submodules[index], self._own_submodules)
        own_places = dict(zip(self._tensors[index], self._parameters, strict=True))
        for source, target in zip(self._nested[index], self._optimizers, strict=True):
            _copy_optimizer(source, target, own_places)
        replica.randomness.restore()
        torch.clear_autocast_cache()  # of another worker's weights
        self.current = index

    def clear(self, drop_gradients: bool = False) -> None:
        """Let the worker on the stage take along what has become of its values; then the replicas may be changed.

        Args:
            drop_gradients: whether they have been used, and are not needed any more.
        """
        if self.current is None:
            return
        index, replica = self.current, self.replicas[self.current]
        pairs = list(zip(self._parameters, self._tensors[index], strict=True))
        if self._static:
            for kind in self._kinds:
                foreach_copy_([self._tensors[index][i].data for i in kind], [self._parameters[i] for i in kind])
        for parameter, own in pairs:
            if not self._static and parameter.data_ptr() != own.data_ptr():  # rebound by an optimizer, for example
                own.data.copy_(parameter.data)
            gradient, parameter.grad = None if drop_gradients else parameter.grad, None
            # Gradients may lie in the memory of a captured graph, which the next worker's replay needs.
            own.grad = gradient.clone() if self._static and gradient is not None else gradient
        self._move_buffers(self._own_submodules, self._submodules[index])
        places = dict(pairs)
        for source, target in zip(self._optimizers, self._nested[index], strict=True):
            _copy_optimizer(source, target, places)
        replica.randomness.note()
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
            if parameter.requires_grad != self._tensors[0][place].requires_grad:
                changed = True
                for tensors in self._tensors:
                    tensors[place].requires_grad_(parameter.requires_grad)
        for number, optimizer in enumerate(self._optimizers):
            known = self._nested[0][number].param_groups
            sizes = [len(group["params"]) for group in optimizer.param_groups]
            if sizes != [len(group["params"]) for group in known]:
                changed = True
                for replica, twins in zip(self.replicas, self._nested, strict=True):
                    twins[number].param_groups[:] = [
                        group | {"params": [_twin(parameter, replica) for parameter in group["params"]]}
                        for group in optimizer.param_groups
                    ]
        return changed

    def spread_options(self) -> None:
        """Give all workers the options of the parameter groups, such as learning rates, that the stage has now."""
        for twins in self._nested:
            for source, target in zip(self._optimizers, twins, strict=True):
                _copy_options(source, target)

    def retire(self) -> None:
        """Give the module memory of its own back, with the present values."""
        with torch.no_grad():
            for parameter, home in zip(self._parameters, self._home, strict=True):
                if parameter.data_ptr() != home.data_ptr():
                    home.copy_(parameter)
                    parameter.data = home
        self.current = None

    def _move_buffers(self, sources: Sequence[Module], targets: Sequence[Module]) -> None:
        """Let modules have the buffers of others; they are copied if addresses are to stay."""
        present: list[Tensor] = []
        copied: list[Tensor] = []
        for source, target in zip(sources, targets, strict=True):
            for key, buffer in buffers_of(source).items():
                other = buffers_of(target).get(key)
                if buffer is None or other is buffer:
                    continue
                if self._static and other is not None and other.shape == buffer.shape:
                    present.append(other)
                    copied.append(buffer)
                elif key in buffers_of(target):
                    buffers_of(target)[key] = buffer
                else:
                    target.register_buffer(key, buffer, is_persistent(source, key))
        for places in _by_kind(copied):
            foreach_copy_([present[i] for i in places], [copied[i] for i in places])


def _parameters(module: Module, optimizers: Sequence[Optimizer]) -> Iterator[Tensor]:
    """All parameters, each once: first in the order of the optimizers' groups, in which they are averaged."""
    groups = (group["params"] for optimizer in optimizers for group in optimizer.param_groups)
    yield from {id(p): p for p in chain(chain.from_iterable(groups), module.parameters())}.values()


def _rows(parameters: Sequence[Tensor]) -> Iterator[Tensor]:
    """Copies of parameters, those of a dtype and device one behind the other: means can be taken where they lie."""
    numels: dict[tuple[torch.dtype, torch.device], int] = {}
    places = []
    for parameter in parameters:
        kind = (parameter.dtype, parameter.device)
        places.append((kind, numels.get(kind, 0)))
        numels[kind] = numels.get(kind, 0) + parameter.numel()
    rows = {kind: torch.empty(numel, dtype=kind[0], device=kind[1]) for kind, numel in numels.items()}
    for parameter, (kind, start) in zip(parameters, places, strict=True):
        values = parameter.detach()
        if type(values) not in (Tensor, Parameter) or not is_dense(values):
            yield values.clone()
            continue
        yield rows[kind].as_strided(values.shape, values.stride(), start).copy_(values)


def _by_kind(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Numbers of tensors by dtype and device: one kernel copies those of one kind."""
    kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for index, tensor in enumerate(tensors):
        kinds.setdefault((tensor.dtype, tensor.device), []).append(index)
    return list(kinds.values())


def _copy_optimizer(source: Optimizer, target: Optimizer, places: dict[Any, Any]) -> None:
    """Let an optimizer have the state, the options and the counters of its twin.

    Args:
        source: the twin.
        target: on other parameters.
        places: the target's parameter for each of the source's.
    """
    state = {places.get(key, key): value for key, value in source.state.items()}
    target.state.clear()
    target.state.update(state)
    _copy_options(source, target)
    for name, value in vars(source).items():
        if isinstance(value, (int, float)):
            setattr(target, name, value)


def _copy_options(source: Optimizer, target: Optimizer) -> None:
    for own, other in zip(source.param_groups, target.param_groups, strict=True):
        for name, value in own.items():
            if name != "params":
                other[name] = value


def _twin(parameter: Tensor, replica: Replica) -> Tensor:
    try:
        return replica.twins[id(parameter)]
    except KeyError:
        raise RuntimeError(
            "The model got new parameters during training, which simulated workers cannot follow. Make them before fit "
            "and freeze them until they are needed."
        ) from None
