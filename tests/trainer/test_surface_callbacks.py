"""Lightning's callbacks and the Trainer's other entry points: all ranks decide, save and end alike."""

import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.tuner import Tuner

from lightning_slowmo import AllReduce, Gossip, SlowMo, SlowMoStrategy
from lightning_slowmo.callbacks import EMAAtSync
from tests.harness import run_trainers
from tests.trainer.models import Regression, all_finite, data, distance, numbers, trainer

SYNC_EVERY = 3


class Watched(Regression):
    """Keeps what each rank has after each step, and the model and the metric that are validated."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.trained, self.validated = [], []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss, on_step=False, on_epoch=True)  # not synced: every rank has its own
        return loss

    def on_train_batch_end(self, *_):
        self.trained.append(numbers(self))

    def on_validation_epoch_start(self):  # after callbacks have put their averages in
        self.validated.append(numbers(self))


def fit(rank, callbacks=None, module=None, strategy=None, val_seed=None, **arguments):
    """Each rank validates on data of its own, unless a seed is given: their metrics differ too."""
    module = module or Watched()
    strategy = strategy or SlowMoStrategy(SlowMo(sync_every=SYNC_EVERY))
    arguments = {"max_epochs": 3, "enable_checkpointing": "ckpt" in arguments, "callbacks": callbacks} | arguments
    resume = arguments.pop("ckpt", None) or None
    fitting = trainer(2, strategy, **arguments)
    validation = data(100 + rank if val_seed is None else val_seed)
    fitting.fit(module, data(rank), validation, ckpt_path=resume)
    return module, fitting


def weights(path):
    state = torch.load(path, weights_only=True)["state_dict"]
    return [value.double().flatten().tolist() for value in state.values()]


# EarlyStopping --------------------------------------------------------------------------------------------------------


def stop_early(rank):
    """A metric that gets worse on one rank, or on both."""
    results = {}

    class Worse(Watched):
        def validation_step(self, batch, batch_idx):
            self.log("worse", float(self.current_epoch) * (1 if self.global_rank in self.ranks else -1))

        def on_train_epoch_end(self):
            self.log("worse at the end", float(self.current_epoch) * (1 if self.global_rank in self.ranks else -1))

    for name, monitor, ranks in (
        ("validation, both", "worse", (0, 1)),
        ("validation, one", "worse", (1,)),
        ("epoch end, both", "worse at the end", (0, 1)),
        ("epoch end, one", "worse at the end", (0,)),
    ):
        module = Worse()
        module.ranks = ranks
        at_end = monitor == "worse at the end"
        stopping = EarlyStopping(monitor, patience=1, check_on_train_epoch_end=at_end)
        _, fitting = fit(rank, [stopping], module, max_epochs=5)
        results[name] = fitting.global_step, numbers(module)
    return results


@pytest.mark.processes
def test_early_stopping_stops_all_ranks_at_the_same_step():
    first, second = run_trainers(2, stop_early)
    assert first == second
    # The second of five epochs is worse than the first, and that is enough, if any rank thinks so.
    assert {name: steps for name, (steps, _) in first.items()} == dict.fromkeys(first, 16)


# ModelCheckpoint ------------------------------------------------------------------------------------------------------

MODES = {
    "top 2 of validations": {"monitor": "val_loss", "save_top_k": 2, "filename": "{step}-{val_loss:.4f}"},
    "top 1 at epoch ends, by a local metric": {"monitor": "train_loss", "save_on_train_epoch_end": True},
    "all, by steps": {"every_n_train_steps": 5, "save_top_k": -1},
    "by steps at syncs": {"every_n_train_steps": SYNC_EVERY * 2, "save_top_k": -1},
    "by epochs": {"every_n_epochs": 2, "save_top_k": -1},
    "weights only": {"save_weights_only": True, "save_top_k": -1},
    "last alone": {"save_top_k": 0, "save_last": True},
    "last as a link": {"save_top_k": 1, "save_last": "link"},
    "none": {"save_top_k": 0},
}


class Saves(ModelCheckpoint):
    """Notes at which step each file was written; the same name may be written again."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.at = {}

    def _save_checkpoint(self, trainer, filepath):
        self.at[Path(filepath).name] = trainer.global_step
        super()._save_checkpoint(trainer, filepath)


