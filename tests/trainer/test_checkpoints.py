"""Checkpoints: exact resume, other numbers of workers, other strategies, and what happens to damaged ones."""

import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_slowmo import BMUF, DiLoCo, LocalSGD, SlowMo, SlowMoStrategy
from lightning_slowmo.checkpoint import KEY
from tests.harness import run_trainers
from tests.trainer.models import Regression, data, distance, numbers, trainer

SYNC_EVERY = 3  # an epoch is 8 steps: no epoch ends with a sync, nor does any other save below


def alike(rank):
    """One epoch of equal batches. A resume in the middle of an epoch begins the data anew, which must not matter."""
    (inputs, targets), *_ = data(rank)
    dataset = torch.utils.data.TensorDataset(inputs.repeat(8, 1), targets.repeat(8, 1))
    return torch.utils.data.DataLoader(dataset, batch_size=len(inputs))


def fit(rank, size, strategy, resume=None, callbacks=None, model=None, **arguments):
    """Train and return the final model and the warnings about the checkpoint on this rank."""
    module = Regression(**(model or {}))
    strategy = strategy if isinstance(strategy, str) else SlowMoStrategy(strategy)
    fitting = trainer(size, strategy, callbacks=callbacks, enable_checkpointing=callbacks is not None, **arguments)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitting.fit(module, alike(rank), ckpt_path=resume)
    texts = [str(warning.message) for warning in caught]
    return numbers(module), [text for text in texts if "workers" in text or "starts anew" in text], fitting


def saving(folder, **arguments):
    return ModelCheckpoint(folder, "{step}", save_top_k=-1, **arguments)


# Exact resume ---------------------------------------------------------------------------------------------------------

SITUATIONS = {
    "local SGD": (LocalSGD(SYNC_EVERY), {}),
    "SGD with momentum": (SlowMo(sync_every=SYNC_EVERY), {"momentum": 0.9}),
    "momentum maintained": (SlowMo(sync_every=SYNC_EVERY, inner_buffers="maintain"), {"momentum": 0.9}),
    "momentum averaged": (SlowMo(sync_every=SYNC_EVERY, inner_buffers="average"), {"momentum": 0.9}),
    "Adam": (SlowMo(sync_every=SYNC_EVERY), {"adam": True}),
    "BatchNorm": (SlowMo(sync_every=SYNC_EVERY), {"batch_norm": True}),
    "changing learning rate": (SlowMo(sync_every=SYNC_EVERY), {"warm_up": 6}),
    "two algorithms": (SlowMo(LocalSGD(2), sync_every=5), {}),
    "BMUF": (BMUF(SYNC_EVERY, warmup_steps=SYNC_EVERY, nesterov=True), {}),
    "DiLoCo": (DiLoCo(SYNC_EVERY), {"adam": True}),
    "an average in flight": (SlowMo(sync_every=SYNC_EVERY, overlap=2), {"momentum": 0.9, "warm_up": 6}),
    "a fragment in flight": (LocalSGD(4, overlap=1, fragments=2), {"momentum": 0.9}),
    "streaming DiLoCo": (DiLoCo(4, overlap=1, fragments=2), {"adam": True}),
}


def resume_everywhere(rank, folder):
    results = {}
    for name, (algorithm, model) in SITUATIONS.items():
        own = f"{folder}/{name}"
        callbacks = [saving(own, every_n_train_steps=5), saving(own, every_n_epochs=1, save_on_train_epoch_end=True)]
        whole, _, _ = fit(rank, 2, algorithm, callbacks=callbacks, model=model)
        resumed = {step: fit(rank, 2, algorithm, f"{own}/step={step}.ckpt", model=model)[:2] for step in (5, 8, 10)}
        results[name] = whole, resumed
    return results


@pytest.mark.processes
def test_resume_is_bit_exact_in_the_middle_of_a_period_at_epoch_ends_and_inside_epochs(tmp_path):
    first, second = run_trainers(2, resume_everywhere, str(tmp_path))
    assert first == second
    for name, (whole, resumed) in first.items():
        for step, (model, complaints) in resumed.items():
            assert not complaints, (name, step)
            assert model == whole, (name, step)
    for file in tmp_path.rglob("*.[cp]*t"):
        torch.load(file, weights_only=True)


# Other numbers of workers, other strategies ---------------------------------------------------------------------------


def momenta(fitting):
    return [float(unit.momentum[0].norm()) for unit in fitting.strategy.engine.units]


