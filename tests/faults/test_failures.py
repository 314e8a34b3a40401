"""A worker that fails, is killed, or never comes: the others end soon, and know why."""

import os
import re
import signal
import subprocess
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint

from lightning_slowmo import LocalSGD, SlowMo, SlowMoStrategy
from tests.harness import run_trainers
from tests.trainer.models import Regression, data, trainer

SYNC_EVERY = 4
SOON = 8.0
"""Seconds within which the others must have ended. Two are usual; the machine may be busy."""

RENDEZVOUS_GONE = "The process that holds the rendezvous (rank 0) is gone."


class Misfortune(Callback):
    """Something that happens to one rank after ten batches."""

    def __init__(self, rank, happen):
        self.rank, self.happen, self.at = rank, happen, 0.0

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 10:
            self.at = time.monotonic()  # the same clock in all processes
            if trainer.global_rank == self.rank:
                self.happen()


def fail():
    raise ValueError("on purpose")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def sleep():
    time.sleep(12)


def fit(rank, size, who, happen, folder, sync_timeout=None):
    """Train until misfortune strikes; how it ended, and how long after."""
    misfortune = Misfortune(who, happen)
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=8, save_top_k=-1)
    callbacks = [misfortune, saving, OnExceptionCheckpoint(folder, "exception")]
    strategy = SlowMoStrategy(SlowMo(sync_every=SYNC_EVERY), sync_timeout=sync_timeout)
    fitting = trainer(size, strategy, callbacks=callbacks, enable_checkpointing=True, max_epochs=50)
    try:
        fitting.fit(Regression(), data(rank))
    except BaseException as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - misfortune.at
    return "no error", 0.0


def go_on(rank, path):
    module = Regression()
    fitting = trainer(2, SlowMoStrategy(SlowMo(sync_every=SYNC_EVERY)))
    fitting.fit(module, data(rank), ckpt_path=path)
    return fitting.global_step, fitting.strategy.report.count


def check_last_save(folder):
    """The checkpoint before the misfortune is whole: each rank's state, and no leftovers of a later one."""
    (beside,) = (folder / "step=8.ckpt.slowmo").iterdir()
    assert sorted(os.listdir(beside)) == ["rank00000.pt", "rank00001.pt", "shared.pt"]
    assert (
        {"step=8.ckpt", "step=8.ckpt.slowmo"}
        <= set(os.listdir(folder))
        <= {
            "step=8.ckpt",
            "step=8.ckpt.slowmo",
            "exception.ckpt",
        }
    )
    assert [outcome[0] for outcome in run_trainers(2, go_on, str(folder / "step=8.ckpt"))] == [16, 16]


@pytest.mark.processes
@pytest.mark.parametrize("who", [0, 1])
def test_an_exception_on_one_rank_ends_the_other_and_names_rank_and_cause(tmp_path, who):
    results = run_trainers(2, fit, 2, who, fail, str(tmp_path))
    assert results[who][0] == "ValueError: on purpose"  # and not an error of OnExceptionCheckpoint
    text, after = results[1 - who]
    assert text.startswith("SyncError")
    assert f"rank {who} failed: ValueError: on purpose" in text
    assert after < SOON
    state = torch.load(tmp_path / "exception.ckpt", weights_only=True)
    assert state["global_step"] in (10, 11, 12)
    check_last_save(tmp_path)


@pytest.mark.processes
def test_the_others_of_three_hear_of_a_failure_too(tmp_path):
    results = run_trainers(3, fit, 3, 2, fail, str(tmp_path))
    for text, after in results[:2]:
        assert "rank 2 failed: ValueError: on purpose" in text or "rank 1 failed" in text or "rank 0 failed" in text
        assert after < SOON
    assert any("rank 2 failed: ValueError: on purpose" in text for text, _ in results[:2])


@pytest.mark.processes
def test_a_killed_worker_is_named_by_the_other_within_seconds(tmp_path):
    (text, after), died = run_trainers(2, fit, 2, 1, die, str(tmp_path), expect_failure=True)
    assert died == f"died with exit code {-signal.SIGKILL}"
    assert text.startswith("SyncError")
    assert "Ended without a word, or lost its connection: rank 1." in text
    assert after < SOON
    check_last_save(tmp_path)


@pytest.mark.processes
def test_when_the_process_is_killed_that_holds_the_rendezvous_the_other_says_so(tmp_path):
    died, (text, after) = run_trainers(2, fit, 2, 0, die, str(tmp_path), expect_failure=True)
    assert died == f"died with exit code {-signal.SIGKILL}"
    assert text.startswith("SyncError")
    assert RENDEZVOUS_GONE in text
    assert after < SOON


@pytest.mark.processes
def test_a_worker_that_never_comes_is_named_after_sync_timeout(tmp_path):
    timeout = timedelta(seconds=2)
    (text, after), (late, _) = run_trainers(2, fit, 2, 1, sleep, str(tmp_path), timeout)
    assert text.startswith("SyncError")
    assert "Did not come (within 0:00:02): rank 1." in text
    assert 2 <= after < 2 + 5
    assert late.startswith("SyncError")  # it wakes up alone
    assert "rank 0" in late


# Workers that do not belong together ----------------------------------------------------------------------------------


class SaveAlone(Callback):
    """What a script should not do on one rank alone."""

    def on_train_epoch_end(self, trainer, *_):
        trainer.save_checkpoint("never")


def fit_otherwise(rank, difference):
    algorithm = LocalSGD(SYNC_EVERY + (rank if difference == "different algorithm" else 0))
    module = Regression(hidden=4 + (rank if difference == "different model" else 0))
    if difference == "different frozen parameters" and rank:
        module.net[0].bias.requires_grad_(False)
    strategy = SlowMoStrategy(algorithm, sync_timeout=timedelta(seconds=10))
    fitting = trainer(2, strategy, callbacks=SaveAlone() if difference == "different script" and rank else None)
    start = time.monotonic()
    try:
        fitting.fit(module, data(rank))
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - start
    return "no error", 0.0


