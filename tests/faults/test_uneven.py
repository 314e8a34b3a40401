"""Workers that do not do the same: fewer batches, another epoch length, a wish to stop, or a SIGTERM of one's own."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_slowmo import SlowMo, SlowMoStrategy
from tests.harness import run_trainers
from tests.trainer.models import Regression, data, distance, numbers, trainer

SYNC_EVERY = 4


def strategy():
    return SlowMoStrategy(SlowMo(sync_every=SYNC_EVERY))


class Counted(Regression):
    """Counts batches, validates, and reduces a metric at the end of each epoch."""

    def __init__(self, **arguments):
        super().__init__(batch_norm=True, **arguments)
        self.batches, self.epochs = 0, []

    def training_step(self, batch, batch_idx):
        self.batches += 1
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def on_validation_end(self):
        self.epochs.append(float(self.trainer.callback_metrics["val_loss"]))

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), sync_dist=True)


def fit_uneven_inputs(rank, folder):
    module = Counted()
    saving = ModelCheckpoint(folder, "{step}", monitor="val_loss", save_top_k=-1)
    fitting = trainer(2, strategy(), callbacks=saving, enable_checkpointing=True)
    fitting.fit(module, data(rank, examples=(23, 11)[rank] * 4), data(9))
    metrics = {name: float(value) for name, value in fitting.callback_metrics.items()}
    return module.batches, numbers(module), metrics, module.epochs, fitting.strategy.report.count


def resume_uneven_inputs(rank, path):
    module = Counted()
    fitting = trainer(2, strategy(), max_epochs=3)
    fitting.fit(module, data(rank, examples=(23, 11)[rank] * 4), data(9), ckpt_path=path)
    return module.batches, numbers(module), fitting.global_step


@pytest.mark.processes
def test_23_and_11_batches_are_all_used_and_the_models_end_equal(tmp_path, recwarn):
    first, second = run_trainers(2, fit_uneven_inputs, str(tmp_path))
    assert (first[0], second[0]) == (46, 22)
    assert first[1:4] == second[1:4]
    assert first[4] == second[4] >= 2 * (23 // SYNC_EVERY)
    newest = tmp_path / "step=46.ckpt"
    own = sorted(file.name for file in next((tmp_path / "step=46.ckpt.slowmo").iterdir()).iterdir())
    assert own == ["rank00000.pt", "rank00001.pt", "shared.pt"]
    assert sorted(os.listdir(tmp_path)) == [f"step={n}.ckpt{end}" for n in (23, 46) for end in ("", ".slowmo")]
    state = torch.load(newest, weights_only=True)["state_dict"]
    assert len(state) == len(first[1])
    more = run_trainers(2, resume_uneven_inputs, str(newest))
    assert [(batches, step) for batches, _, step in more] == [(23, 69), (11, 33)]
    assert more[0][1] == more[1][1]


class Growing(torch.utils.data.IterableDataset):
    """One batch more in each epoch, or one less."""

    def __init__(self, rank):
        self.rank, self.length = rank, 6

    def __iter__(self):
        self.length += 1 - 2 * self.rank
        (inputs, targets), *_ = data(self.rank)
        return iter([(inputs, targets)] * self.length)


class StopOn(Callback):
    """One rank wants to stop after some batches."""

    def __init__(self, rank, batches):
        self.rank, self.batches = rank, batches

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_rank == self.rank and module.batches == self.batches:
            trainer.should_stop = True


class SignalOn(Callback):
    """One rank gets a signal after some batches; the others stay as they are."""

    def __init__(self, number, after):
        self.number, self.after = number, after

    def on_train_batch_end(self, trainer, module, *_):
        if module.batches == self.after.get(trainer.global_rank):
            os.kill(os.getpid(), self.number)


def fit_situations(rank, folder):
    """Run many situations in the same processes; each returns what the ranks must have in common or not."""
    results = {}
    module = Counted()
    trainer(2, strategy(), max_epochs=3).fit(
        module, torch.utils.data.DataLoader(Growing(rank), batch_size=None), data(9)
    )
    results["lengths"] = module.batches, numbers(module)

    for who in (0, 1):
        module = Counted()
        fitting = trainer(2, strategy(), max_epochs=50, callbacks=StopOn(who, 6))
        fitting.fit(module, data(rank), data(9))
        results["stop", who] = module.batches, numbers(module)

    for who in (0, 1):
        module = Counted()
        fitting = trainer(2, strategy(), max_epochs=50, callbacks=SignalOn(signal.SIGTERM, {who: 6}))
        start, how = time.monotonic(), "ended"
        try:
            fitting.fit(module, data(rank))
        except BaseException as error:  # SIGTERMException is a SystemExit
            how = type(error).__name__
        results["sigterm", who] = module.batches, how, time.monotonic() - start < 10, dist.is_initialized()
    return results


@pytest.fixture(scope="module")
def situations(tmp_path_factory):
    return run_trainers(2, fit_situations, str(tmp_path_factory.mktemp("situations")))


@pytest.mark.processes
def test_epoch_lengths_may_differ_and_change(situations):
    first, second = (result["lengths"] for result in situations)
    assert (first[0], second[0]) == (7 + 8 + 9, 5 + 4 + 3)
    assert first[1] == second[1]


@pytest.mark.processes
@pytest.mark.parametrize("who", [0, 1])
def test_a_wish_to_stop_on_one_rank_stops_all_at_the_next_sync(situations, who):
    first, second = (result["stop", who] for result in situations)
    batches = [first[0], second[0]]
    assert batches.pop(who) == 6  # it stops at once, and helps the other, who learns of it
    assert batches == [8]
    assert first[1] == second[1]
    assert distance(first[1], numbers(Counted())) > 1e-3


@pytest.mark.processes
@pytest.mark.parametrize("who", [0, 1])
def test_sigterm_to_one_rank_ends_both_at_the_same_sync(situations, who):
    first, second = (result["sigterm", who] for result in situations)
    assert first == second == (8, "SIGTERMException", True, True)


# Saves that a signal handler asks for ---------------------------------------------------------------------------------


class SignalInside(Counted):
    """Gets its signal where a handler can do most harm: after the forward pass, before the backward pass."""

    def __init__(self, after, **arguments):
        super().__init__(**arguments)
        self.after = after

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.batches == self.after:
            os.kill(os.getpid(), signal.SIGUSR1)
        return loss


def fit_with_a_save(rank, name, after, folder, **arguments):
    """Train 8 batches an epoch; a handler saves when the ``after``-th batch of this rank is under way."""
    module = SignalInside(after)
    fitting = trainer(2, strategy(), **arguments)
    path = f"{folder}/{name} {rank}.ckpt"
    signal.signal(signal.SIGUSR1, lambda *_: fitting.save_checkpoint(path))
    fitting.fit(module, data(rank), data(9))
    return module.batches, numbers(module)


def save_from_handlers(rank, folder):
    results = {
        name: fit_with_a_save(rank, name, after[rank], folder)
        for name, after in {"never": (None, None), "both": (5, 7), "first": (2, None), "second": (None, 7)}.items()
    }
    results["at the end"] = fit_with_a_save(rank, "at the end", (15, None)[rank], folder)
    module = Counted()
    trainer(2, strategy()).fit(module, data(rank), data(9), ckpt_path=f"{folder}/both 0.ckpt")
    return results | {"resumed": (module.batches, numbers(module))}


@pytest.mark.processes
def test_a_save_in_a_signal_handler_is_made_at_one_point_on_all_ranks(tmp_path):
    first, second = run_trainers(2, save_from_handlers, str(tmp_path))
    assert first == second
    assert all(result == first["never"] for name, result in first.items() if name != "resumed")
    assert sorted(file.name for file in tmp_path.glob("*.ckpt")) == [
        "at the end 0.ckpt",
        "both 0.ckpt",
        "first 0.ckpt",
        "second 1.ckpt",
    ]
    steps = {file.name: torch.load(file, weights_only=True)["global_step"] for file in tmp_path.glob("*.ckpt")}
    assert steps == {"at the end 0.ckpt": 16, "both 0.ckpt": 8, "first 0.ckpt": 4, "second 1.ckpt": 8}
    for file in tmp_path.glob("*.ckpt"):
        (beside,) = (tmp_path / f"{file.name}.slowmo").iterdir()
        assert len(list(beside.iterdir())) == 3
    assert first["resumed"][0] == 8
