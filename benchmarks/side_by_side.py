"""Every preset on one task, with tuned rates, at equal steps: accuracy over bytes.

    python -m benchmarks.side_by_side --data cifar10.tar.xz            # tunes, trains and writes; goes on where it was
    python -m benchmarks.side_by_side --data cifar10.tar.xz --rows '^ddp|slowmo' --seeds 1,2,3,4,5

CIFAR-10, eight workers with batches of 8, a network of 20,754 parameters, 240 steps (:mod:`benchmarks.stacked`). Each
row's learning rate is searched on held-out training images with one seed: half, once and twice that of its optimizer,
and on from the best while that is the last on its side, up to five. Then the best is trained with every seed of
``--seeds`` and tested. Presets made for long runs (periods of 30 to 500 steps) have periods of 12 or 48 here, and at
the same period all send the same. ``--momenta`` searches a second number, too: a row's own outer momentum, or that of
its optimizer if it has none.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf, isfinite
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks import frontier
from benchmarks.stacked import Inner, Task, train
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

TUNING_SEED = 101
MOST_RATES = 5

Make = Callable[[float], Algorithm]
"""An algorithm, given the peak learning rate: QSR's coefficient is in units of it."""


def sgd(parameters: Sequence[nn.Parameter], rate: float, momentum: float = 0.9) -> list[Optimizer]:
    """With Nesterov momentum."""
    nesterov = momentum > 0
    return [torch.optim.SGD(parameters, rate, momentum, nesterov=nesterov, weight_decay=5e-4, fused=True)]


def adam(parameters: Sequence[nn.Parameter], rate: float, beta: float = 0.9) -> list[Optimizer]:
    """AdamW."""
    return [torch.optim.AdamW(parameters, rate, betas=(beta, 0.999), weight_decay=0.01, fused=True)]


def muon(parameters: Sequence[nn.Parameter], rate: float, momentum: float = 0.95) -> list[Optimizer]:
    """Muon for matrices but the last, AdamW at 0.15 of its rate for that and the rest, as in MuLoCo."""
    matrices = [p for p in parameters if p.dim() == 2][:-1]
    rest = [p for p in parameters if not any(p is matrix for matrix in matrices)]
    first = torch.optim.Muon(matrices, rate, momentum=momentum, nesterov=False, weight_decay=0.01)
    return [first, torch.optim.AdamW(rest, 0.15 * rate, betas=(0.9, 0.95), weight_decay=0.01)]


INNER: dict[str, tuple[Inner, float]] = {
    "SGD": (sgd, 0.04),
    "plain SGD": (partial(sgd, momentum=0.0), 0.4),
    "AdamW": (adam, 0.008),
    "Muon": (muon, 0.02),
}
"""Optimizers by name, and the rate from which the search for each row begins."""


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        make: the algorithm at a peak rate.
        inner: the optimizer's name.
        accumulate: batches for one optimizer step.
    """

    make: Make
    inner: str = "SGD"
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


SGD_ROWS: dict[str, Make] = {
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
ADAM_ROWS: dict[str, Make] = {
    "ddp, AdamW": _of(AllReduce()),
    "local Adam": _of(LocalSGD(12)),
    "diloco": _of(DiLoCo(12)),
    "sparse_loco": _of(SparseLoCo(12)),
    "noloco": _of(NoLoCo(12)),
    "des_loc": _of(DESLOC(12)),
    "pier": _of(DiLoCo(POST_LOCAL, outer_momentum=RAMP)),
    "slowmo, AdamW": _of(SlowMo(sync_every=12)),
    "diloco, 2 bits": _of(DiLoCo(12, compressor=Bins(2))),
    "diloco, every 48": _of(DiLoCo(48)),
    "local Adam, QSR": lambda rate: LocalSGD(qsr(rate)),
    "apmsqueeze": _of(APMSqueeze(warmup_steps=48)),
}
ROWS = {
    **{name: Row(make) for name, make in SGD_ROWS.items()},
    **{name: Row(make, "AdamW") for name, make in ADAM_ROWS.items()},
    "ddp, 12 batches a step": Row(_of(AllReduce()), accumulate=12),
    "sparq_sgd": Row(_of(PRESETS["sparq_sgd"]), "plain SGD"),
    "sketched_sgd": Row(_of(SketchedSGD(uncompressed_below=1000)), "plain SGD"),
    "sensed_sgd": Row(_of(SensedSGD(uncompressed_below=1000)), "plain SGD"),
    "muloco": Row(_of(DiLoCo(12, outer_momentum=0.6)), "Muon"),
    "ddp, Muon": Row(_of(AllReduce()), "Muon"),
}
"""Every preset, and the schedules and compressors that go with some."""

MOMENTA = {"outer_momentum": (0.3, 0.6, 0.9), "slow_momentum": (0.2, 0.5, 0.7), "inner": (0.8, 0.9, 0.95)}
"""What ``--momenta`` tries of a row's outer loop, or of its optimizer's first momentum if it has no outer loop."""


@dataclass
class Runs:
    """Finished runs in a file, so that a call goes on where the last one was.

    Attributes:
        path: of the file.
        task: of all runs.
    """

    path: Path
    task: Task

    def __post_init__(self) -> None:
        self.known: dict[str, list[float | None]] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def run(self, name: str, rate: float, seed: int, held_out: bool, momentum: float | None = None) -> float | None:
        """Accuracy of one run, trained unless it is known; None if it diverged."""
        also = "" if momentum is None else f" | momentum {momentum:g}"
        key = f"{name} | rate {rate:g}{also} | seed {seed}{' | held out' if held_out else ''}"
        if key not in self.known:
            algorithm, inner = configured(ROWS[name], rate, momentum)
            outcome = train(self.task, algorithm, inner, rate, seed, held_out, ROWS[name].accumulate)
            self.known[key] = [value if isfinite(value) else None for value in outcome]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps(self.known, indent=0) + "\n")
            part.replace(self.path)
            print(f"{key}: {outcome.accuracy:.2f} %, {outcome.mb:.4g} MB", flush=True)
        return self.known[key][0]

    def score(self, name: str, rate: float, momentum: float | None = None) -> float:
        """On the held-out images; minus infinity if it diverged."""
        value = self.run(name, rate, TUNING_SEED, True, momentum)
        return -inf if value is None else value


def configured(row: Row, rate: float, momentum: float | None) -> tuple[Algorithm, Inner]:
    """A row's algorithm and optimizer, with another momentum where it has one."""
    algorithm, inner = row.make(rate), INNER[row.inner][0]
    if momentum is None:
        return algorithm, inner
    name = outer_momentum_of(algorithm)
    if name != "inner":
        return replace(algorithm, **{name: momentum}), inner  # type: ignore[type-var]
    return algorithm, partial(inner, **{"beta" if row.inner == "AdamW" else "momentum": momentum})


