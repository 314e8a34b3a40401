"""Every preset on one task, with tuned rates, at equal steps: a rating over bytes.

    python -m benchmarks.side_by_side --data cifar10.tar.xz            # tunes, trains and writes; goes on where it was
    python -m benchmarks.side_by_side --data cifar10.tar.xz --rows '^ddp|slowmo' --seeds 1,2,3,4,5
    python -m benchmarks.side_by_side --task text --data any.txt
    python -m benchmarks.side_by_side --task momenta --data any.txt    # slow momenta over three momenta of AdamW

Eight workers with batches of 8, 240 steps (:mod:`benchmarks.stacked`): CIFAR-10 and a network of 20,754 parameters, or
the characters of a text and a GPT of about 16,000 (:mod:`benchmarks.problems`). Each row's learning rate is searched on
held-out training data with one seed: half, once and twice that of its optimizer, and on from the best while that is the
last on its side, up to five. Then the best is trained with every seed of ``--seeds`` and tested. Presets made for long
runs (periods of 30 to 500 steps) have periods of 12 or 48 here, and at the same period all send the same. ``--momenta``
searches a second number, too: a row's own outer momentum, or that of its optimizer if it has none.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path

import torch

from benchmarks import frontier
from benchmarks.problems import Problem
from benchmarks.rows import TABLES, Row, Table, inner_of
from benchmarks.stacked import Inner, Training, train
from lightning_slowmo import Algorithm

TUNING_SEED = 101
MOST_RATES = 5

MOMENTA = {"outer_momentum": (0.3, 0.6, 0.9), "slow_momentum": (0.2, 0.5, 0.7), "inner": (0.8, 0.9, 0.95)}
"""What ``--momenta`` tries of a row's outer loop, or of its optimizer's first momentum if it has no outer loop."""


@dataclass
class Runs:
    """Finished runs in a file, so that a call goes on where the last one was.

    Attributes:
        path: of the file.
        table: what is trained.
        data: path of the data.
        training: of all runs.
    """

    path: Path
    table: Table
    data: str
    training: Training

    def __post_init__(self) -> None:
        self.problem = self.table.problem(self.data)
        self.known: dict[str, list[float | None]] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def run(self, name: str, rate: float, seed: int, held_out: bool, momentum: float | None = None) -> float | None:
        """Rating of one run, trained unless it is known; None if it diverged."""
        also = "" if momentum is None else f" | momentum {momentum:g}"
        key = f"{name} | rate {rate:g}{also} | seed {seed}{' | held out' if held_out else ''}"
        if key not in self.known:
            row = self.table.rows[name]
            algorithm, inner = configured(row, self.problem, rate, momentum)
            outcome = train(self.problem, self.training, algorithm, inner, rate, seed, held_out, row.accumulate)
            self.known[key] = [value if isfinite(value) else None for value in outcome]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps(self.known, indent=0) + "\n")
            part.replace(self.path)
            print(f"{key}: {outcome.rating:.{self.problem.measure.digits}f}, {outcome.mb:.4g} MB", flush=True)
        return self.known[key][0]

    def score(self, name: str, rate: float, momentum: float | None = None) -> float:
        """On the held-out examples, higher is better; minus infinity if it diverged."""
        return self.problem.measure.merit(self.run(name, rate, TUNING_SEED, True, momentum))


def configured(row: Row, problem: Problem, rate: float, momentum: float | None) -> tuple[Algorithm, Inner]:
    """A row's algorithm and optimizer, with another momentum where it has one."""
    algorithm = row.make(rate)
    if momentum is None:
        return algorithm, inner_of(row.inner, problem)
    name = outer_momentum_of(algorithm)
    if name != "inner":
        return replace(algorithm, **{name: momentum}), inner_of(row.inner, problem)  # type: ignore[type-var]
    return algorithm, inner_of(row.inner, problem, **{"beta" if row.inner == "AdamW" else "momentum": momentum})


def outer_momentum_of(algorithm: Algorithm) -> str:
    """Which field holds the momentum that ``--momenta`` searches."""
    return next((name for name in ("slow_momentum", "outer_momentum") if hasattr(algorithm, name)), "inner")


def search(runs: Runs, name: str, momentum: float | None = None) -> dict[float, float]:
    """Scores by rate: three rates, and on from the best while it is the last on its side."""
    row = runs.table.rows[name]
    centre = runs.table.rates[row.inner] * row.accumulate**0.5
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
        choices = MOMENTA[outer_momentum_of(runs.table.rows[name].make(1.0))]
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
    parser.add_argument("--task", choices=TABLES, default="images")
    parser.add_argument(
        "--data", required=True, help="torchvision's CIFAR-10, or a folder or tar of it; or a text file"
    )
    parser.add_argument("--rows", help="only those that match this regular expression")
    parser.add_argument("--seeds", default="1,2,3", help="of the final runs; nothing: tune alone")
    parser.add_argument("--momenta", action="store_true", help="search a momentum, too: nine runs a row and more")
    parser.add_argument("--out", type=Path, help="folder; by default outputs/side_by_side and the task's name")
    parser.add_argument("--steps", type=int, default=240, help="optimizer steps")
    parser.add_argument("--report", action="store_true", help="train nothing, and write what there is")
    a = parser.parse_args(arguments)
    torch.set_num_threads(1)
    out = a.out or Path("outputs") / f"side_by_side_{a.task}"
    runs = Runs(out / "runs.json", TABLES[a.task], a.data, Training(steps=a.steps))
    if not a.report:
        names = [name for name in runs.table.rows if a.rows is None or re.search(a.rows, name)]
        choices = {name: tuned(runs, name, a.momenta) for name in names}
        for seed in filter(None, a.seeds.split(",")):
            for name, (rate, momentum) in choices.items():
                runs.run(name, rate, int(seed), False, momentum)
    inner = {name: row.inner for name, row in runs.table.rows.items()}
    frontier.write(runs.known, inner, runs.problem.measure, out)


if __name__ == "__main__":
    main()
