"""Names for configurations: what ``Trainer(strategy="...")`` understands."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from lightning_slowmo.algorithms import (
    BMUF,
    DESLOC,
    QPRSGD,
    Algorithm,
    AllReduce,
    APMSqueeze,
    DiLoCo,
    Gossip,
    LocalSGD,
    NoLoCo,
    SensedSGD,
    SketchedSGD,
    SlowMo,
    SparseLoCo,
    SQuARM,
    Threshold,
)

_DPSGD = Gossip("ring", push_sum=False, order="combine_while_adapt")

PRESETS: dict[str, Algorithm] = {
    "allreduce": AllReduce(),
    "local_sgd": LocalSGD(),
    "slowmo": SlowMo(),
    "bmuf": BMUF(),
    "diloco": DiLoCo(),
    "muloco": DiLoCo(sync_every=30, outer_lr=0.7, outer_momentum=0.6),
    "noloco": NoLoCo(),
    "sparse_loco": SparseLoCo(),
    "des_loc": DESLOC(),
    "sgp": Gossip(),
    "osgp": Gossip(overlap=1),
    "dpsgd": _DPSGD,
    "slowmo_sgp": SlowMo(Gossip(), sync_every=48),
    "slowmo_osgp": SlowMo(Gossip(overlap=1), sync_every=48),
    "slowmo_dpsgd": SlowMo(_DPSGD, sync_every=48),
    "qprsgd": QPRSGD(),
    "qprsgd_gossip": QPRSGD(transport="gossip"),
    "choco_sgd": SQuARM(sync_every=1),
    "sparq_sgd": SQuARM(trigger=Threshold(initial=2.0, growth=1.0, every=100)),
    "squarm_sgd": SQuARM(trigger=Threshold(initial=2.5, growth=1.5, every=100)),
    "apmsqueeze": APMSqueeze(),
    "sketched_sgd": SketchedSGD(),
    "sensed_sgd": SensedSGD(),
}
"""Every preset, by name."""

LAUNCHERS = {"": "popen", "_spawn": "spawn", "_fork": "fork", "_notebook": "fork"}
"""Suffixes of the registered names and the start method that they stand for, as for ``ddp``."""


def preset(name: str) -> Algorithm:
    """The configuration of a name.

    Raises:
        ValueError: if there is none; names the nearest, and lists the known ones.
    """
    try:
        return PRESETS[name]
    except KeyError:
        meant = nearest(name, PRESETS)
        hint = f" Did you mean {meant!r}?" if meant else ""
        raise ValueError(f"Unknown algorithm {name!r}.{hint} Known ones: {', '.join(PRESETS)}.") from None


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name that somebody who wrote ``name`` may have meant; None if none is close.

    Example:
        >>> nearest("slomo", PRESETS)
        'slowmo'
    """
    return next(iter(get_close_matches(name, list(names), n=1, cutoff=0.75)), None)