def outer_momentum_of(algorithm: Algorithm) -> str:
    """Which field holds the momentum that ``--momenta`` searches."""
    return next((name for name in ("slow_momentum", "outer_momentum") if hasattr(algorithm, name)), "inner")


def search(runs: Runs, name: str, momentum: float | None = None) -> dict[float, float]:
    """Scores by rate: three rates, and on from the best while it is the last on its side."""
    centre = INNER[ROWS[name].inner][1] * ROWS[name].accumulate ** 0.5
    scores = {rate: runs.score(name, rate, momentum) for rate in (centre / 2, centre, 2 * centre)}
    while len(scores) < MOST_RATES:
        best = max(scores, key=lambda rate: scores[rate])
        if best not in (min(scores), max(scores)):
            break
        rate = best / 2 if best == min(scores) else 2 * best
        scores[rate] = runs.score(name, rate, momentum)
    return scores


def tuned(runs: Runs, name: str, momenta: bool) -> tuple[float, float | None]:
    """The best rate, and momentum if that is searched."""
    choices: Sequence[float | None] = (None,)
    if momenta:
        choices = MOMENTA[outer_momentum_of(ROWS[name].make(1.0))]
    scores = {(rate, momentum): score for momentum in choices for rate, score in search(runs, name, momentum).items()}
    return max(scores, key=lambda choice: scores[choice])


def main(arguments: Sequence[str] | None = None) -> None:
    """Tune, train, and write.

    Args:
        arguments: of the command line.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.side_by_side",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", required=True, help="CIFAR-10: torchvision's files, or a folder or tar of images")
    parser.add_argument("--rows", help="only those that match this regular expression")
    parser.add_argument("--seeds", default="1,2,3", help="of the final runs; nothing: tune alone")
    parser.add_argument("--momenta", action="store_true", help="search a momentum, too: nine runs a row and more")
    parser.add_argument("--out", type=Path, default=Path("outputs/side_by_side"))
    parser.add_argument("--steps", type=int, default=240, help="optimizer steps")
    parser.add_argument("--report", action="store_true", help="train nothing, and write what there is")
    a = parser.parse_args(arguments)
    torch.set_num_threads(1)
    runs = Runs(a.out / "runs.json", Task(a.data, steps=a.steps))
    if not a.report:
        names = [name for name in ROWS if a.rows is None or re.search(a.rows, name)]
        choices = {name: tuned(runs, name, a.momenta) for name in names}
        for seed in filter(None, a.seeds.split(",")):
            for name, (rate, momentum) in choices.items():
                runs.run(name, rate, int(seed), False, momentum)
    frontier.write(runs.known, {name: row.inner for name, row in ROWS.items()}, a.out)


if __name__ == "__main__":
    main()