def save_one(rank, folder):
    """A checkpoint of two workers in the middle of a period; returns the norm of the slow momentum in it."""
    for name, strategy in (("ours", SlowMo(sync_every=SYNC_EVERY)), ("ddp", "ddp")):
        fit(rank, 2, strategy, callbacks=saving(f"{folder}/{name}", every_n_epochs=1), max_epochs=1)
    _, _, fitting = fit(rank, 2, SlowMo(sync_every=SYNC_EVERY), max_steps=8)
    return momenta(fitting)


class StartOfTraining(Regression):
    """Remembers the model with which training goes on."""

    def on_train_start(self):
        self.start = numbers(self), momenta(self.trainer)


def go_on(rank, size, path):
    module = StartOfTraining()
    fitting = trainer(size, SlowMoStrategy(SlowMo(sync_every=SYNC_EVERY)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitting.fit(module, alike(rank), ckpt_path=path)
    return (*module.start, numbers(module), fitting.global_step, " ".join(str(w.message) for w in caught))


def weights(path):
    state = torch.load(path, weights_only=True)["state_dict"]
    return [value.double().flatten().tolist() for value in state.values()]


def cross_strategies(rank, folder):
    ours, ddp = f"{folder}/ours/step=8.ckpt", f"{folder}/ddp/step=8.ckpt"
    return go_on(rank, 2, ddp), fit(rank, 2, "ddp", ours)[:2], numbers(Regression.load_from_checkpoint(ours))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return folder, run_trainers(2, save_one, str(folder))[0]


@pytest.mark.processes
@pytest.mark.parametrize("size", [1, 3])
def test_another_number_of_workers_goes_on_from_the_consensus_with_the_slow_momentum(saved, size):
    folder, slow = saved
    path = folder / "ours" / "step=8.ckpt"
    results = run_trainers(size, go_on, size, str(path))
    for start, momentum, end, steps, _ in results:
        assert start == weights(path)
        assert momentum == slow
        assert momentum[0] > 0
        assert steps == 16
        assert end == results[0][2]
    assert f"was saved by 2 workers and is continued by {size}" in results[0][4]


@pytest.mark.processes
def test_ddp_opens_our_checkpoints_and_we_open_those_of_ddp(saved):
    folder, _ = saved
    first, second = run_trainers(2, cross_strategies, str(folder))
    (start, momentum, end, steps, said), continued, loaded = first
    assert start == weights(folder / "ddp" / "step=8.ckpt")
    assert momentum == [0.0]
    assert steps == 16
    assert end == second[0][2]
    assert "was not saved by this strategy" in said
    assert continued == second[1]
    assert distance(continued[0], loaded) > 1e-3
    assert loaded == weights(folder / "ours" / "step=8.ckpt")


# Damage ---------------------------------------------------------------------------------------------------------------


def lose_a_rank(path, folder):
    (folder / "rank00001.pt").unlink()


def truncate_a_rank(path, folder):
    file = folder / "rank00001.pt"
    file.write_bytes(file.read_bytes()[:-200])


def empty_a_rank(path, folder):
    (folder / "rank00000.pt").write_bytes(b"")


def lose_the_slow_state(path, folder):
    (folder / "shared.pt").unlink()


def lose_the_folder(path, folder):
    shutil.rmtree(folder)


def _renamed(path, name):
    checkpoint = torch.load(path, weights_only=True)
    checkpoint[KEY]["name"] = name
    torch.save(checkpoint, path)


def name_a_folder_elsewhere(path, folder):
    shutil.move(folder, path.parent.parent / "evil")
    _renamed(path, "../../evil")


def name_another_save(path, folder):
    _renamed(path, "0123456789abc")


DAMAGES = {
    lose_a_rank: "own state of rank 1 ",
    truncate_a_rank: "own state of rank 1 ",
    empty_a_rank: "own state of rank 0 ",
    lose_the_slow_state: "slow state beside",
    lose_the_folder: "could not be read by rank 0, rank 1",
    name_a_folder_elsewhere: "names an invalid folder",
    name_another_save: "could not be read by rank 0, rank 1",
}


def go_on_from_each(rank, paths):
    return [go_on(rank, 2, path) for path in paths]


@pytest.mark.processes
def test_a_damaged_checkpoint_goes_on_from_the_consensus_on_all_ranks_and_says_so(saved, tmp_path):
    folder, slow = saved
    paths = []
    for damage in DAMAGES:
        path = tmp_path / damage.__name__ / "c" / "model.ckpt"
        path.parent.mkdir(parents=True)
        shutil.copy(folder / "ours" / "step=8.ckpt", path)
        beside = shutil.copytree(folder / "ours" / "step=8.ckpt.slowmo", f"{path}.slowmo")
        (own,) = Path(beside).iterdir()
        damage(path, own)
        paths.append(str(path))
    first, second = run_trainers(2, go_on_from_each, paths)
    for (damage, text), path, one, other in zip(DAMAGES.items(), paths, first, second, strict=True):
        assert text in one[4], damage
        assert one[0] == other[0] == weights(path), damage
        assert one[1] == other[1] == (slow if "own state" in text else [0.0]), damage
        assert one[2] == other[2], damage
        assert one[3] == other[3] == 16, damage


# Kinds of saves -------------------------------------------------------------------------------------------------------


def listing(folder):
    return sorted(os.listdir(folder))


def save_in_many_ways(rank, folder):
    def run(name, **arguments):
        callback = ModelCheckpoint(f"{folder}/{name}", "{step}", **arguments)
        whole, _, fitting = fit(rank, 2, SlowMo(sync_every=SYNC_EVERY), callbacks=callback, max_epochs=3)
        return whole, fitting

    whole, _ = run("link", save_top_k=-1, save_last="link", every_n_epochs=1)
    run("copy", save_top_k=-1, save_last=True, every_n_epochs=1)
    run("newest", save_top_k=1, every_n_epochs=1)
    run("best", save_top_k=2, monitor="step", mode="max", every_n_train_steps=5)
    run("weights", save_top_k=-1, save_weights_only=True, every_n_epochs=1)
    _, fitting = run("none", save_top_k=0)
    fitting.save_checkpoint(f"{folder}/after.ckpt")
    fitting.save_checkpoint(f"{folder}/after_weights.ckpt", weights_only=True)
    more = SlowMo(sync_every=SYNC_EVERY)
    resumed = {
        name: fit(rank, 2, more, f"{folder}/{name}", max_epochs=4)[:2]
        for name in ("link/last.ckpt", "copy/last.ckpt", "newest/step=24.ckpt", "after.ckpt")
    }
    longer = fit(rank, 2, more, max_epochs=4)[0]
    fit(rank, 2, BMUF(SYNC_EVERY), callbacks=ModelCheckpoint(f"{folder}/bmuf", "b", every_n_epochs=1), max_epochs=1)
    dist.barrier()
    started = fit(rank, 2, more, f"{folder}/bmuf/b.ckpt")
    state = momenta(fitting)
    return whole, longer, resumed, started[:2], state


@pytest.mark.processes
def test_links_top_k_weights_only_and_saves_after_fit(tmp_path):
    (whole, longer, resumed, started, slow), second = run_trainers(2, save_in_many_ways, str(tmp_path))
    beside = [f"step={step}.ckpt" for step in (16, 24, 8)]
    folders = [f"{name}.slowmo" for name in beside]
    assert listing(tmp_path / "link") == sorted(["last.ckpt", *beside, *folders])
    assert (tmp_path / "link" / "last.ckpt").is_symlink()
    assert listing(tmp_path / "copy") == sorted(["last.ckpt", "last.ckpt.slowmo", *beside, *folders])
    assert listing(tmp_path / "newest") == ["step=24.ckpt", "step=24.ckpt.slowmo"]
    assert listing(tmp_path / "best") == ["step=15.ckpt", "step=15.ckpt.slowmo", "step=20.ckpt", "step=20.ckpt.slowmo"]
    assert listing(tmp_path / "weights") == beside
    assert not (tmp_path / "after_weights.ckpt.slowmo").exists()
    assert weights(tmp_path / "after.ckpt") == weights(tmp_path / "after_weights.ckpt") == whole
    for name, (model, complaints) in resumed.items():
        assert not complaints, name
        assert model == second[2][name][0], name
        if name != "after.ckpt":  # a fit that ended left its local models for the consensus
            assert model == longer, name
    assert "was saved by BMUF" in started[1][0]
    assert started[0] == second[3][0]
    (note,) = (tmp_path / "after.ckpt.slowmo").iterdir()
    kept = torch.load(note / "shared.pt", weights_only=True)["shared"]["units"][0]["slow"]["momentum"]
    assert torch.cat([tensor.flatten() for tensor in kept]).norm().item() == pytest.approx(slow[0])
