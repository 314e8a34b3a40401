"""Overlap and fragments in a Trainer: validation, uneven inputs, signals, another number of workers in mid-flight."""

import signal
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_slowmo import DiLoCo, LocalSGD, SlowMo, SlowMoStrategy
from tests.faults.test_uneven import Counted, SignalOn
from tests.harness import run_trainers
from tests.trainer.models import Regression, data, distance, numbers, trainer
from tests.trainer.test_checkpoints import StartOfTraining, alike
from tests.trainer.test_consensus import train

ALGORITHMS = [
    SlowMo(sync_every=4, overlap=3),
    LocalSGD(4, overlap=1, fragments=2),
    DiLoCo(6, overlap=1, fragments=3),
    LocalSGD(4, fragments=4),
]


def train_all(rank, folder):
    results = {}
    for index, algorithm in enumerate(ALGORITHMS):
        results["validation", index] = train(rank, algorithm, True, f"{folder}/{index}"), train(rank, algorithm, False)

        module = Counted(momentum=0.9)
        fitting = trainer(2, SlowMoStrategy(algorithm))
        fitting.fit(module, data(rank, examples=(23, 11)[rank] * 4), data(9))
        results["uneven", index] = module.batches, numbers(module), module.epochs, fitting.strategy.report.count

        module, how = Counted(), "ended"
        fitting = trainer(2, SlowMoStrategy(algorithm), callbacks=SignalOn(signal.SIGTERM, {1: 5}), max_epochs=50)
        try:
            fitting.fit(module, data(rank))
        except BaseException as error:  # SIGTERMException is a SystemExit
            how = type(error).__name__
        results["sigterm", index] = module.batches, how
    return results


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return run_trainers(2, train_all, str(tmp_path_factory.mktemp("streaming")), limit=120)


@pytest.mark.processes
@pytest.mark.parametrize("index", range(len(ALGORITHMS)))
def test_training_is_bit_identical_with_and_without_validation_in_mid_flight(runs, index):
    first, second = (run["validation", index] for run in runs)
    for (trained, validated, _, final, _), (straight, none, _, final_straight, _) in (first, second):
        assert trained == straight
        assert final == final_straight
        assert len(validated) == 4
        assert not none
    assert first[0][1] == second[0][1]  # both ranks validate the same models, with the same metrics
    assert first[0][2] == second[0][2]
    assert first[0][3] == second[0][3]
    assert distance(first[0][0][-2], second[0][0][-2]) > 1e-3


@pytest.mark.processes
@pytest.mark.parametrize("index", range(len(ALGORITHMS)))
def test_uneven_inputs_are_all_used_and_the_models_end_equal(runs, index):
    first, second = (run["uneven", index] for run in runs)
    assert (first[0], second[0]) == (46, 22)
    assert first[1:] == second[1:]


@pytest.mark.processes
@pytest.mark.parametrize("index", range(len(ALGORITHMS)))
def test_sigterm_to_one_rank_ends_both_at_the_same_sync(runs, index):
    first, second = (run["sigterm", index] for run in runs)
    assert first == second
    assert first[1] == "SIGTERMException"
    assert first[0] < 10


# Another number of workers --------------------------------------------------------------------------------------------

IN_FLIGHT = SlowMo(sync_every=7, overlap=2)  # an epoch is 8 steps


def save_in_flight(rank, folder):
    saving = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_epochs=1)
    fitting = trainer(2, SlowMoStrategy(IN_FLIGHT), callbacks=saving, enable_checkpointing=True, max_epochs=1)
    fitting.fit(Regression(), alike(rank))


def go_on(rank, size, path):
    module = StartOfTraining()
    fitting = trainer(size, SlowMoStrategy(IN_FLIGHT))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitting.fit(module, alike(rank), ckpt_path=path)
    return (*module.start, numbers(module), fitting.global_step, " ".join(str(w.message) for w in caught))


@pytest.mark.processes
@pytest.mark.parametrize("size", [1, 3])
def test_another_number_of_workers_goes_on_from_the_consensus_with_what_was_in_flight(tmp_path, size):
    run_trainers(2, save_in_flight, str(tmp_path))
    path = tmp_path / "step=8.ckpt"
    (beside,) = (tmp_path / "step=8.ckpt.slowmo").iterdir()
    (own,) = torch.load(beside / "rank00000.pt", weights_only=True)["local"]["units"]
    assert own["base"]["in_flight"]["steps"] == 1
    saved = [value.double().flatten().tolist() for value in torch.load(path, weights_only=True)["state_dict"].values()]
    results = run_trainers(size, go_on, size, str(path))
    for start, momentum, end, steps, _ in results:
        assert start == saved
        assert momentum == results[0][1]
        assert momentum[0] > 0
        assert steps == 16
        assert end == results[0][2]
    assert f"was saved by 2 workers and is continued by {size}" in results[0][4]
