"""How a fit begins and ends when workers are not at the same place: no batches, limits of one rank, a skipped loop."""

import os
import signal
import time
from datetime import timedelta

import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, Timer
from torch.utils.data import DataLoader, IterableDataset

from lightning_slowmo import Gossip, LocalSGD, SlowMo, SlowMoStrategy
from tests.harness import run_trainers
from tests.trainer.models import Regression, data, numbers, trainer

SYNC_EVERY = 4


def strategy(algorithm=None):
    return SlowMoStrategy(algorithm or SlowMo(sync_every=SYNC_EVERY), sync_timeout=timedelta(seconds=30))


class Counted(Regression):
    """Counts batches and validations, and logs metrics of the three kinds."""

    def __init__(self, **arguments):
        super().__init__(batch_norm=True, **arguments)
        self.mean = torchmetrics.MeanMetric()
        self.batches, self.validations, self.values = 0, [], []

    def training_step(self, batch, batch_idx):
        self.batches += 1
        self.values.append(float(batch[0].sum()))
        self.mean(batch[0].sum())
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        self.log("sum", batch[0].sum(), on_step=False, on_epoch=True, sync_dist=True, batch_size=1)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def on_validation_end(self):
        self.validations.append(float(self.trainer.callback_metrics["val_loss"]))


class Stream(IterableDataset):
    """Batches without a length; as many in each epoch as a list says."""

    def __init__(self, seed, counts):
        self.batches, self.counts, self.epoch = list(data(seed, examples=4 * max(1, *counts))), counts, 0

    def __iter__(self):
        count = self.counts[min(self.epoch, len(self.counts) - 1)]
        self.epoch += 1
        return iter(self.batches[:count])


def stream(rank, *counts):
    return DataLoader(Stream(rank, counts), batch_size=None)


def fit(size, module, train, validate=None, algorithm=None, **arguments):
    """Fit, and return what the ranks must have in common, or not."""
    fitting = trainer(size, strategy(algorithm), **arguments)
    start = time.monotonic()
    fitting.fit(module, train, validate)
    metrics = {name: round(float(value), 5) for name, value in fitting.callback_metrics.items()}
    return {
        "batches": module.batches,
        "model": numbers(module),
        "validations": module.validations,
        "metrics": metrics,
        "values": module.values,
        "epoch": fitting.current_epoch,
        "rate": fitting.optimizers[0].param_groups[0]["lr"] if fitting.optimizers else None,
        "seconds": time.monotonic() - start,
    }


class Scheduled(Counted):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), "interval": "epoch"}]


class Lengths(Counted):
    def __init__(self):
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True


def fit_without_batches(rank, size, folder):
    """The last rank has no batch in some epoch, or in any."""
    empty = rank == size - 1
    saving = ModelCheckpoint(f"{folder}/saved", "{epoch}", monitor="val_loss", save_top_k=-1)
    stopping = EarlyStopping("train_loss", patience=10)
    results = {
        "never": fit(
            size, Scheduled(), stream(rank, 0 if empty else 6), data(9), callbacks=[saving, stopping],
            enable_checkpointing=True,
        )
    }  # fmt: skip
    saving = ModelCheckpoint(f"{folder}/without validation", "{epoch}", monitor="train_loss", save_top_k=-1)
    results["without validation"] = fit(
        size, Counted(), stream(rank, 0 if empty else 6), callbacks=saving, enable_checkpointing=True
    )
    results["at first"] = fit(size, Counted(), stream(rank, *((0, 3) if empty else (6, 6))), data(9), max_epochs=2)
    results["later"] = fit(size, Counted(), stream(rank, *((3, 0, 3) if empty else (6,))), data(9), max_epochs=3)
    loader = DataLoader([], batch_size=4) if empty else data(rank, examples=24)
    results["length 0"] = fit(size, Lengths(), loader, data(9))
    results["nobody"] = fit(size, Counted(), stream(rank, 0), data(9))
    return results


