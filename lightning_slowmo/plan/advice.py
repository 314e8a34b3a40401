"""Every preset beside DDP, and what to do."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lightning_slowmo.algorithms import Algorithm, LocalSGD
from lightning_slowmo.algorithms.source import source
from lightning_slowmo.communication.probe import Link
from lightning_slowmo.plan.model import DDP, Prediction, predict
from lightning_slowmo.presets import PRESETS
from lightning_slowmo.qsdp import QSDP
from lightning_slowmo.traffic import AT_ONCE

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
    shapes: Sequence[Sequence[int]],
    workers: int,
    step: float,
    link: Link,
    sync_every: int | None = None,
    bucket_cap_mb: float | None = None,
    shards: int = 1,
) -> dict[str, Prediction | str]:
    """DDP and all presets, by name; a text says why there is no prediction.

    Args:
        shapes: of the parameters.
        workers: how many.
        step: seconds of a step of one worker alone.
        link: of each worker.
        sync_every: optimizer steps between averages, see :func:`at_period`; None keeps the presets' own.
        bucket_cap_mb: size of messages in MiB; None: as the strategy chooses it.
        shards: processes that make up a worker, see :func:`predict`.
    """
    rows: dict[str, Prediction | str] = {"ddp": predict(DDP(), shapes, workers, step, link, shards=shards)}
    for name, preset in PRESETS.items():
        algorithm = preset if sync_every is None else at_period(preset, sync_every)
        try:
            rows[name] = predict(algorithm, shapes, workers, step, link, bucket_cap_mb=bucket_cap_mb, shards=shards)
        except ValueError as error:
            rows[name] = str(error)
    return rows


WORTH_IT = 0.97
"""A size of messages is advised if steps take less than this share of what they take without."""


@dataclass(frozen=True)
class Advice:
    """What to do.

    Attributes:
        name: of the row that is recommended: ``"ddp"`` or a preset.
        strategy: what to write as ``Trainer(strategy=...)``.
        text: why.
    """

    name: str
    strategy: str
    text: str

    @property
    def written(self) -> str:
        """Lines for a script: a Trainer with ``strategy``, and the import if that is of this package.

        Example:
            >>> print(Advice("slowmo", "SlowMoStrategy(SlowMo(sync_every=12))", "it pays").written)
            from lightning_slowmo import SlowMo, SlowMoStrategy
            Trainer(strategy=SlowMoStrategy(SlowMo(sync_every=12)))
        """
        names = sorted(set(re.findall(r"\b[A-Z]\w*(?=\()", self.strategy))) if self.name != "ddp" else []
        imports = f"from lightning_slowmo import {', '.join(names)}\n" if names else ""
        return f"{imports}Trainer(strategy={self.strategy})"


def recommend(
    shapes: Sequence[Sequence[int]],
    workers: int,
    step: float,
    link: Link,
    sync_every: int = 12,
    bucket_cap_mb: float | None = None,
    shards: int = 1,
    qsdp: QSDP | None = None,
) -> Advice:
    """What to do; the arguments are those of :func:`plan`, and how messages between shards are quantized.

    The order is that of how little training changes: DDP, local steps with slow momentum, fewer syncs, fewer bits
    (which do not go with shards).
    """

    def seconds(algorithm: Algorithm, cap: float | None = bucket_cap_mb) -> float:
        return predict(algorithm, shapes, workers, step, link, bucket_cap_mb=cap, shards=shards).step

    def advise(name: str, algorithm: Algorithm, text: str) -> Advice:
        cap = bucket_cap_mb
        if cap is None:
            own = replace(link, bandwidth=link.bandwidth / shards)
            wanted = cap_for(own, workers, 4 * sum(math.prod(shape) for shape in shapes) // shards)
            if seconds(algorithm, wanted) < WORTH_IT * seconds(algorithm):
                cap = wanted
                text += f" Messages of {cap} MiB wait less for the latency: {seconds(algorithm, cap) / step:.2f} times."
        if shards == 1:
            return Advice(name, strategy_of(algorithm, cap), text)
        options = [source(algorithm), f"workers={workers}", *([] if cap is None else [f"bucket_cap_mb={cap:g}"])]
        options += [] if qsdp is None else [f"qsdp={source(qsdp)}"]
        return Advice(name, f"SlowMoModelParallelStrategy({', '.join(options)})", text)

    ddp = predict(DDP(), shapes, workers, step, link, shards=shards).step
    stay = partial(Advice, "ddp", '"ddp"' if shards == 1 else "ModelParallelStrategy()")
    if workers == 1:
        return stay("There is one worker: nothing to communicate.")
    if ddp <= GOOD_ENOUGH * step:
        return stay(f"Stay with ddp: it takes {ddp / step:.2f} times the computation, so there is little to gain.")
    slowmo, qprsgd = (at_period(PRESETS[name], sync_every) for name in ("slowmo", "qprsgd"))
    takes = seconds(slowmo)
    if takes <= GOOD_ENOUGH * step:
        text = f"Use slowmo with sync_every={sync_every}: {ddp / takes:.1f} times as fast as ddp"
        return advise("slowmo", slowmo, f"{text}, {takes / step:.2f} times the computation.")
    text = f"slowmo with sync_every={sync_every} takes {takes / step:.2f} times the computation"
    text += f" ({ddp / takes:.1f} times as fast as ddp)" if ddp > takes else ", more than ddp"
    quantized = seconds(qprsgd) if shards == 1 else takes
    needed = math.ceil(sync_every * (takes - step) / ((GOOD_ENOUGH - 1) * step))
    text += f"; {GOOD_ENOUGH:g} times would need sync_every={needed}."
    if quantized < takes:
        text += f" qprsgd, which sends 4 bits an element, takes {quantized / step:.2f} times at {sync_every}."
    if quantized > GOOD_ENOUGH * step:
        text += " At such a period expect to tune: diloco is made for hundreds of steps between syncs."
    if min(takes, quantized) >= ddp:
        return stay(text)
    name, algorithm = ("slowmo", slowmo) if takes <= quantized else ("qprsgd", qprsgd)
    return advise(name, algorithm, text)


def cap_for(link: Link, workers: int, total_bytes: int) -> int:
    """The size of messages with which latencies take a tenth of the time of the bytes, in MiB.

    With :data:`~lightning_slowmo.traffic.AT_ONCE` buckets of B bytes under way, latencies take n x latency x bandwidth
    / (2 B) of the time that the bytes take in an all-reduce of n workers.

    Args:
        link: of each worker.
        workers: n.
        total_bytes: of the parameters; messages take an eighth of them at most, for the memory's sake.
    """
    wanted = workers * link.latency * link.bandwidth / 8 / (AT_ONCE * (GOOD_ENOUGH - 1))
    return max(8, math.ceil(min(wanted, total_bytes / 8) / 2**20))


def strategy_of(algorithm: Algorithm, bucket_cap_mb: float | None = None) -> str:
    """What to write as ``Trainer(strategy=...)`` for a configuration and a size of messages.

    Example:
        >>> strategy_of(PRESETS["slowmo"])
        'SlowMoStrategy(SlowMo(sync_every=12))'
    """
    written = source(algorithm)
    if written == "SlowMo()":  # the number that there is most to say about
        written = f"SlowMo(sync_every={PRESETS['slowmo'].sync_every})"  # type: ignore[attr-defined]
    option = "" if bucket_cap_mb is None else f", bucket_cap_mb={bucket_cap_mb:g}"
    return f"SlowMoStrategy({written}{option})"
