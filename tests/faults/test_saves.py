"""Checkpoints that are cut short, and checkpoints and peers that mean harm."""

import os
import pickle
import signal

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_slowmo import SlowMo, SlowMoStrategy, checkpoint
from lightning_slowmo.checkpoint import files
from lightning_slowmo.communication import Workers
from tests.harness import run_trainers
from tests.test_checkpoint import flip, to_version_1
from tests.trainer.models import Regression, data, distance, numbers, trainer
from tests.trainer.test_checkpoints import fit as fit_alike
from tests.trainer.test_checkpoints import saving

SYNC_EVERY = 4


class DieWhileSaving(Callback):
    """Kill rank 0 in its second save of the same name: at its ``moment``-th step of writing."""

    def __init__(self, moment):
        self.moment, self.saves = moment, 0

    def setup(self, trainer, pl_module, stage):
        if trainer.global_rank == 0:
            files.write = self.count(files.write)
            os.replace = self.count(os.replace)
            files.remove_folders = self.count(files.remove_folders)

    def count(self, function):
        def counted(*args, **kwargs):
            self.saves += 1
            if self.saves == self.moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return counted


STEPS_OF_A_SAVE = 4
"""Rank 0 writes its own file, the shared one, renames the main file, and removes the older folder."""


def fit(rank, folder, moment, resume=None):
    module = Regression()
    newest = ModelCheckpoint(folder, "newest", every_n_train_steps=6, save_top_k=1, enable_version_counter=False)
    strategy = SlowMoStrategy(SlowMo(sync_every=SYNC_EVERY))
    fitting = trainer(2, strategy, callbacks=[DieWhileSaving(moment), newest], enable_checkpointing=True)
    fitting.fit(module, data(rank), ckpt_path=resume)
    return numbers(module)


def go_on(rank, path):
    module = Regression()
    fitting = trainer(2, SlowMoStrategy(SlowMo(sync_every=SYNC_EVERY)))
    return start_of(fitting, module, data(rank), path)


def start_of(fitting, module, loader, path):
    """The step and slow momentum with which training begins, and the final model."""
    seen = {}

    class Look(Callback):
        def on_train_start(self, trainer, *_):
            seen["start"] = trainer.global_step, float(trainer.strategy.engine.units[0].momentum[0].norm())

    fitting.callbacks.append(Look())
    fitting.fit(module, loader, ckpt_path=path)
    return seen["start"], numbers(module)


@pytest.mark.processes
@pytest.mark.parametrize("step", range(1, STEPS_OF_A_SAVE + 1))
def test_a_save_that_is_cut_short_anywhere_leaves_a_whole_checkpoint(tmp_path, step):
    died, other = run_trainers(2, fit, str(tmp_path), STEPS_OF_A_SAVE + step, expect_failure=True)
    assert died == f"died with exit code {-signal.SIGKILL}"
    assert other.startswith("SyncError")
    ((at, momentum), end), ((_, _), same) = run_trainers(2, go_on, str(tmp_path / "newest.ckpt"))
    assert at == (12 if step == STEPS_OF_A_SAVE else 6)
    assert momentum > 0
    assert end == same


# Old and damaged files ------------------------------------------------------------------------------------------------


def fit_from(rank, folder, resume=None):
    """The final model and the warnings; without ``resume`` also a checkpoint, in the middle of a period."""
    callbacks = [] if resume else [saving(folder, every_n_train_steps=5)]
    return fit_alike(rank, 2, SlowMo(sync_every=SYNC_EVERY), resume, callbacks, model={"adam": True})[:2]


@pytest.mark.processes
def test_a_checkpoint_of_version_1_resumes_bit_exactly(tmp_path):
    whole = run_trainers(2, fit_from, str(tmp_path))
    path = tmp_path / "step=5.ckpt"
    to_version_1(path)
    assert torch.load(path, weights_only=True)[checkpoint.KEY]["version"] == 1
    assert run_trainers(2, fit_from, str(tmp_path), str(path)) == whole
    assert not whole[0][1]


@pytest.mark.processes
def test_a_damaged_main_file_ends_all_workers_and_a_changed_one_is_named(tmp_path):
    run_trainers(2, fit_from, str(tmp_path))
    path = tmp_path / "step=5.ckpt"
    whole = path.read_bytes()
    weights = torch.load(path, weights_only=True)["state_dict"]["net.0.weight"]
    flip(path, 8 * whole.index(weights.numpy().tobytes()) + 30)
    for error in run_trainers(2, fit_from, str(tmp_path), str(path), expect_failure=True):
        assert error.startswith(f"ValueError: {path} is damaged")
    path.write_bytes(whole)
    main = torch.load(path, weights_only=True)
    main["state_dict"]["net.0.weight"] += 1
    torch.save(main, path)
    (first, said), (second, _) = run_trainers(2, fit_from, str(tmp_path), str(path))
    assert first == second
    assert f"The weights in {path} were changed" in said[0]


# Harm -----------------------------------------------------------------------------------------------------------------


class NothingIsUnpickled(Callback):
    """Makes every way to unpickle raise while training runs."""

    def __init__(self):
        self.undo = []

    def on_train_start(self, *_):
        def forbidden(*_, **__):
            raise AssertionError("something was unpickled")

        for module, name in ((pickle, "loads"), (pickle, "load"), (pickle, "Unpickler"), (torch, "load")):
            self.forbid(module, name, forbidden)
        for name in ("broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list"):
            self.forbid(torch.distributed, name, forbidden)
        self.forbid(torch.distributed.distributed_c10d, "_unpickler", forbidden)

    def forbid(self, module, name, forbidden):
        self.undo.append((module, name, getattr(module, name)))
        setattr(module, name, forbidden)

    def on_train_end(self, *_):
        for module, name, value in self.undo:
            setattr(module, name, value)


def fit_without_unpickling(rank, folder):
    """With validation, metrics and checkpoints of ours; ModelCheckpoint and EarlyStopping broadcast objects."""

    class Saving(Callback):
        def on_train_epoch_end(self, trainer, *_):
            trainer.save_checkpoint(f"{folder}/epoch.ckpt")

    class Validated(Regression):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.loss(batch), sync_dist=True)

    module = Validated(batch_norm=True)
    callbacks = [NothingIsUnpickled(), Saving()]
    trainer(2, SlowMoStrategy(SlowMo(sync_every=SYNC_EVERY)), callbacks=callbacks).fit(module, data(rank), data(9))
    return numbers(module)


@pytest.mark.processes
def test_nothing_is_unpickled_while_training_runs(tmp_path):
    first, second = run_trainers(2, fit_without_unpickling, str(tmp_path))
    assert first == second
    assert distance(first, numbers(Regression(batch_norm=True))) > 1e-3
    written = [*tmp_path.rglob("*.pt"), *tmp_path.rglob("*.ckpt")]
    assert len(written) == 4
    for file in written:
        torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", ["../0123456789abc", "/etc", "0123456789abc/../..", "", "0123456789abc\n", None, 3])
def test_a_name_in_a_checkpoint_never_leads_out_of_its_folder(tmp_path, name, monkeypatch):
    path = tmp_path / "m.ckpt"
    main = {}
    checkpoint.save(main, path, Workers(), "A", {"x": 1}, {"y": 2}, (), lambda: torch.save(main, path))
    assert checkpoint.load(main, path, Workers(), "A").warning is None
    main[checkpoint.KEY]["name"] = name
    monkeypatch.setattr(files, "read", lambda path, label: pytest.fail(f"read {path}"))
    assert "names an invalid folder" in checkpoint.load(main, path, Workers(), "A").warning
