"""Faults drawn at random: ``python -m tests.faults.campaign --seed 1 --count 25``, or ``make faults``.

Each scenario draws an algorithm, a number of workers, and a fault with its victim and moment, and runs it through the
real Trainer on gloo. What must hold, whatever is drawn: every process ends in time; workers that reach the end have
equal models; those who cannot go on raise an error that names the cause; the newest checkpoint resumes. Whatever does
not hold is printed as a finding, with the line that draws the same scenario again.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_slowmo import (
    BMUF,
    DESLOC,
    PRESETS,
    QSR,
    AllReduce,
    DiLoCo,
    Gossip,
    LocalSGD,
    NoLoCo,
    PostLocal,
    SlowMo,
    SlowMoStrategy,
    SparseLoCo,
)
from lightning_slowmo.algorithms import Algorithm
from tests.harness import WorkerFailed, run_trainers
from tests.trainer.models import Regression, all_finite, data, numbers, trainer

BATCHES = 8
"""Batches of an epoch, each of four examples."""

EPOCHS = 3

LIMIT = 60.0
"""Seconds after which every process must have ended; a machine that is busy with other things may need more."""

ALGORITHMS: dict[str, Algorithm | str] = {
    "local SGD": LocalSGD(4),
    "local SGD, fragments": LocalSGD(4, overlap=1, fragments=2),
    "SlowMo": SlowMo(sync_every=4),
    "SlowMo, overlap": SlowMo(sync_every=4, overlap=2),
    "SlowMo over SGP": SlowMo(Gossip(), sync_every=8),
    "BMUF": BMUF(4),
    "DiLoCo": DiLoCo(4),
    "DiLoCo, streaming": DiLoCo(4, overlap=1, fragments=2),
    "AllReduce": AllReduce(),
    "SGP": Gossip(),
    "OSGP": Gossip(overlap=1),
    "SlowMo over OSGP": SlowMo(Gossip(overlap=1), sync_every=8),
    "SlowMo over D-PSGD": SlowMo(PRESETS["dpsgd"], sync_every=8),
    "SparseLoCo": SparseLoCo(4),
    "NoLoCo": NoLoCo(4),
    "DES-LOC": DESLOC(4, 8, 12),
    "local SGD after all-reduce": LocalSGD(PostLocal(start=6, every=4)),
    "SlowMo, quadratic rule": SlowMo(sync_every=QSR(base=3)),
} | {
    name: name
    for name in (
        "dpsgd",
        "qprsgd",
        "qprsgd_gossip",
        "choco_sgd",
        "squarm_sgd",
        "sparq_sgd",
        "apmsqueeze",
        "sketched_sgd",
        "sensed_sgd",
    )
}
"""What is trained; those with a period shorter than an epoch, so that faults meet syncs."""

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "apmsqueeze": {"adam": True},
    "DES-LOC": {"adam": True},
    "sketched_sgd": {},
    "sensed_sgd": {},
}
"""The optimizer where it cannot be SGD with momentum, as arguments of the model."""

SHARDED = ("SlowMo", "BMUF", "DiLoCo")
"""Algorithms that can shard their slow state."""

TWO_LEVELS = ("local SGD", "SlowMo", "BMUF", "DiLoCo", "SGP")
"""Algorithms that are also tried between nodes of two processes."""

SHARE_GRADIENTS = ("AllReduce", "apmsqueeze", "sketched_sgd", "sensed_sgd")
"""Algorithms that average gradients, at least at first: one worker's NaN reaches all before anybody can be left out."""

FAULTS = (
    "kill",
    "kill in validation",
    "kill at start",
    "freeze",
    "stop and wake",
    "SIGTERM",
    "exception",
    "exception in validation",
    "exception at start",
    "NaN",
    "NaN, skipped",
    "uneven inputs",
    "full disk",
    "damaged checkpoint",
    "unequal start",
)

FREEZE_TIMEOUT = timedelta(seconds=3)
"""``sync_timeout`` where a worker freezes for ever."""