DIFFERENCES = {
    "different algorithm": (
        "The algorithm differs between workers: rank 0 has 'LocalSGD(sync_every=4, overlap=0, fragments=1)', rank 1 has"
    ),
    "different model": "The model differs between workers: rank 0 has",
    "different frozen parameters": "The model differs between workers: rank 0 has",
    "different script": "The workers came together for different reasons: rank 0 epoch start, rank 1 save",
}


def fit_each_otherwise(rank):
    """One after the other in the same processes: after a clear error on all ranks, all can go on."""
    return [fit_otherwise(rank, difference) for difference in DIFFERENCES]


@pytest.mark.processes
def test_workers_that_do_not_belong_together_all_say_so():
    results = run_trainers(2, fit_each_otherwise)
    for (name, message), *outcomes in zip(DIFFERENCES.items(), *results, strict=True):
        for text, after in outcomes:
            assert message in text, name
            assert after < SOON


# Wherever the others are ----------------------------------------------------------------------------------------------


class Gather(Regression):
    """A model whose validation gathers by torch.distributed itself, as torchmetrics do."""

    def on_validation_epoch_end(self):
        dist.all_gather_object([None] * self.trainer.world_size, "a metric")


class At(Callback):
    """Something that happens to one rank in a hook, for the first time after ``after`` calls."""

    def __init__(self, hook, rank, happen, after):
        self.at = 0.0
        self.calls = 0

        def strike(trainer, *_, **__):
            self.calls += 1
            if self.calls == after + 1:
                self.at = time.monotonic()
                if trainer.global_rank == rank:
                    happen()

        setattr(self, hook, strike)


PLACES = {
    "start": ("setup", 0),
    "start of the fit": ("on_fit_start", 0),
    "validation": ("on_validation_batch_end", 1),
    "validation without fit": ("on_validation_batch_end", 1),
    "inside a node": ("on_before_backward", 2),
}
"""Where a worker fails: a hook, and how often that is called before."""


def live_on(rank, who, happen, place, folder):
    """Fail at one place, catch the exception, and stay alive while the others wait."""
    at = At(PLACES[place][0], who, happen, PLACES[place][1])
    strategy = SlowMoStrategy(SlowMo(sync_every=SYNC_EVERY), workers_per_node=2 if "node" in place else None)
    fitting = trainer(2, strategy, callbacks=at)
    call = fitting.validate if place == "validation without fit" else fitting.fit
    try:
        call(Gather(), data(rank), *([data(rank)] if place == "validation" else []))
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}", time.monotonic() - at.at
        for _ in range(200):  # in a notebook, say; the other needs no more than seconds
            Path(folder, str(rank)).touch()
            if rank != who or Path(folder, str(1 - rank)).exists():
                return outcome
            time.sleep(0.1)
        return "the others never came to their end", 0.0
    return "no error", 0.0


@pytest.mark.processes
@pytest.mark.parametrize("place", PLACES)
def test_an_exception_is_known_within_seconds_wherever_the_others_wait(tmp_path, place):
    own, (text, after) = run_trainers(2, live_on, 0, fail, place, str(tmp_path))
    assert own[0] == "ValueError: on purpose"
    assert "rank 0 failed: ValueError: on purpose" in text
    assert after < SOON


@pytest.mark.processes
@pytest.mark.parametrize(("place", "who"), [("start", 1), ("validation", 1), ("validation", 0), ("inside a node", 1)])
def test_a_kill_is_known_within_seconds_wherever_the_others_wait(tmp_path, place, who):
    results = run_trainers(2, live_on, who, die, place, str(tmp_path), expect_failure=True)
    assert results[who] == f"died with exit code {-signal.SIGKILL}"
    text, after = results[1 - who]
    assert "Ended without a word, or lost its connection: rank 1." in text or (who == 0 and RENDEZVOUS_GONE in text)
    assert after < SOON


# The process that holds the rendezvous --------------------------------------------------------------------------------

LIMIT = timedelta(seconds=2)


def freeze():
    os.kill(os.getpid(), signal.SIGSTOP)


def freeze_and_wake():
    subprocess.Popen(["sh", "-c", f"sleep 5; kill -CONT {os.getpid()}"])
    freeze()


@pytest.mark.processes
def test_a_rendezvous_that_freezes_for_ever_is_named_soon_after_sync_timeout(tmp_path):
    def kill_the_frozen_when_the_others_have_ended(processes):
        for process in processes[1:]:
            process.join(30)
        processes[0].kill()

    died, *others = run_trainers(
        3,
        fit,
        3,
        0,
        freeze,
        str(tmp_path),
        LIMIT,
        expect_failure=True,
        meanwhile=kill_the_frozen_when_the_others_have_ended,
    )
    assert died == f"died with exit code {-signal.SIGKILL}"
    for text, after in others:
        assert text.startswith("SyncError")
        assert "The process that holds the rendezvous (rank 0) does not answer" in text
        assert after < LIMIT.total_seconds() + 5 + 4  # the rest is for Lightning and a busy machine


@pytest.mark.processes
def test_a_rendezvous_that_was_frozen_is_named_when_it_wakes_up(tmp_path):
    results = run_trainers(3, fit, 3, 0, freeze_and_wake, str(tmp_path), LIMIT)
    for text, _ in results:
        assert text.startswith("SyncError")
        assert re.search(r"(frozen|gone|gave up|given up|come).*rank 0|rank 0\) (was|does)", text), text