def save_in_all_modes(rank, folder):
    results = {}
    for name, mode in MODES.items():
        saving = Saves(dirpath=f"{folder}/{name}", **({"filename": "{step}"} | mode))
        module, fitting = fit(rank, [saving], ckpt="")
        results[name] = module.trained, saving.at, numbers(module), fitting.global_step
    return results


def go_on_from(rank, folder):
    """Resume from what is to be resumed from, in each mode that has it."""
    results = {}
    for name in ("last alone", "last as a link"):
        module, _ = fit(rank, ckpt=f"{folder}/{name}/last.ckpt", max_epochs=4)
        results[name] = numbers(module)
    results["in one go"] = numbers(fit(rank, max_epochs=4)[0])
    return results


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modes")
    return folder, run_trainers(2, save_in_all_modes, str(folder), limit=120)


def mean(first, second):
    return [[(a + b) / 2 for a, b in zip(x, y, strict=True)] for x, y in zip(first, second, strict=True)]


@pytest.mark.processes
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_model_checkpoint_saves_the_mean_of_the_workers_and_leaves_nothing_else(saved, mode):
    folder, ranks = saved
    (first, at, end, steps), (second, _, end_there, _) = (results[mode] for results in ranks)
    assert (end, steps) == (end_there, 24)
    files = {file.name: file for file in (folder / mode).glob("*.ckpt")}
    expected = {
        "top 2 of validations": 2,
        "top 1 at epoch ends, by a local metric": 1,
        "all, by steps": 4,
        "by steps at syncs": 4,
        "by epochs": 1,
        "weights only": 3,
        "last alone": 1,
        "last as a link": 2,
        "none": 0,
    }
    assert len(files) == expected[mode]
    for name, file in files.items():
        step = at[file.resolve().name]
        assert distance(weights(file), mean(first[step - 1], second[step - 1])) < 1e-6, name
    beside = {file.name for file in (folder / mode).glob("*") if file.name not in files}
    owners = {f"{name}.slowmo" for name, file in files.items() if not file.is_symlink()}
    assert beside == (set() if mode == "weights only" else owners)


@pytest.mark.processes
def test_the_last_checkpoint_goes_on_as_if_training_had_never_stopped(saved):
    results = run_trainers(2, go_on_from, str(saved[0]))
    assert results[0] == results[1]
    assert results[0]["last alone"] == results[0]["last as a link"] == results[0]["in one go"]


# Averages of weights --------------------------------------------------------------------------------------------------


def average_stochastically(rank):
    results = {}
    for name, batch_norm in (("plain", False), ("BatchNorm", True)):
        swa = StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=2, annealing_epochs=1)
        module, fitting = fit(rank, [swa], Watched(batch_norm=batch_norm), max_epochs=4)
        results[name] = {
            "end": numbers(module),
            "averages": module.trained[-1] if batch_norm else numbers(swa._average_model),
            "batches": len(module.trained),
            "syncs": fitting.strategy.report.count,
        }
    return results


@pytest.mark.processes
def test_stochastic_weight_averaging_ends_with_the_mean_of_the_workers_averages():
    first, second = run_trainers(2, average_stochastically)
    for name, batches in (("plain", 32), ("BatchNorm", 40)):
        ours, theirs = first[name], second[name]
        assert ours["batches"] == batches
        # For BatchNorm's statistics there is one epoch more, at whose end Lightning counts a step, the 33rd. A slow
        # update there would move the averages on along the slow momentum.
        assert ours["syncs"] == theirs["syncs"] == 10
        assert ours["end"] == theirs["end"]
        assert distance(ours["averages"], theirs["averages"]) > 1e-4
        assert distance(ours["end"], mean(ours["averages"], theirs["averages"])) < 1e-6


EMA_SITUATIONS = {
    # name: (algorithm, BatchNorm, batches of rank 1, updates)
    "plain": (SlowMo(sync_every=SYNC_EVERY), False, 8, 8),
    "BatchNorm": (SlowMo(sync_every=SYNC_EVERY), True, 8, 8),
    "uneven": (SlowMo(sync_every=SYNC_EVERY), True, 4, 8),
    "gossip inside": (SlowMo(Gossip(), sync_every=6), False, 8, 4),
}