DISK_BYTES = 1024 * 1024
"""Size of the disk that gets full, of which the victim leaves less than the next checkpoint needs."""

DAMAGES = ("flip", "truncate", "remove")


@dataclass(frozen=True)
class Scenario:
    """What is drawn.

    Attributes:
        algorithm: a key of :data:`ALGORITHMS`.
        size: number of processes.
        fault: one of :data:`FAULTS`.
        victim: the rank to which it happens.
        step: after how many batches of the victim; always after the first epoch, so that there is a checkpoint. (Faults
            in validation happen in the second epoch's, and those at the start before anything.)
        per_node: processes of a node, or None for one level.
        shard: whether slow state is sharded.
        damage: one of :data:`DAMAGES`.
        place: which file and which bit, as parts of all.
    """

    algorithm: str
    size: int
    fault: str
    victim: int
    step: int
    per_node: int | None
    shard: bool
    damage: str
    place: tuple[float, float]

    @classmethod
    def drawn(cls, seed: int, index: int) -> Scenario:
        """Scenario number ``index`` of a campaign; does not depend on those before."""
        draw = random.Random(f"{seed}/{index}")
        algorithm, size, fault = draw.choice(list(ALGORITHMS)), draw.randint(2, 4), draw.choice(FAULTS)
        # Inside a node DDP needs even inputs.
        nodes = size == 4 and algorithm in TWO_LEVELS and fault != "uneven inputs" and draw.random() < 0.5
        return cls(
            algorithm,
            size,
            fault,
            draw.randrange(size),
            draw.randint(BATCHES + 1, 2 * BATCHES + 4),
            2 if nodes else None,
            algorithm in SHARDED and draw.random() < 0.4,
            draw.choice(DAMAGES),
            (draw.random(), draw.random()),
        )


class Strike(Callback):
    """The scenario's fault, if it is one that happens while the Trainer runs."""

    def __init__(self, scenario: Scenario, folder: str) -> None:
        self.fault = scenario.fault
        self.victim = scenario.victim
        self.step = scenario.step
        self.place = scenario.place
        self.folder = folder

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        """Strike the victim before it trains."""
        if trainer.global_rank == self.victim and self.fault.endswith(" at start"):
            self._strike(module)

    def on_validation_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        """Strike the victim while the others validate, after the first epoch has been saved."""
        if trainer.global_rank == self.victim and trainer.current_epoch == 1 and self.fault.endswith(" in validation"):
            self._strike(module)

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        """Strike the victim after its step."""
        elsewhere = self.fault.endswith((" at start", " in validation"))
        if trainer.global_rank == self.victim and trainer.global_step == self.step and not elsewhere:
            self._strike(module)

    def _strike(self, module: Any) -> None:
        kind = re.split(" (?:at|in) |,", self.fault)[0]
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif kind == "stop and wake":
            subprocess.Popen(["sh", "-c", f"sleep 2; kill -CONT {os.getpid()}"])
            os.kill(os.getpid(), signal.SIGSTOP)
        elif kind == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
        elif kind == "exception":
            raise ValueError("on purpose")
        elif kind == "NaN":
            with torch.no_grad():
                next(module.parameters()).fill_(float("nan"))
        elif kind == "full disk":
            left = int(self.place[0] * 8 * 1024)  # a checkpoint takes more, so that a part of it is written
            Path(self.folder, "filler").write_bytes(bytes(shutil.disk_usage(self.folder).free - left))


class Validated(Regression):
    """A model with a metric that is reduced in validation."""

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        """Log the loss, averaged over the workers."""
        self.log("val_loss", self.loss(batch), sync_dist=True)


