"""Runs all rows of a table with all seeds, and leaves out what has finished already.

    python -m recipes.reproduce --list
    python -m recipes.reproduce cifar10_small data.root=data/cifar10
    python -m recipes.reproduce cifar10_small --launch simulated --workers 32 --parallel 2 data.root=data/cifar10
    python -m recipes.reproduce cifar10 --dry-run --launch torchrun --rendezvous node0:29500 data.root=/data/cifar10
    python -m recipes.reproduce imagenet --launch slurm --sbatch=--partition=long --sbatch=--gpus-per-node=8

``local`` runs on this machine with the processes that the experiment says, one run after another, and reports at the
end. ``simulated`` plays all workers of a run in one process on one device. ``torchrun`` is to be called on every
machine at about the same time, in a folder that all of them see. ``slurm`` queues a job for each run; called once more
when they have ended, it queues what failed, or reports. Where the machines are not the paper's, give --nodes and
--processes. Further arguments go to ``recipes.train``.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from recipes.report.__main__ import main as report
from recipes.reproduce.launchers import Job, Launcher, Local, Simulated, Slurm, Torchrun, launch
from recipes.reproduce.pool import train_all
from recipes.reproduce.tables import TABLES, Row, chosen, rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Start what is missing.

    Args:
        arguments: of the command line.

    Raises:
        SystemExit: with 1 if a run failed.
    """
    parser = argparse.ArgumentParser(
        prog="python -m recipes.reproduce", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", nargs="?", choices=TABLES, metavar="table", help="its name, see --list")
    parser.add_argument("overrides", nargs="*", help="of the configuration of every run, such as data.root=...")
    parser.add_argument("--list", action="store_true", help="say which tables there are")
    parser.add_argument("--launch", choices=("local", "simulated", "torchrun", "slurm"), default="local")
    parser.add_argument("--nodes", type=int, help="machines of each run; the experiment's if left out")
    parser.add_argument("--processes", type=int, help="on each machine; the experiment's if left out")
    parser.add_argument("--workers", default="auto", help="simulated ones of each run; the experiment's if left out")
    parser.add_argument("--parallel", type=int, default=1, metavar="RUNS", help="simulated runs at a time")
    parser.add_argument("--tuned", type=Path, help="tuned.json of recipes.tune: what each row is trained with")
    parser.add_argument("--rendezvous", default="", help="HOST:PORT of one of the machines, for torchrun")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="an option for sbatch, repeatable"
    )
    parser.add_argument("--rows", help="only those that match one of these regular expressions, with commas between")
    parser.add_argument("--seeds", help="such as 1,2; the table's if left out")
    parser.add_argument("--folder", type=Path, default=Path("outputs/reproduce"), help="for all runs")
    parser.add_argument("--dry-run", action="store_true", help="print the commands that are missing")
    a = parser.parse_intermixed_args(arguments)
    if a.list or a.table is None:
        width = max(map(len, TABLES))
        for name, table in TABLES.items():
            print(f"{name:{width}}  {table.title}; seeds {', '.join(map(str, table.seeds))}")
        return
    if a.launch == "torchrun" and not a.rendezvous:
        parser.error("--launch torchrun needs --rendezvous HOST:PORT, the same on every machine.")
    table, folder = TABLES[a.table], a.folder / a.table
    seeds = [int(seed) for seed in a.seeds.split(",")] if a.seeds else table.seeds
    wanted = chosen(table, a.rows)
    if not wanted:
        parser.error(f"--rows {a.rows}: no name matches that; they are {', '.join(row.name for row in rows(table))}.")
    tuned = json.loads(a.tuned.read_text()) if a.tuned else {}
    missing = [row.name for row in wanted if a.tuned and row.name not in tuned]
    if missing:
        parser.error(f"{a.tuned} has no choice for {', '.join(missing)}. Tune them too, or leave them out with --rows.")
    jobs = [
        (row, job(row, seed, folder, [*tuned.get(row.name, {}).get("overrides", ()), *a.overrides]))
        for row in wanted
        for seed in seeds
    ]
    failed = []
    if a.launch == "simulated" and a.parallel > 1 and not a.dry_run:
        plays = Simulated(a.workers).overrides
        failed = train_all([replace(each, overrides=(*each.overrides, *plays)) for _, each in jobs], a.parallel)
    for number, (row, each) in enumerate(jobs, start=1):
        if each.name in failed:
            continue
        print(f"# {number}/{len(jobs)} {each.name}", flush=True)
        if not launch(each, launcher(a, row), a.dry_run):
            failed.append(each.name)
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}. The same call again runs what has not finished.")
    if all(each.done for _, each in jobs) and not a.dry_run:
        if a.launch == "torchrun":  # all machines come here, and one report is enough
            print(f"All have finished: python -m recipes.report {folder} --title {shlex.quote(table.title)}")
        else:
            report([str(folder), "--title", table.title])


def job(row: Row, seed: int, folder: Path, overrides: Sequence[str]) -> Job:
    """A row's run with a seed."""
    given = (*row.overrides, f"seed={seed}", *overrides)
    return Job(f"{row.name}_seed_{seed}", folder / row.name / f"seed_{seed}", given)


def launcher(options: argparse.Namespace, row: Row) -> Launcher:
    """How a row's runs are started, on as many machines as the options or the experiment say.

    Raises:
        SystemExit: if neither says how many processes.
    """
    if options.launch == "simulated":
        return Simulated(options.workers)
    if options.launch == "local":
        sizes = {"trainer.num_nodes": options.nodes, "trainer.devices": options.processes}
        return Local(tuple(f"{name}={size}" for name, size in sizes.items() if size is not None))
    nodes, processes = options.nodes or row.nodes, options.processes or row.processes
    if processes is None:
        sys.exit(f"{row.name} takes all GPUs of a machine: say with --processes how many those are.")
    if options.launch == "torchrun":
        return Torchrun(nodes, processes, options.rendezvous)
    return Slurm(nodes, processes, tuple(options.sbatch))


if __name__ == "__main__":
    main()