def average_exponentially(rank, folder):
    results = {}
    for name, (algorithm, batch_norm, batches, _) in EMA_SITUATIONS.items():
        ema = EMAAtSync(decay=0.5)
        saving = ModelCheckpoint(f"{folder}/{name}", "{epoch}", save_top_k=-1, save_on_train_epoch_end=False)
        # Another start on each rank, as without a seed: the callback copies the model before it is made equal.
        module = Watched(batch_norm=batch_norm, seed=1 + rank)
        options = {"callbacks": [ema, saving], "enable_checkpointing": True, "max_epochs": 3}
        fitting = trainer(2, SlowMoStrategy(algorithm), **options)
        fitting.fit(module, data(rank, examples=4 * batches if rank else 32), data(9))
        results[name] = {
            "validated": module.validated,
            "end": numbers(module),
            "average": numbers(ema._average_model.module),
            "updates": int(ema._average_model.n_averaged),
        }
    for name in ("plain", "BatchNorm"):
        again = Watched(batch_norm=name == "BatchNorm", seed=1 + rank)
        fit(rank, [EMAAtSync(decay=0.5)], again, val_seed=9, ckpt=f"{folder}/{name}/epoch=1.ckpt")
        results[f"{name}, resumed"] = numbers(again), again.validated
    return results


@pytest.mark.processes
def test_an_average_at_syncs_is_equal_on_all_ranks_in_validation_at_the_end_and_after_a_resume(tmp_path):
    first, second = run_trainers(2, average_exponentially, str(tmp_path))
    assert first == second
    for name, (_, _, _, updates) in EMA_SITUATIONS.items():
        found = first[name]
        assert found["updates"] == updates, name
        assert found["end"] == found["average"], name
        assert len(found["validated"]) == 3
        assert weights(tmp_path / name / "epoch=2.ckpt") == found["end"] == found["validated"][-1], name
        assert distance(found["validated"][0], found["end"]) > 1e-2
    for name in ("plain", "BatchNorm"):
        assert first[f"{name}, resumed"] == (first[name]["end"], first[name]["validated"][2:])


def average_without_agreement(rank):
    """Gossip, which never makes the workers equal; a fit that is too short; and gradients that all share."""
    results = {}
    for name, algorithm in (("gossip", Gossip()), ("short", SlowMo(sync_every=100)), ("all-reduce", AllReduce())):
        ema = EMAAtSync(decay=0.5)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            module, _ = fit(rank, [ema], strategy=SlowMoStrategy(algorithm), max_epochs=1)
        said = [text for text in (str(warning.message) for warning in caught) if "left as trained" in text]
        results[name] = numbers(module), module.trained[-1], numbers(ema._average_model.module), len(said)
    return results


@pytest.mark.processes
def test_a_model_is_left_as_trained_if_there_was_nothing_to_average():
    first, second = run_trainers(2, average_without_agreement)
    for name in ("gossip", "short"):
        (end, trained, _, said), (end_there, trained_there, _, _) = first[name], second[name]
        assert end == end_there
        assert distance(end, mean(trained, trained_there)) < 1e-6
        assert said == 1
    end, _, average, said = first["all-reduce"]
    assert end == average == second["all-reduce"][0]
    assert said == 0


# Warnings -------------------------------------------------------------------------------------------------------------


