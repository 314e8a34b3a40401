"""Checks a configuration against the signatures of what it configures, before anything is built or started."""

from __future__ import annotations

import inspect
import os
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

SPECIAL = {"_target_", "_partial_", "_args_", "_convert_", "_recursive_"}


OWN = {"seed": int, "metric": str, "mode": typing.Literal["max", "min"], "ckpt_path": str | None}
"""Types of the values of ``conf/train.yaml`` that belong to no group."""


def check(config: DictConfig, groups: Sequence[str] | None = None) -> None:
    """Look at every ``_target_`` of a configuration: does it take these arguments, and of these types?

    Args:
        config: a composed configuration.
        groups: look at these alone; None: at all of it.

    Raises:
        ValueError: names the first key that is unknown or has a value of the wrong type, and what is allowed.
    """
    values: Any
    if groups is None:
        values = OmegaConf.to_container(config, resolve=True)
        for name, hint in OWN.items():
            _check_value(name, values[name], hint)
    else:
        values = {name: OmegaConf.to_container(config[name], resolve=True) for name in groups}
    _check(values, "")


def _check(node: Any, path: str) -> None:
    if isinstance(node, list):
        for index, value in enumerate(node):
            _check(value, f"{path}[{index}]")
    if not isinstance(node, dict):
        return
    hints, anything = _parameters(node["_target_"]) if "_target_" in node else ({}, True)
    for name, value in node.items():
        key = f"{path}.{name}".removeprefix(".")
        if name not in SPECIAL:
            if name in hints:
                _check_value(key, value, hints[name])
            elif not anything:
                raise ValueError(f"{key} is not known: {node['_target_']} takes {', '.join(hints)}.")
        _check(value, key)


def _parameters(target: str) -> tuple[dict[str, Any], bool]:
    """Types of the arguments that a target takes by name, and whether it takes others besides."""
    called = get_object(target)
    function = called.__init__ if inspect.isclass(called) else called
    try:
        signature = inspect.signature(called)
    except ValueError:  # written in C
        return {}, True
    try:
        known = typing.get_type_hints(function)
    except (NameError, TypeError):  # names that exist for type checkers alone
        known = {}
    named = {n: p for n, p in signature.parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    open_ended = any(p.kind == p.VAR_KEYWORD for p in signature.parameters.values())
    return {name: known.get(name, Any) for name in named}, open_ended


def _check_value(key: str, value: Any, hint: Any) -> None:
    if not _fits(value, hint):
        raise ValueError(f"{key} must be {_name(hint)}, got {value!r}.")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value may stand for a type. What is built from a ``_target_`` is left to its taker."""
    if hint is Any:
        return True
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, dict):
        return "_target_" in value or hint not in (bool, int, float, str)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in arguments)
    if origin is typing.Literal:
        return value in arguments
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str, type(None)):
        return isinstance(value, hint if hint is not type(None) else types.NoneType)
    if isinstance(origin, type) and issubclass(origin, (Sequence, set)):
        return isinstance(value, list)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return False
    if isinstance(hint, type) and issubclass(hint, os.PathLike):
        return isinstance(value, str)
    return not isinstance(hint, type) or not isinstance(value, (bool, int, float, str))


def _name(hint: Any) -> str:
    if hint is type(None):
        return "null"
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_name(each) for each in arguments)
    if origin is typing.Literal:
        return " or ".join(map(repr, arguments))
    return getattr(hint, "__name__", str(hint)) if origin is None else str(hint).replace("typing.", "")
