"""The rows of the side-by-side tables: every preset, and the schedules and compressors that go with some."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks.problems import Images, Problem, Text
from benchmarks.stacked import Inner
from lightning_slowmo import (
    BMUF,
    DESLOC,
    PRESETS,
    QPRSGD,
    QSR,
    Algorithm,
    AllReduce,
    APMSqueeze,
    DiLoCo,
    LocalSGD,
    NoLoCo,
    PostLocal,
    Ramp,
    SensedSGD,
    SketchedSGD,
    SlowMo,
    SparseLoCo,
    Stages,
)
from lightning_slowmo.compression import QSGD, Bins

Make = Callable[[float], Algorithm]
"""An algorithm, given the peak learning rate: QSR's coefficient is in units of it."""


def sgd(parameters: Sequence[nn.Parameter], rate: float, momentum: float = 0.9) -> list[Optimizer]:
    """With Nesterov momentum."""
    nesterov = momentum > 0
    return [torch.optim.SGD(parameters, rate, momentum, nesterov=nesterov, weight_decay=5e-4, fused=True)]


def adam(parameters: Sequence[nn.Parameter], rate: float, beta: float = 0.9) -> list[Optimizer]:
    """AdamW."""
    return [torch.optim.AdamW(parameters, rate, betas=(beta, 0.999), weight_decay=0.01, fused=True)]


def muon(
    parameters: Sequence[nn.Parameter], rate: float, momentum: float = 0.95, *, hidden: Collection[int]
) -> list[Optimizer]:
    """Muon for hidden matrices, AdamW at 0.15 of its rate for the rest, as in MuLoCo."""
    matrices = [p for place, p in enumerate(parameters) if place in hidden]
    rest = [p for place, p in enumerate(parameters) if place not in hidden]
    first = torch.optim.Muon(matrices, rate, momentum=momentum, nesterov=False, weight_decay=0.01)
    return [first, torch.optim.AdamW(rest, 0.15 * rate, betas=(0.9, 0.95), weight_decay=0.01)]


INNER: dict[str, Callable[..., list[Optimizer]]] = {
    "SGD": sgd,
    "plain SGD": partial(sgd, momentum=0.0),
    "AdamW": adam,
    "AdamW, 0.8": partial(adam, beta=0.8),
    "AdamW, 0.6": partial(adam, beta=0.6),
    "Muon": muon,
}
"""Optimizers by name; a number is another first momentum than AdamW's usual 0.9."""


def inner_of(name: str, problem: Problem, **momentum: float) -> Inner:
    """The optimizer of a name, with another momentum if one is given."""
    also = {"hidden": problem.hidden} if name == "Muon" else {}
    return partial(INNER[name], **momentum, **also)


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        make: the algorithm at a peak rate.
        inner: the optimizer's name.
        accumulate: batches for one optimizer step.
    """

    make: Make
    inner: str
    accumulate: int = 1


def _of(algorithm: Algorithm) -> Make:
    return lambda rate: algorithm


POST_LOCAL = PostLocal(12, 24)
"""Averaged gradients while the rate warms up, a twentieth of all steps: 9 % of DDP's bytes together."""
STAGES = Stages({0: 4, 24: 12, 120: 24})
RAMP = Ramp({12: 0.0, 60: 0.9, 180: 0.9, 240: 0.5})


def qsr(rate: float) -> QSR:
    """Periods from 4 steps at the peak on, which makes as many syncs of a cosine as a period of 12."""
    return QSR(base=4, coefficient=2.4 * rate, warmup_steps=12)