class LogsEachStep(Regression):
    """Reduces two metrics over the workers at every step."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        for name in ("loss", "twice"):
            self.log(name, loss, on_step=True, sync_dist=True)
        return loss


class LogsEachEpoch(Regression):
    """Reduces as many metrics as a period has steps, but at the ends of epochs."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        for number in range(SYNC_EVERY):
            self.log(f"loss {number}", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss


def listen(rank, folder):
    options = {
        "nothing": {},
        "max_time": {"max_time": "00:01:00:00"},
        "Timer by epochs": {"callbacks": [Timer("00:01:00:00", interval="epoch")]},
        "train_time_interval": {
            "callbacks": [ModelCheckpoint(folder, train_time_interval=timedelta(hours=1))],
            "enable_checkpointing": True,
        },
        "EMA": {"callbacks": [EMAWeightAveraging()]},
        "EMA at syncs": {"callbacks": [EMAAtSync()]},
        "each step": {"module": LogsEachStep()},
        "each epoch": {"module": LogsEachEpoch()},
    }
    heard = {}
    for name, arguments in options.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(rank, **arguments)
        texts = [str(warning.message) for warning in caught]
        heard[name] = [text for text in texts if any(cure in text for cure in CURES.values())]
    return heard


CURES = {
    "train_time_interval": "Use every_n_train_steps, a multiple of sync_every",
    "EMA": "Use lightning_slowmo.callbacks.EMAAtSync",
    "each step": "Use self.log(..., on_step=False, on_epoch=True, sync_dist=True)",
}


@pytest.mark.processes
def test_what_makes_workers_wait_at_each_step_is_warned_about_once_with_the_cure(tmp_path):
    first, second = run_trainers(2, listen, str(tmp_path))
    for name, texts in first.items():
        assert len(texts) == (name in CURES), (name, texts)
        assert all(CURES[name] in text for text in texts)
    assert not any(second.values())  # rank 0 speaks for all


# Other entry points ---------------------------------------------------------------------------------------------------


class Predicting(Watched):
    def predict_step(self, batch, batch_idx):
        return self.net(batch[0]).flatten()


def use_other_entry_points(rank):
    results = {}
    module = Predicting(batch_norm=True, seed=1 + rank)
    fitting = trainer(2, SlowMoStrategy(SlowMo(sync_every=SYNC_EVERY)), max_epochs=1)

    def look():
        validated = fitting.validate(module, data(9), verbose=False)
        tested = fitting.test(module, data(9), verbose=False)
        predicted = torch.cat(fitting.predict(module, data(9))).tolist()
        return validated, tested, predicted, numbers(module)

    results["before"] = look()
    fitting.fit(module, data(rank))
    results["after"] = look()
    once = numbers(module)
    fitting.fit_loop.max_epochs = 2
    fitting.fit(module, data(rank))
    results["again"] = look()
    results["counts"] = fitting.global_step, fitting.strategy.report.count
    # The second fit of the same Trainer is a fit of a new one from where the first ended.
    other = Predicting(batch_norm=True)
    fresh = trainer(2, SlowMoStrategy(SlowMo(sync_every=SYNC_EVERY)), max_epochs=1)
    other.load_state_dict(dict(zip(other.state_dict(), _tensors(once, other), strict=True)))
    fresh.fit(other, data(rank))
    results["fresh"] = numbers(other)
    return results


def _tensors(values, module):
    state = module.state_dict().values()
    return [torch.tensor(value).view(t.shape).to(t.dtype) for value, t in zip(values, state, strict=True)]


@pytest.mark.processes
def test_fit_twice_and_validate_test_and_predict_before_and_after():
    first, second = run_trainers(2, use_other_entry_points)
    assert first == second
    (before, *_), (after, *_), (again, *_) = first["before"], first["after"], first["again"]
    assert before != after != again
    for stage in ("before", "after", "again"):
        validated, tested, predicted, _ = first[stage]
        assert validated == tested
        assert all_finite([predicted])
    assert first["again"][3] == first["fresh"]
    assert first["counts"][0] == 16


def find_rate(rank, folder):
    module = Watched(lr=0.001)
    fitting = trainer(2, SlowMoStrategy(SlowMo(sync_every=SYNC_EVERY)), max_epochs=1, default_root_dir=folder)
    start = numbers(module)
    found = Tuner(fitting).lr_find(module, data(rank, examples=80), num_training=20, update_attr=True, attr_name="lr")
    tuned = numbers(module)
    fitting.fit(module, data(rank))
    return found.suggestion(), module.hparams.lr, start == tuned, numbers(module)


@pytest.mark.processes
def test_lr_find_suggests_a_rate_restores_the_model_and_leaves_nothing_behind(tmp_path):
    first, second = run_trainers(2, find_rate, str(tmp_path))
    for suggestion, rate, restored, model in (first, second):
        assert 1e-8 < suggestion < 1
        assert rate == suggestion == first[0]
        assert restored
        assert model == first[3]
    assert not list(tmp_path.rglob("*"))
