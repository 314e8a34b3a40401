r"""Chooses learning rates, slow momentum and the treatment of inner buffers for each row of a table.

    python -m recipes.tune cifar10_small --workers 16 --processes 2 data.root=data/cifar10 trainer.max_epochs=3
    python -m recipes.reproduce cifar10_small --launch simulated --workers 16 \
        --tuned outputs/tune/cifar10_small/tuned.json data.root=data/cifar10

Every row is trained with every choice of the grid that applies to it, on a part of the training images, and rated by
the others. The test images are not looked at. ``tuned.json`` has each row's choice, its
score, the scores of all others, and what the search has cost; ``recipes.reproduce --tuned`` trains the rows with it.
A call that was stopped goes on where it was. Further arguments go to every run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from omegaconf import OmegaConf

from recipes.record import Record
from recipes.reproduce.launchers import Job
from recipes.reproduce.pool import composed, train_all
from recipes.reproduce.tables import TABLES, Row, chosen

GRID = (
    "optimizer.lr=0.05,0.1,0.2,0.4",
    "strategy.algorithm.slow_momentum=0.3,0.5,0.7",
    "strategy.algorithm.inner_buffers=reset,maintain",
)
"""What is tried unless ``--grid`` says otherwise."""


@dataclass(frozen=True)
class Trial:
    """A row with one choice of the grid, and the runs that rate it."""

    row: Row
    choice: tuple[str, ...]
    jobs: tuple[Job, ...]

    @property
    def score(self) -> float:
        """Mean over the seeds; minus infinity if a run failed or its value is not a number."""
        if not all(job.done for job in self.jobs):
            return float("-inf")
        records = [Record.read(job.folder) for job in self.jobs]
        value = fmean(record.value if record.mode == "max" else -record.value for record in records)
        return value if value == value else float("-inf")


def trials(row: Row, grid: Sequence[str], seeds: Sequence[int], folder: Path, overrides: Sequence[str]) -> list[Trial]:
    """Every choice of the grid for a row; what its configuration does not have is left out.

    Args:
        row: of a table.
        grid: ``key=value,value,...``, each.
        seeds: with which every choice is trained.
        folder: for the runs.
        overrides: of all runs.
    """
    config = composed(Job("", folder, (*row.overrides, *overrides)))
    axes = []
    for axis in grid:
        key, _, values = axis.partition("=")
        if OmegaConf.select(config, key, throw_on_missing=False) is not None:
            axes.append([f"{key}={value}" for value in values.split(",")])
    found = []
    for choice in product(*axes):
        parts = (each.partition("=") for each in choice)
        name = "_".join(f"{key.rpartition('.')[2]}_{value}" for key, _, value in parts) or "as_it_is"
        jobs = tuple(
            Job(
                f"{row.name} {name} seed {seed}",
                folder / row.name / name / f"seed_{seed}",
                (*row.overrides, *overrides, *choice, f"seed={seed}"),
            )
            for seed in seeds
        )
        found.append(Trial(row, choice, jobs))
    return found


def summary(found: Sequence[Trial]) -> dict[str, Any]:
    """The best choice of each row, with all scores and the cost of the search."""
    best_of: dict[str, Any] = {}
    for name in dict.fromkeys(trial.row.name for trial in found):
        own = sorted((trial for trial in found if trial.row.name == name), key=lambda trial: -trial.score)
        records = [Record.read(job.folder) for trial in own for job in trial.jobs if job.done]
        best_of[name] = {
            "overrides": list(own[0].choice),
            "score": own[0].score,
            "scores": {" ".join(trial.choice): trial.score for trial in own},
            "runs": len(records),
            "seconds": round(sum(record.seconds for record in records), 1),
        }
    return best_of


def main(arguments: Sequence[str] | None = None) -> None:
    """Search, and write ``tuned.json``.

    Args:
        arguments: of the command line.

    Raises:
        SystemExit: if every choice of a row failed.
    """
    parser = argparse.ArgumentParser(
        prog="python -m recipes.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=TABLES, metavar="table", help="see python -m recipes.reproduce --list")
    parser.add_argument("overrides", nargs="*", help="of the configuration of every run")
    parser.add_argument("--rows", help="only those that match one of these regular expressions, with commas between")
    parser.add_argument("--grid", action="append", metavar="KEY=VALUES", help=f"repeatable; else {' '.join(GRID)}")
    parser.add_argument("--workers", default="auto", help="simulated ones; as many as the experiment says if left out")
    parser.add_argument("--seeds", default="101", help="that the final runs should not have")
    parser.add_argument("--held-out", type=int, default=5000, help="training images that rate a choice")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time")
    parser.add_argument("--folder", type=Path, default=Path("outputs/tune"))
    a = parser.parse_intermixed_args(arguments)
    folder = a.folder / a.table
    common = (
        "trainer=simulated",
        f"trainer.workers={a.workers}",
        f"data.held_out={a.held_out}",
        "metric=val/accuracy",
        "callbacks=default",
        *a.overrides,
    )
    wanted = chosen(TABLES[a.table], a.rows)
    if not wanted:
        parser.error(f"--rows {a.rows}: no name matches that.")
    seeds = [int(seed) for seed in a.seeds.split(",")]
    found = [trial for row in wanted for trial in trials(row, a.grid or GRID, seeds, folder, common)]
    try:
        train_all([job for trial in found for job in trial.jobs], a.processes)
    finally:  # also of a search that is stopped there is something to see
        best_of = summary(found)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tuned.json").write_text(json.dumps(best_of, indent=2) + "\n")
        for name, best in best_of.items():
            print(f"{name:32} {best['score']:7.2f}  {' '.join(best['overrides'])}  ({best['runs']} runs)")
    if any(best["score"] == float("-inf") for best in best_of.values()):
        raise SystemExit("No choice of some row could be trained to its end.")


if __name__ == "__main__":
    main()