def train(rank: int, scenario: Scenario, folder: str, resume: str | None = None) -> tuple[Any, str, str]:
    """Train on one process.

    Returns:
        The final model if it came to its end, the exception if not, and all warnings.
    """
    logging.disable(logging.WARNING)  # what Lightning says at each start
    uneven = scenario.fault == "uneven inputs" and rank == scenario.victim
    batches = 2 * BATCHES + 3 if uneven else BATCHES
    optimizer = OPTIMIZERS.get(scenario.algorithm, {"momentum": 0.5})
    module = Validated(lr=0.02, seed=1 + rank * (scenario.fault == "unequal start"), **optimizer)
    callbacks: list[Callback] = [ModelCheckpoint(folder, "{epoch}", every_n_epochs=1, save_top_k=-1)]
    if resume is None:
        callbacks.append(Strike(scenario, folder))
    strategy = SlowMoStrategy(
        ALGORITHMS[scenario.algorithm],
        workers_per_node=scenario.per_node,
        shard_slow_state=scenario.shard,
        sync_timeout=FREEZE_TIMEOUT if scenario.fault == "freeze" and resume is None else None,
        on_nonfinite="skip" if scenario.fault == "NaN, skipped" else "raise",
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer(
                scenario.size,
                strategy,
                callbacks=callbacks,
                enable_checkpointing=True,
                max_epochs=EPOCHS + bool(resume),
            ).fit(module, data(rank, 4 * batches), data(rank, 8), ckpt_path=resume)
        except BaseException as error:  # SIGTERMException is a SystemExit
            return None, f"{type(error).__name__}: {error}", ""
    return numbers(module), "", " ".join(str(warning.message) for warning in caught)


# What must hold -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """How a process ended: with a model, with an exception, or killed; and what it warned of."""

    model: Any
    error: str = ""
    warnings: str = ""


def played(run: Callable[..., list], scenario: Scenario, limit: float, *arguments: Any) -> list[Outcome]:
    """The outcomes of one run by rank; a process that died has its exit code as error."""

    def end_the_frozen(processes: list) -> None:
        deadline = time.monotonic() + limit - 5
        for rank, process in enumerate(processes):
            if rank != scenario.victim:
                process.join(deadline - time.monotonic())
        processes[scenario.victim].kill()

    frozen = scenario.fault == "freeze" and len(arguments) == 1
    meanwhile = {"meanwhile": end_the_frozen} if frozen else {}
    ended = run(scenario.size, train, scenario, *arguments, limit=limit, expect_failure=True, **meanwhile)
    return [Outcome(None, outcome) if isinstance(outcome, str) else Outcome(*outcome) for outcome in ended]


def all_ended_equal(outcomes: list[Outcome]) -> list[str]:
    """Complaints unless all came to the end of training with the same finite model."""
    failed = [f"rank {rank} ended with {outcome.error}" for rank, outcome in enumerate(outcomes) if outcome.error]
    if failed:
        return failed
    if any(outcome.model != outcomes[0].model for outcome in outcomes):
        return ["the final models differ"]
    return [] if all_finite(outcomes[0].model) else ["the final model is not finite"]


def all_ended_with(outcomes: dict[int, Outcome], error: str, *causes: str) -> list[str]:
    """Complaints unless these ranks ended with this type of error, and one of the causes in its text."""
    return [
        f"rank {rank} ended with {outcome.error or 'no error'}"
        for rank, outcome in outcomes.items()
        if not (outcome.error.startswith(error) and any(cause in outcome.error for cause in causes))
    ]


def promise(scenario: Scenario, outcomes: list[Outcome]) -> list[str]:
    """What of the promise was not kept in the first run."""
    victim, everybody = f"rank {scenario.victim}", dict(enumerate(outcomes))
    others = {rank: outcome for rank, outcome in everybody.items() if rank != scenario.victim}
    if scenario.fault.startswith("kill"):
        host = ["The process that holds the rendezvous (rank 0) is gone"] if scenario.victim == 0 else []
        return all_ended_with(others, "SyncError", f"lost its connection: {victim}", *host)
    if scenario.fault == "freeze":
        host = ["The process that holds the rendezvous (rank 0) does not answer"] if scenario.victim == 0 else []
        absent = (f"Did not come (within {FREEZE_TIMEOUT}): {victim}", f"lost its connection: {victim}")
        return all_ended_with(others, "SyncError", *absent, *host)
    if scenario.fault.startswith("exception"):
        return all_ended_with(others, "SyncError", f"{victim} failed: ValueError: on purpose")
    if scenario.fault == "full disk":
        return all_ended_with(everybody, "", "No space left on device")
    if scenario.fault == "NaN":
        said = rf"(The parameters of .*\b{victim}\b.* are|on .*\b{victim}\b.*, gradients are) NaN or infinite"
        unnamed = [rank for rank, outcome in everybody.items() if not re.search(said, outcome.error)]
        return all_ended_with(everybody, "SyncError", "") + [f"{victim} is not named to rank {r}" for r in unnamed]
    if scenario.fault == "NaN, skipped" and scenario.algorithm in SHARE_GRADIENTS:
        left, gradients = "No worker is left to recover from", f"on {victim}, gradients are NaN or infinite"
        return all_ended_with(everybody, "SyncError", left, gradients)
    if scenario.fault == "SIGTERM":
        return all_ended_with(everybody, "SIGTERMException", "")
    return all_ended_equal(outcomes)


def damage(scenario: Scenario, path: Path) -> str:
    """Damage one file beside a checkpoint; returns its name."""
    files = sorted(Path(f"{path}.slowmo").glob("*/*"))
    file = files[int(scenario.place[0] * len(files))]
    raw = bytearray(file.read_bytes())
    if scenario.damage == "remove":
        file.unlink()
    elif scenario.damage == "truncate":
        file.write_bytes(raw[: int(scenario.place[1] * len(raw))])
    else:
        bit = int(scenario.place[1] * 8 * len(raw))
        raw[bit // 8] ^= 1 << bit % 8
        file.write_bytes(raw)
    return file.name


@contextmanager
def disk(scenario: Scenario) -> Iterator[str]:
    """A folder for the checkpoints; on a small disk if that is to get full, for which one has to be root."""
    with tempfile.TemporaryDirectory() as folder:
        if scenario.fault != "full disk":
            yield folder
            return
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", folder], check=True)
        try:
            yield folder
        finally:
            subprocess.run(["umount", folder], check=True)


def play(scenario: Scenario, run: Callable[..., list] = run_trainers, limit: float = LIMIT) -> list[str]:
    """Run a scenario, then go on from its newest checkpoint; returns what did not hold."""
    with disk(scenario) as folder:
        try:
            found = promise(scenario, played(run, scenario, limit, folder))
            saved = sorted(Path(folder).glob("epoch=*.ckpt"))
            if scenario.fault.endswith(" at start"):
                return [*found, "a checkpoint from before the start"] if saved else found
            if not saved:
                return [*found, "no checkpoint was left"]
            if scenario.fault == "full disk":
                subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
            damaged = damage(scenario, saved[-1]) if scenario.fault == "damaged checkpoint" else ""
            resumed = played(run, scenario, limit, folder, str(saved[-1]))
        except WorkerFailed as hang:
            return [f"did not end within {limit:.0f} s: {hang}"]
    found += [f"after resuming: {text}" for text in all_ended_equal(resumed)]
    said = resumed[0].warnings
    if damaged and damaged not in said:
        found.append(f"nobody said that {damaged} is damaged")
    if not damaged and ("starts anew" in said or "could not be read" in said):
        found.append(f"the newest checkpoint is not whole: {said}")
    return found


def main() -> int:
    """Play scenarios and print what was found; 1 if anything was."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=25)
    parser.add_argument("--only", type=int, help="play this scenario alone")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for a run to end, more on a busy machine")
    given = parser.parse_args()
    findings = 0
    for index in range(given.count) if given.only is None else [given.only]:
        scenario, start = Scenario.drawn(given.seed, index), time.monotonic()
        found = play(scenario, limit=given.limit)
        findings += bool(found)
        print(f"{index:4d} {'FOUND' if found else 'ok':5s} {time.monotonic() - start:5.1f} s {scenario}", flush=True)
        for text in found:
            print(f"     {text}")
        if found:
            print(f"     again: python -m tests.faults.campaign --seed {given.seed} --only {index}", flush=True)
    print(f"{findings} findings")
    return int(findings > 0)


if __name__ == "__main__":
    sys.exit(main())
