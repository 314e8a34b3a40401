"""NaN on one worker or on all, and workers that do not start from the same point."""

import warnings

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_slowmo import Engine, LocalSGD, SlowMo, SlowMoStrategy, SyncError, Workers
from tests.harness import run, run_trainers
from tests.trainer.models import Regression, all_finite, data, distance, numbers, trainer

SYNC_EVERY = 4


class Poison(Callback):
    """NaN in the parameters and BatchNorm statistics of some ranks after six batches."""

    def __init__(self, *ranks):
        self.ranks = ranks
        self.after_sync = []

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == 6 and trainer.global_rank in self.ranks:
            with torch.no_grad():
                module.net[0].weight[0, 0] = float("nan")
                module.net[1].running_var[0] = float("inf")
        if trainer.global_step % SYNC_EVERY == 0:
            state = trainer.optimizers[0].state.values()
            self.after_sync.append((numbers(module), sum(len(entry) for entry in state)))


def fit(rank, size, on_nonfinite, poisoned, algorithm=None):
    module = Regression(adam=True, batch_norm=True)
    poison = Poison(*poisoned)
    strategy = SlowMoStrategy(algorithm or SlowMo(sync_every=SYNC_EVERY), on_nonfinite=on_nonfinite)
    fitting = trainer(size, strategy, callbacks=poison)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fitting.fit(module, data(rank))
            error = ""
        except SyncError as raised:
            error = str(raised)
    texts = [str(warning.message) for warning in caught if "NaN" in str(warning.message)]
    return numbers(module), poison.after_sync, error, texts


def fit_all(rank, size):
    return {
        "raise": fit(rank, size, "raise", [1]),
        "skip": fit(rank, size, "skip", [1]),
        "skip, plain averages": fit(rank, size, "skip", [1], LocalSGD(SYNC_EVERY)),
        "nobody": fit(rank, size, "raise", []),
        "all": fit(rank, size, "skip", range(size)),
    }


@pytest.fixture(scope="module")
def fits():
    return run_trainers(3, fit_all, 3)


@pytest.mark.processes
def test_raise_ends_all_workers_before_anything_is_averaged(fits):
    for rank, result in enumerate(fits):
        model, _, error, _ = result["raise"]
        assert "The parameters of rank 1 are NaN or infinite after 1 syncs. Nothing was averaged." in error
        assert all_finite(model) == (rank != 1)


@pytest.mark.processes
@pytest.mark.parametrize("name", ["skip", "skip, plain averages"])
def test_skip_leaves_the_worker_out_and_heals_it(fits, name):
    models, syncs, errors, texts = zip(*(result[name] for result in fits), strict=True)
    assert errors == ("", "", "")
    assert [len(text) for text in texts] == [1, 0, 0]
    assert "The parameters of rank 1 are NaN or infinite after 1 syncs. They are left out" in texts[0][0]
    assert models[0] == models[1] == models[2]
    assert all_finite(models[0])
    assert distance(models[0], fits[0]["nobody"][0]) > 1e-6  # it was not there for a while
    parameters = [0, 1, 2, 3, 7, 8]  # of the state dict; statistics are each worker's own at a sync
    for number, ((first, kept), (second, healed), (third, _)) in enumerate(zip(*syncs, strict=True)):
        for own in (second, third):
            assert [first[i] for i in parameters] == [own[i] for i in parameters]
        assert all_finite(second)
        assert kept > 0
        assert (healed == 0) == (number == 1)  # Adam's moments were NaN, and are forgotten


@pytest.mark.processes
def test_the_healthy_ones_keep_their_statistics_and_their_mean_heals_the_other(fits):
    (first, _), (second, _), (third, _) = (result["skip"][1][1] for result in fits)
    for own, a, b in zip(second[4:6], first[4:6], third[4:6], strict=True):
        assert own == pytest.approx([(x + y) / 2 for x, y in zip(a, b, strict=True)], abs=1e-6)
    assert first[4] != third[4]


@pytest.mark.processes
def test_nan_on_all_workers_is_an_error_also_with_skip(fits):
    for result in fits:
        error = result["all"][2]
        assert "The parameters of rank 0, rank 1, rank 2 are NaN or infinite" in error
        assert "No worker is left to recover from." in error


# Unequal starts -------------------------------------------------------------------------------------------------------


def start_engine(rank, kind):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.fill_(0.5)
        if rank == 2 and kind == "other value":
            module[0].weight[1, 2] += 1e-6
        if rank == 2 and kind == "other order":  # the same sum
            module[0].weight[0, 0], module[0].weight[0, 1] = 0.25, 0.75
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    try:
        Engine(LocalSGD(2), [optimizer], Workers.from_world(), module)
    except SyncError as error:
        return str(error)
    return ""


def start_engines(rank):
    return [start_engine(rank, kind) for kind in ("equal", "other value", "other order")]


@pytest.mark.processes
def test_an_unequal_start_is_reported_with_ranks():
    for equal, value, order in run(3, start_engines):
        assert equal == ""
        for text in (value, order):
            assert "The initial parameters differ between workers: rank 2 does not start from those of rank 0." in text