@pytest.fixture(scope="module", params=[3])
def without_batches(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("without")
    return folder, run_trainers(request.param, fit_without_batches, request.param, str(folder), limit=90)


COUNTS = {
    "never": (12, 0),
    "without validation": (12, 0),
    "at first": (12, 3),
    "later": (18, 6),
    "length 0": (12, 0),
    "nobody": (0, 0),
}


@pytest.mark.processes
@pytest.mark.parametrize("name", list(COUNTS))
def test_a_worker_without_a_batch_helps_the_others_to_the_end(without_batches, name):
    folder, results = without_batches
    results = [result[name] for result in results]
    *others, last = results
    assert [result["batches"] for result in results] == [COUNTS[name][0]] * len(others) + [COUNTS[name][1]]
    for key in ("model", "metrics", "validations", "epoch", "rate"):
        assert last[key] == others[0][key] == others[-1][key], key
    if name in ("never", "later", "at first"):
        assert len(last["validations"]) == last["epoch"]
    if name == "never":
        assert last["rate"] == 0.05 / 4
    if name in ("never", "without validation"):
        saved = sorted(path.name for path in (folder / {"never": "saved"}.get(name, name)).glob("*.ckpt"))
        assert saved == ["epoch=0.ckpt", "epoch=1.ckpt"]
    if name in ("never", "at first"):
        final = [value for result in results for value in result["values"][len(result["values"]) // 2 :]]
        final = final if name == "never" else [v for r in others for v in r["values"][6:]] + last["values"]
        assert last["metrics"]["mean"] == pytest.approx(sum(final) / len(final), abs=1e-4)
        assert last["metrics"]["sum"] == pytest.approx(sum(final) / len(final), abs=1e-4)


# One rank reaches a limit ---------------------------------------------------------------------------------------------


class Late(Counted):
    """Takes its time for a batch, so that clocks can be told apart from counts."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def training_step(self, batch, batch_idx):
        time.sleep(self.seconds)
        return super().training_step(batch, batch_idx)


class StopAtEpochEnd(Callback):
    """One rank wants to stop when an epoch's metrics have been computed already."""

    def __init__(self, rank):
        self.rank = rank

    def on_train_epoch_end(self, trainer, *_):
        trainer.should_stop |= trainer.global_rank == self.rank


def fit_limits(rank, size, folder):
    """Ranks with 5 and 23 batches, of which one reaches a limit long before the other."""
    few = rank < size - 1
    results = {}
    steps = {"max_steps": 7, "max_epochs": -1}
    long, short = data(rank, examples=92), data(rank, examples=20)
    uneven = short if few else long
    results["max_steps"] = fit(size, Counted(), uneven, data(9), **steps)
    results["max_steps, no validation"] = fit(size, Counted(), uneven, **steps)
    results["max_steps, silent"] = fit(size, Silent(), uneven, **steps)
    results["max_steps, short stream"] = fit(size, Counted(), stream(rank, 0 if few else 23), data(9), **steps)
    results["max_steps, even"] = fit(size, Counted(), data(rank, examples=20), data(9), **steps)
    results["stop at an epoch's end"] = fit(size, Counted(), uneven, callbacks=StopAtEpochEnd(0), max_epochs=9)
    # The timer of the rank with the slow batches counts from an hour ago.
    for who in (0, size - 1):
        timer = Timer("00:00:40:00")
        if rank == who:
            timer.load_state_dict({"time_elapsed": {"train": 2399.6}})
        results["max_time", who] = fit(size, Late(0.02), uneven, data(9), callbacks=timer, max_epochs=500)
    # One clock runs ahead, so that the ranks want to validate at different batches.
    module = Late(0.05 if few else 0.02)
    results["val_check_interval by time"] = fit(
        size, module, long, data(9), val_check_interval="00:00:00:01", check_val_every_n_epoch=None
    )
    results["val_check_interval"] = fit(
        size, Counted(), data(rank, examples=16 if few else 32), data(9), val_check_interval=4
    )
    return results


class Silent(Counted):
    """Logs nothing: nothing but the end of an epoch brings the workers together."""

    def training_step(self, batch, batch_idx):
        self.batches += 1
        return self.loss(batch)


@pytest.fixture(scope="module", params=[3])
def limits(request, tmp_path_factory):
    return run_trainers(request.param, fit_limits, request.param, str(tmp_path_factory.mktemp("limits")), limit=120)


@pytest.mark.processes
def test_max_steps_of_one_rank_is_a_wish_to_stop(limits):
    size = len(limits)
    for name in ("max_steps", "max_steps, no validation", "max_steps, silent", "max_steps, short stream"):
        results = [result[name] for result in limits]
        assert [result["batches"] for result in results] == [0 if "stream" in name else 5] * (size - 1) + [7], name
        assert all(result["model"] == results[0]["model"] for result in results), name
        assert all(result["metrics"] == results[0]["metrics"] for result in results), name
        assert all(result["validations"] == results[0]["validations"] for result in results), name
    results = [result["max_steps, even"] for result in limits]
    assert [(result["batches"], len(result["validations"])) for result in results] == [(7, 1)] * size


@pytest.mark.processes
def test_max_time_of_one_rank_is_a_wish_to_stop(limits):
    for who in (0, len(limits) - 1):
        results = [result["max_time", who] for result in limits]
        assert all(result["model"] == results[0]["model"] for result in results)
        assert all(result["validations"] == results[0]["validations"] for result in results)
        assert all(0 < result["seconds"] < 10 for result in results)


@pytest.mark.processes
def test_a_wish_to_stop_after_an_epochs_metrics_reaches_the_others_before_the_next(limits):
    results = [result["stop at an epoch's end"] for result in limits]
    assert [result["batches"] for result in results] == [5] * (len(limits) - 1) + [23]
    assert all(result["model"] == results[0]["model"] for result in results)


@pytest.mark.processes
@pytest.mark.parametrize("name", ["val_check_interval", "val_check_interval by time"])
def test_whoever_validates_more_often_is_joined_by_those_at_the_end_of_their_epoch(limits, name):
    results = [result[name] for result in limits]
    assert all(result["model"] == results[0]["model"] for result in results)
    assert all(result["validations"] == results[0]["validations"] for result in results)
    assert len(results[0]["validations"]) >= 2
    if name == "val_check_interval":
        assert len(results[0]["validations"]) == 4


# How fits end ---------------------------------------------------------------------------------------------------------


def spread_and_end(rank, size, folder):
    """Ends of fits in which the Trainer's loop does not reach its end, or does not begin."""
    results = {}
    path = f"{folder}/local.ckpt"
    for name, algorithm in (("SlowMo", SlowMo(sync_every=5)), ("LocalSGD", LocalSGD(3)), ("Gossip", Gossip("ring"))):
        saving = ModelCheckpoint(f"{folder}/{name}", "{epoch}")
        module = Counted()
        fit(size, module, data(rank, examples=28), algorithm=algorithm, max_epochs=1, callbacks=saving,
            enable_checkpointing=True)  # fmt: skip
        path = f"{folder}/{name}/epoch=0.ckpt"
        for how, arguments in {
            "finished": {"max_epochs": 1},
            "max_steps": {"max_steps": 7, "max_epochs": -1},
            "zero epochs": {"max_epochs": 0},
            "no batches": {"limit_train_batches": 0},
        }.items():
            module = Counted()
            fitting = trainer(size, strategy(algorithm), **arguments)
            fitting.fit(module, data(rank, examples=28), ckpt_path=path)
            fitting.save_checkpoint(f"{folder}/{name} {how}.ckpt")
            results[name, how] = module.batches, numbers(module)
    module = Counted()
    before = numbers(module)
    trainer(size, strategy(LocalSGD(3)), max_epochs=0).fit(module, data(rank))
    results["untrained"] = before, numbers(module)
    return results


@pytest.fixture(scope="module", params=[3])
def ended(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ended")
    return folder, run_trainers(request.param, spread_and_end, request.param, str(folder), limit=120)


@pytest.mark.processes
@pytest.mark.parametrize("name", ["SlowMo", "LocalSGD", "Gossip"])
@pytest.mark.parametrize("how", ["finished", "max_steps", "zero epochs", "no batches"])
def test_a_resumed_fit_that_has_nothing_to_train_ends_with_the_consensus(ended, name, how):
    folder, results = ended
    results = [result[name, how] for result in results]
    assert all(result == (0, results[0][1]) for result in results)
    state = torch.load(folder / f"{name} {how}.ckpt", weights_only=True)["state_dict"]
    assert [tensor.double().flatten().tolist() for tensor in state.values()] == results[0][1]
    local = [torch.load(path, weights_only=True) for path in sorted((folder / name).glob("*.slowmo/*/rank*.pt"))]
    assert len(local) == len(results)


@pytest.mark.processes
def test_a_fit_that_does_nothing_changes_no_bit(ended):
    for result in ended[1]:
        before, after = result["untrained"]
        assert before == after


# Ctrl-C ---------------------------------------------------------------------------------------------------------------


class Interrupted(Callback):
    """Gets Ctrl-C after some batches, each rank after others."""

    def __init__(self, after):
        self.after = after

    def on_train_batch_end(self, trainer, module, *_):
        if module.batches == self.after:
            os.kill(os.getpid(), signal.SIGINT)


class Marks(Callback):
    """Tells the parent of the processes when this rank has trained some batches."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, module, *_):
        if module.batches == 6:
            open(self.path, "w").close()


def fit_interrupted(rank, size, folder):
    results = []
    for callback in (Interrupted(6 + rank), Marks(f"{folder}/{rank}")):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        waits = isinstance(callback, Marks)
        module = Late(0.2 if waits and rank else 0.0)
        fitting = trainer(size, strategy(), max_epochs=50, callbacks=callback)
        with pytest.raises(SystemExit):
            fitting.fit(module, data(rank, examples=400 if waits else 32), data(9))
        results.append((module.batches, numbers(module)))
    return results


def interrupt(folder, processes):
    """Press Ctrl-C while rank 0 waits at a sync for the others, who are slow."""
    deadline = time.monotonic() + 60
    while not (folder / "1").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    for process in processes:
        os.kill(process.pid, signal.SIGINT)


@pytest.mark.processes
@pytest.mark.parametrize("size", [2, 3])
def test_after_an_interrupt_of_all_workers_all_hold_the_consensus(tmp_path, size):
    results = run_trainers(size, fit_interrupted, size, str(tmp_path), meanwhile=lambda p: interrupt(tmp_path, p))
    for each in range(2):
        batches, models = zip(*(result[each] for result in results), strict=True)
        assert all(model == models[0] for model in models), each
        assert max(batches) <= 9, batches
    assert [result[0][0] for result in results] == [6, 7, 8][:size]
