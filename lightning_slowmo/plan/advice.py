"""Every preset beside DDP, and what to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning_slowmo.algorithms import Algorithm, LocalSGD
from lightning_slowmo.communication.probe import Link
from lightning_slowmo.plan.model import DDP, Prediction, predict
from lightning_slowmo.presets import PRESETS

LONG = 12
"""Presets that by default wait at least so many steps take ``--sync-every``; the others keep their own."""

GOOD_ENOUGH = 1.1
"""A step that takes no more than so many times the computation alone leaves little to gain."""


def at_period(algorithm: Algorithm, sync_every: int) -> Algorithm:
    """A configuration with another ``sync_every``, if its own is an integer of :data:`LONG` or more."""
    own = getattr(algorithm, "sync_every", 0)
    if not isinstance(own, int) or own < LONG:
        return algorithm
    changes: dict[str, Any] = {"sync_every": sync_every}
    if isinstance(getattr(algorithm, "base", None), LocalSGD):
        changes["base"] = None  # follows sync_every
    return replace(algorithm, **changes)  # type: ignore[type-var]


def plan(
    shapes: Sequence[Sequence[int]], workers: int, step: float, link: Link, sync_every: int | None = None
) -> dict[str, Prediction | str]:
    """DDP and all presets, by name; a text says why there is no prediction.

    Args:
        shapes: of the parameters.
        workers: how many.
        step: seconds of a step of one worker alone.
        link: of each worker.
        sync_every: optimizer steps between averages, see :func:`at_period`; None keeps the presets' own.
    """
    rows: dict[str, Prediction | str] = {"ddp": predict(DDP(), shapes, workers, step, link)}
    for name, preset in PRESETS.items():
        algorithm = preset if sync_every is None else at_period(preset, sync_every)
        try:
            rows[name] = predict(algorithm, shapes, workers, step, link)
        except ValueError as error:
            rows[name] = str(error)
    return rows


def recommend(shapes: Sequence[Sequence[int]], workers: int, step: float, link: Link, sync_every: int = 12) -> str:
    """What to do, in words.

    The order is that of how little training changes: DDP, local steps with slow momentum, fewer syncs, fewer bits.
    """
    ddp = predict(DDP(), shapes, workers, step, link).step
    if workers == 1:
        return "There is one worker: nothing to communicate."
    if ddp <= GOOD_ENOUGH * step:
        return f"Stay with ddp: it takes {ddp / step:.2f} times the computation, so there is little to gain."
    slowmo = at_period(PRESETS["slowmo"], sync_every)
    takes = predict(slowmo, shapes, workers, step, link).step
    if takes <= GOOD_ENOUGH * step:
        text = f"Use slowmo with sync_every={sync_every}: {ddp / takes:.1f} times as fast as ddp"
        return f"{text}, {takes / step:.2f} times the computation."
    text = f"slowmo with sync_every={sync_every} takes {takes / step:.2f} times the computation"
    text += f" ({ddp / takes:.1f} times as fast as ddp)" if ddp > takes else ", more than ddp"
    quantized = predict(at_period(PRESETS["qprsgd"], sync_every), shapes, workers, step, link).step
    needed = math.ceil(sync_every * (takes - step) / ((GOOD_ENOUGH - 1) * step))
    text += f"; {GOOD_ENOUGH:g} times would need sync_every={needed}."
    if quantized < takes:
        text += f" qprsgd, which sends 4 bits an element, takes {quantized / step:.2f} times at {sync_every}."
    if quantized > GOOD_ENOUGH * step:
        text += " At such a period expect to tune: diloco is made for hundreds of steps between syncs."
    return text
