"""Another engine in the middle of training, for other optimizers, with the slow state of the parameters that stay.

Recipes that grow a model or train it in stages make new optimizers during training. What the old engine's state says of
a parameter (anchor, slow momentum) then goes to that parameter's place in the new engine, whichever optimizer holds it
now. It is matched by identity: the order, and the number of parameters, may differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_slowmo.algorithms.post_local import RunningPostLocal
from lightning_slowmo.engine import Engine
from lightning_slowmo.pieces import Pieces

Path = tuple[str, ...]
"""Keys that lead to a value in the nested dictionaries of a state."""


def carry_over(old: Engine, new: Engine) -> None:
    """Let a new engine go on where an old one stands, at a moment when all workers hold the consensus.

    What each worker had of its own, such as residuals of compression or the position in the current period, is left
    behind, as on resuming with another number of workers.

    Args:
        old: of the optimizers until now; drained.
        new: of the optimizers from now on, for the same algorithm and workers.

    Raises:
        ValueError: if a value that belongs to parameter groups does not fit the new ones.
    """
    by_parameter: dict[tuple[Path, int], Any] = {}
    others: list[dict[Path, Any]] = []
    for unit, state in zip(old.units, old.shared_state()["units"], strict=True):
        parameters = unit.layout.parameters
        others.append({})
        for path, value in _leaves(state):
            if _is_per_parameter(value, parameters):
                by_parameter |= {(path, id(p)): entry for p, entry in zip(parameters, value, strict=True)}
            else:
                others[-1][path] = value
    if any(isinstance(unit, RunningPostLocal) and unit.started for unit in old.units):
        for unit in new.units:
            if isinstance(unit, RunningPostLocal):
                unit.begin()
    state = new.shared_state()
    for index, unit in enumerate(new.units):
        before = others[index] if index < len(others) else {}
        state["units"][index] = _filled(state["units"][index], unit.layout.parameters, by_parameter, before)
    new.load_shared_state(state)
    new.rounds, new.total, new.on_sync, new.last_meeting = old.rounds, old.total, old.on_sync, old.last_meeting
    new.stop, new.terminate, new.save = old.stop, old.terminate, old.save


def _leaves(state: dict[str, Any], path: Path = ()) -> list[tuple[Path, Any]]:
    """Values of nested dictionaries, with the keys that lead there."""
    leaves = []
    for key, value in state.items():
        here = (*path, key)
        leaves += _leaves(value, here) if isinstance(value, dict) else [(here, value)]
    return leaves


def _is_per_parameter(value: Any, parameters: Sequence[Tensor]) -> bool:
    """Whether a value has one tensor of the parameter's shape, or one number, for each parameter."""
    if not isinstance(value, list) or len(value) != len(parameters):
        return False
    return all(isinstance(entry, (int, float)) for entry in value) or all(
        isinstance(entry, (Tensor, Pieces)) and entry.shape == parameter.shape
        for entry, parameter in zip(value, parameters, strict=True)
    )


def _filled(
    fresh: dict[str, Any],
    parameters: Sequence[Tensor],
    by_parameter: dict[tuple[Path, int], Any],
    others: dict[Path, Any],
    path: Path = (),
) -> dict[str, Any]:
    """A new engine's state of one optimizer, with the old values where there are some."""
    filled: dict[str, Any] = {}
    for key, value in fresh.items():
        here = (*path, key)
        if isinstance(value, dict):
            filled[key] = _filled(value, parameters, by_parameter, others, here)
        elif _is_per_parameter(value, parameters) and here not in others:
            filled[key] = [by_parameter.get((here, id(p)), v) for p, v in zip(parameters, value, strict=True)]
        else:
            filled[key] = others.get(here, value)
            if _lengths(filled[key]) != _lengths(value):
                raise ValueError(
                    f"The optimizers were replaced during training, but the algorithm's {'.'.join(here)} of "
                    f"{_lengths(filled[key])} values does not fit the new ones, of {_lengths(value)}. Keep the number "
                    "of parameter groups, or call trainer.fit once for each set of optimizers."
                )
    return filled


def _lengths(value: Any) -> Any:
    """Number of values in a list, or in each list inside it."""
    if not isinstance(value, list):
        return 1
    nested = [_lengths(item) for item in value if isinstance(item, list)]
    return nested or len(value)
