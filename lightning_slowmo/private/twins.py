"""Twins of modules and optimizers: objects of the same classes on other tensors, for workers that share one model."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn import Module


def twin_of_module(module: Module, tensors: dict[int, Any]) -> Any:
    """A module with other parameters and buffers; everything else is shared with the one that there is.

    Tested with torch 2.15 (``Module._parameters``, ``_buffers``, ``_modules``). Public replacement: ``copy.deepcopy``,
    at the price of copying everything, also what cannot be copied.

    Args:
        module: what to imitate.
        tensors: the twin's parameter or buffer for each of the module's, by id; submodules are added.
    """
    if id(module) in tensors:
        return tensors[id(module)]
    twin = tensors[id(module)] = object.__new__(type(module))
    vars(twin).update(vars(module))
    vars(twin)["_modules"] = {
        name: None if child is None else twin_of_module(child, tensors) for name, child in module._modules.items()
    }
    for kind in ("_parameters", "_buffers"):
        own = vars(module)[kind]
        vars(twin)[kind] = {name: None if tensor is None else tensors[id(tensor)] for name, tensor in own.items()}
    vars(twin)["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
    return twin


def nested_optimizers(optimizer: Any) -> list[Any]:
    """An optimizer and those that it holds, as wrappers do (SAM, Lookahead).

    Tested with torch 2.15 (attributes of ``torch.optim.Optimizer``). Public replacement: none; wrappers differ.
    """
    found = [optimizer]
    for value in vars(optimizer).values():
        if isinstance(value, torch.optim.Optimizer) and value is not optimizer:
            found += nested_optimizers(value)
    return found


def twin_of_optimizer(optimizer: Any, memo: dict[int, Any], device: torch.device | None = None) -> Any:
    """An optimizer of the same class and options on other parameters, without the hooks of the one that there is.

    Tested with torch 2.15 (attributes of ``torch.optim.Optimizer``, such as ``_optimizer_step_pre_hooks``). Public
    replacement: ``copy.deepcopy`` of module and optimizer together, at the price of copying everything.

    Args:
        optimizer: what to imitate; it may hold others.
        memo: the twin's parameter for each of the optimizer's, by id; groups, states and optimizers are added, so that
            what is shared stays shared.
        device: where the twin's states are to lie; None: where the optimizer's do.
    """
    if id(optimizer) in memo:
        return memo[id(optimizer)]
    twin = memo[id(optimizer)] = object.__new__(type(optimizer))
    for name, value in vars(optimizer).items():
        if name.startswith("_optimizer_") and name.endswith("_hooks"):
            value = type(value)()
        elif isinstance(value, torch.optim.Optimizer):
            value = twin_of_optimizer(value, memo, device)
        elif name == "state":
            value = _twin_of_state(value, memo, device)
        elif name == "param_groups":
            value = _twin_of_groups(value, memo)
        vars(twin)[name] = value
    return twin


def _twin_of_state(state: Any, memo: dict[int, Any], device: torch.device | None) -> Any:
    """The state of a twin, with copies of all tensors. Tested with torch 2.15. Public replacement: none."""
    if id(state) not in memo:
        twin: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
        memo[id(state)] = twin
        for key, own in state.items():
            twin[memo.get(id(key), key)] = {
                name: value.detach().to(device, copy=True) if isinstance(value, Tensor) else value
                for name, value in own.items()
            }
    return memo[id(state)]


def _twin_of_groups(groups: list[dict[str, Any]], memo: dict[int, Any]) -> Any:
    """The parameter groups of an optimizer's twin. Tested with torch 2.15. Public replacement: none."""
    if id(groups) not in memo:
        memo[id(groups)] = twins = []
        for group in groups:
            if id(group) not in memo:
                memo[id(group)] = group | {"params": [memo[id(parameter)] for parameter in group["params"]]}
            twins.append(memo[id(group)])
    return memo[id(groups)]


def buffers_of(module: Module) -> dict[str, Tensor | None]:
    """The buffers of a module without those of its submodules, as it keeps them.

    Tested with torch 2.15 (``Module._buffers``). Public replacement: ``named_buffers(recurse=False)``, at the price of
    ten times as much time where there are hundreds of modules without buffers.
    """
    return module._buffers