MOMENTUM_ROWS: dict[str, Make] = {
    "ddp": _of(AllReduce()),
    "local_sgd": _of(LocalSGD(12)),
    "slowmo": _of(SlowMo(sync_every=12)),
    "local_sgd, post-local": _of(LocalSGD(POST_LOCAL)),
    "local_sgd, QSR": lambda rate: LocalSGD(qsr(rate)),
    "slowmo, post-local": _of(SlowMo(sync_every=POST_LOCAL)),
    "slowmo, QSR": lambda rate: SlowMo(sync_every=qsr(rate)),
    "bmuf": _of(BMUF(12)),
    "sgp": _of(PRESETS["sgp"]),
    "slowmo_sgp": _of(PRESETS["slowmo_sgp"]),
    "qprsgd": _of(QPRSGD()),
    "squarm_sgd": _of(PRESETS["squarm_sgd"]),
    "slowmo, 4 bits": _of(SlowMo(sync_every=12, compressor=QSGD(4, norm="max", bucket=512))),
    "local_sgd, every 48": _of(LocalSGD(48)),
    "slowmo, every 48": _of(SlowMo(sync_every=48)),
    "local_sgd, every 4": _of(LocalSGD(4)),
    "slowmo, every 4": _of(SlowMo(sync_every=4)),
    "local_sgd, every 24": _of(LocalSGD(24)),
    "slowmo, every 24": _of(SlowMo(sync_every=24)),
    "local_sgd, stages": _of(LocalSGD(STAGES)),
    "slowmo, overlap 4": _of(SlowMo(sync_every=12, overlap=4)),
    "dpsgd": _of(PRESETS["dpsgd"]),
    "osgp": _of(PRESETS["osgp"]),
    "choco_sgd": _of(PRESETS["choco_sgd"]),
    "qprsgd_gossip": _of(PRESETS["qprsgd_gossip"]),
    "slowmo_osgp": _of(PRESETS["slowmo_osgp"]),
    "slowmo_dpsgd": _of(PRESETS["slowmo_dpsgd"]),
}
"""Over SGD with momentum on images, over AdamW on text, as plain SGD does not train transformers."""
ADAM_ROWS: dict[str, Make] = {
    "diloco": _of(DiLoCo(12)),
    "sparse_loco": _of(SparseLoCo(12)),
    "noloco": _of(NoLoCo(12)),
    "des_loc": _of(DESLOC(12)),
    "pier": _of(DiLoCo(POST_LOCAL, outer_momentum=RAMP)),
    "diloco, 2 bits": _of(DiLoCo(12, compressor=Bins(2))),
    "diloco, every 48": _of(DiLoCo(48)),
    "apmsqueeze": _of(APMSqueeze(warmup_steps=48)),
}
"""Over AdamW everywhere."""
BOTH_ROWS: dict[str, Make] = {
    "ddp, AdamW": _of(AllReduce()),
    "local Adam": _of(LocalSGD(12)),
    "slowmo, AdamW": _of(SlowMo(sync_every=12)),
    "local Adam, QSR": lambda rate: LocalSGD(qsr(rate)),
}
"""Over AdamW, and above over SGD: on text they would be the same twice."""
OTHER_ROWS = {
    "sparq_sgd": Row(_of(PRESETS["sparq_sgd"]), "plain SGD"),
    "sketched_sgd": Row(_of(SketchedSGD(uncompressed_below=1000)), "plain SGD"),
    "sensed_sgd": Row(_of(SensedSGD(uncompressed_below=1000)), "plain SGD"),
    "muloco": Row(_of(DiLoCo(12, outer_momentum=0.6)), "Muon"),
    "ddp, Muon": Row(_of(AllReduce()), "Muon"),
}


def _rows(momentum: str, adam: dict[str, Make]) -> dict[str, Row]:
    """All of them, with an optimizer for those that have one with momentum."""
    return {
        **{name: Row(make, momentum) for name, make in MOMENTUM_ROWS.items()},
        **{name: Row(make, "AdamW") for name, make in adam.items()},
        "ddp, 12 batches a step": Row(_of(AllReduce()), momentum, accumulate=12),
        **OTHER_ROWS,
    }


ADAMS = ("AdamW", "AdamW, 0.8", "AdamW, 0.6")
SLOW_MOMENTA: dict[str, Make] = {
    "local_sgd": _of(LocalSGD(12)),
    "slowmo 0.2": _of(SlowMo(sync_every=12, slow_momentum=0.2)),
    "slowmo 0.5": _of(SlowMo(sync_every=12, slow_momentum=0.5)),
    "slowmo 0.5, reset": _of(SlowMo(sync_every=12, slow_momentum=0.5, inner_buffers="reset")),
}
MOMENTUM_ON_MOMENTUM = {"ddp": Row(_of(AllReduce()), "AdamW")} | {
    f"{name} over {inner}": Row(make, inner) for inner in ADAMS for name, make in SLOW_MOMENTA.items()
}
"""Every slow momentum over every first momentum of AdamW, and ``ddp``, to whose bytes the table compares."""


@dataclass(frozen=True)
class Table:
    """A problem, and what is trained on it.

    Attributes:
        problem: made of the path of its data.
        rows: by name.
        rates: from which the search begins, by the optimizer's name.
    """

    problem: Callable[[str], Problem]
    rows: Mapping[str, Row]
    rates: Mapping[str, float]


TABLES = {
    "images": Table(
        Images, _rows("SGD", ADAM_ROWS | BOTH_ROWS), {"SGD": 0.04, "plain SGD": 0.4, "AdamW": 0.008, "Muon": 0.02}
    ),
    "text": Table(Text, _rows("AdamW", ADAM_ROWS), {"plain SGD": 0.4, "AdamW": 0.008, "Muon": 0.04}),
    "momenta": Table(Text, MOMENTUM_ON_MOMENTUM, dict.fromkeys(ADAMS, 0.016)),
}
"""By the name of the task."""
