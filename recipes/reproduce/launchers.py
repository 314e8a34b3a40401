"""How a run is started: on this machine, on several with torchrun, or by SLURM."""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from recipes.record import FILE


@dataclass(frozen=True)
class Job:
    """A run that is wanted.

    Attributes:
        name: of the table, row and seed.
        folder: where it writes.
        overrides: what the command line of ``recipes.train`` gets.
    """

    name: str
    folder: Path
    overrides: tuple[str, ...]

    @property
    def done(self) -> bool:
        """Whether it has finished, some time."""
        return (self.folder / FILE).is_file()

    def train(self, *more: str) -> list[str]:
        """The module to run and its arguments."""
        return ["-m", "recipes.train", *self.overrides, *more, f"hydra.run.dir={self.folder}"]


@dataclass(frozen=True)
class Local:
    """On this machine, with the processes that the experiment's trainer names.

    Attributes:
        overrides: of the configuration, if it shall be others.
    """

    overrides: tuple[str, ...] = ()

    def command(self, job: Job) -> list[str]:
        """What to execute."""
        return [sys.executable, *job.train(*self.overrides)]


@dataclass(frozen=True)
class Simulated:
    """In one process that plays all workers, on one device.

    Attributes:
        workers: how many; ``auto`` for as many as the experiment has processes.
    """

    workers: str

    def command(self, job: Job) -> list[str]:
        """What to execute."""
        return [sys.executable, *job.train(*self.overrides)]

    @property
    def overrides(self) -> tuple[str, ...]:
        """What makes a run simulated."""
        return ("trainer=simulated", f"trainer.workers={self.workers}")


@dataclass(frozen=True)
class Torchrun:
    """On several machines: the same call on each of them, in folders that they share.

    Attributes:
        nodes: number of machines.
        processes: on each of them.
        rendezvous: host and port of one of them.
    """

    nodes: int
    processes: int
    rendezvous: str

    def command(self, job: Job) -> list[str]:
        """What to execute, on each machine."""
        meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", self.rendezvous, "--rdzv-id", job.name]
        size = ["--nnodes", str(self.nodes), "--nproc-per-node", str(self.processes)]
        trainer = (f"trainer.num_nodes={self.nodes}", f"trainer.devices={self.processes}")
        return [sys.executable, "-m", "torch.distributed.run", *size, *meeting, *job.train(*trainer)]


@dataclass(frozen=True)
class Slurm:
    """As jobs of a cluster; returns when they are queued.

    Attributes:
        nodes: number of machines for each job.
        processes: on each of them.
        options: for sbatch, such as ``--partition=long``.
    """

    nodes: int
    processes: int
    options: tuple[str, ...] = ()

    def command(self, job: Job) -> list[str]:
        """What to execute; sbatch hands the rest to srun, which starts every worker."""
        size = [f"--nodes={self.nodes}", f"--ntasks-per-node={self.processes}"]
        log = ["--output", str(job.folder / "slurm-%j.log"), "--job-name", job.name]
        trainer = (f"trainer.num_nodes={self.nodes}", f"trainer.devices={self.processes}")
        workers = shlex.join(["srun", sys.executable, *job.train(*trainer)])
        return ["sbatch", "--parsable", *size, *log, *self.options, "--wrap", workers]


Launcher = Local | Simulated | Torchrun | Slurm


def launch(job: Job, launcher: Launcher, dry_run: bool = False) -> bool:
    """Start a run if it has not finished.

    Args:
        job: the run.
        launcher: how.
        dry_run: print the command and start nothing.

    Returns:
        False if it failed, or could not be queued.
    """
    if job.done:
        print("# has finished already", flush=True)
        return True
    command = launcher.command(job)
    print(shlex.join(command), flush=True)
    if dry_run:
        return True
    job.folder.mkdir(parents=True, exist_ok=True)  # SLURM writes no log into a folder that is not there
    return subprocess.run(command, check=False).returncode == 0
