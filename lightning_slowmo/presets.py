"""Names for configurations: what ``Trainer(strategy="...")`` understands."""

from __future__ import annotations

from lightning_slowmo.algorithms import BMUF, Algorithm, AllReduce, DiLoCo, LocalSGD, SlowMo

PRESETS: dict[str, Algorithm] = {
    "allreduce": AllReduce(),
    "local_sgd": LocalSGD(),
    "slowmo": SlowMo(),
    "bmuf": BMUF(),
    "diloco": DiLoCo(),
}
"""Every preset, by name."""

LAUNCHERS = {"": "popen", "_spawn": "spawn", "_fork": "fork", "_notebook": "fork"}
"""Suffixes of the registered names and the start method that they stand for, as for ``ddp``."""


def preset(name: str) -> Algorithm:
    """The configuration of a name.

    Raises:
        ValueError: if there is none; lists the known ones.
    """
    try:
        return PRESETS[name]
    except KeyError:
        raise ValueError(f"Unknown algorithm {name!r}. Known ones: {', '.join(PRESETS)}.") from None
