"""Wrong calls of the strategy, and what should be written instead: said where they are made, before anything starts."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from lightning_slowmo.algorithms import Algorithm
from lightning_slowmo.algorithms.source import settings, source
from lightning_slowmo.presets import LAUNCHERS, PRESETS, nearest
from lightning_slowmo.trainer.base import StrategyPart

DDP_STRATEGY = ("ddp_comm_state", "ddp_comm_hook", "ddp_comm_wrapper", "model_averaging_period")
"""Arguments of Lightning's DDPStrategy that have no counterpart."""


def explains_arguments(make: Callable[..., None]) -> Callable[..., None]:
    """Let an ``__init__`` say what to write instead of arguments that it does not take.

    Args:
        make: the method, whose first argument but ``self`` is ``algorithm``.

    Returns:
        The same, with the same signature.
    """
    known = [name for name in inspect.signature(make).parameters if name != "self"]

    @functools.wraps(make)
    def init(self: Any, *arguments: Any, **named: Any) -> None:
        for name in named:
            if name not in known:
                algorithm = arguments[0] if arguments else named.get("algorithm", "slowmo")
                raise TypeError(f"SlowMoStrategy got {name}={named[name]!r}. {_answer(name, named, algorithm, known)}")
        make(self, *arguments, **named)

    return init


def _answer(name: str, named: dict[str, Any], algorithm: Any, known: list[str]) -> str:
    """What to write instead of an argument that the strategy does not take."""
    if isinstance(algorithm, str):
        algorithm = PRESETS.get(algorithm)
    if is_dataclass(algorithm) and name in (own := [field.name for field in fields(algorithm)]):
        values = settings(algorithm) | {key: value for key, value in named.items() if key in own}
        written = ", ".join(f"{key}={source(value)}" for key, value in values.items())
        kind = type(algorithm).__name__
        return f"Settings of the algorithm go into its configuration: SlowMoStrategy({kind}({written}))."
    if name in inspect.signature(DistributedDataParallel).parameters:
        return (
            "The model is wrapped in DistributedDataParallel inside nodes alone: with workers_per_node, write "
            f"ddp_kwargs={{{name!r}: {named[name]!r}}}; otherwise leave it out, as nothing needs it."
        )
    if name in DDP_STRATEGY:
        return "It changes how DDP exchanges gradients, which this strategy does not do. Leave it out."
    meant = nearest(name, known)
    hint = f" Did you mean {meant}?" if meant else ""
    return f"It is not known.{hint} There are: {', '.join(known)}."


class Names(list):
    """The names of a Lightning's strategies, which say what was meant where something else is looked for.

    A Trainer looks its ``strategy`` up here, and its own error knows neither presets nor configurations.

    Args:
        names: all that are registered.
        package: name of the Lightning that they are registered with.
        kind: this package's strategy for it.
    """

    def __init__(self, names: Iterable[str], package: str, kind: type) -> None:
        super().__init__(names)
        self.package = package
        self.kind = kind

    def __contains__(self, wanted: object) -> bool:
        """Whether a name is registered.

        Raises:
            ValueError: if it is not, and what was meant is clear.
        """
        if super().__contains__(wanted):
            return True
        if answer := self._answer(wanted):
            raise ValueError(f"Trainer(strategy=...) got {wanted!r}. {answer}")
        return False

    def _answer(self, wanted: object) -> str | None:
        if isinstance(wanted, Algorithm):
            return f"A configuration goes into a strategy: strategy=SlowMoStrategy({source(wanted)})."
        if isinstance(wanted, type) and issubclass(wanted, Algorithm):
            return f"Write strategy=SlowMoStrategy({wanted.__name__}())."
        if isinstance(wanted, type) and issubclass(wanted, self.kind):
            return f"Write strategy={wanted.__name__}()."
        if isinstance(wanted, str):
            meant = nearest(wanted.partition("_find_unused")[0], self)
            if meant and any(meant.removesuffix(suffix) in PRESETS for suffix in LAUNCHERS):
                return f"Did you mean {meant!r}?"
        elif isinstance(wanted, StrategyPart) and wanted.package.__name__ != self.package:
            module = "lightning_slowmo.pl" if self.package == "pytorch_lightning" else "lightning_slowmo"
            return f"That strategy is for another package than this Trainer, {self.package}: use {module}'s."
        return None


def explain_names(registry: Any, package: str, kind: type) -> None:
    """Let a registry of strategies answer with :class:`Names`.

    Args:
        registry: Lightning's, with all names registered.
        package: name of the Lightning that it belongs to.
        kind: this package's strategy for it.
    """
    available = registry.available_strategies
    registry.available_strategies = lambda: Names(available(), package, kind)


def refuse_notebook(algorithm: Algorithm, start_method: str) -> None:
    """Refuse to start processes from a notebook in a way that cannot work there.

    Args:
        algorithm: of the strategy.
        start_method: how it starts processes.

    Raises:
        ValueError: if this is a notebook or an interactive shell; says which name works.
    """
    if start_method == "fork" or not (hasattr(sys, "ps1") or sys.flags.interactive):
        return
    name = next((name for name, configuration in PRESETS.items() if configuration == algorithm), None)
    write = f"strategy='{name}_notebook'" if name else f"SlowMoStrategy({source(algorithm)}, start_method='fork')"
    raise ValueError(
        f"In a notebook, processes can be forked alone, and start_method is {start_method!r}: use {write}."
    )
