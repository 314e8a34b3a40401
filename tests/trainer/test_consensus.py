"""Validation, test and checkpoints see the mean of the workers, and training does not notice."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_slowmo import BMUF, LocalSGD, SlowMo, SlowMoStrategy
from tests.harness import run_trainers
from tests.trainer.models import Regression, all_finite, data, distance, numbers, trainer

EXACT = 1e-6  # the mean of float32 numbers, computed in float64 here


class Watched(Regression):
    """Remembers each rank's own model after every batch, and the model that is validated."""

    def __init__(self, **arguments):
        super().__init__(batch_norm=True, **arguments)
        self.trained, self.validated, self.metrics = [], [], []

    def on_train_batch_end(self, *_):
        self.trained.append(numbers(self))

    def on_validation_epoch_end(self):
        self.validated.append((len(self.trained), self.training, numbers(self)))

    def on_validation_end(self):
        self.metrics.append(float(self.trainer.callback_metrics["val_loss"]))


def mean(first, second):
    return [[(a + b) / 2 for a, b in zip(x, y, strict=True)] for x, y in zip(first, second, strict=True)]


def train(rank, algorithm, validate, folder=None):
    module = Watched()
    arguments = {"limit_val_batches": 0}
    if validate:
        saving = ModelCheckpoint(folder, "{step}", monitor="val_loss", save_top_k=-1, save_on_train_epoch_end=False)
        arguments = {"val_check_interval": 3, "callbacks": saving, "enable_checkpointing": True}
    fitting = trainer(2, SlowMoStrategy(algorithm), **arguments)
    fitting.fit(module, data(rank), data(9) if validate else None)
    tested = fitting.test(module, data(9), verbose=False)
    return module.trained, module.validated, module.metrics, numbers(module), tested


def train_with_and_without_validation(rank, folder):
    algorithms = LocalSGD(5), SlowMo(sync_every=5), BMUF(sync_every=5)
    return [
        (train(rank, algorithm, True, f"{folder}/{i}"), train(rank, algorithm, False))
        for i, algorithm in enumerate(algorithms)
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("consensus")
    return folder, run_trainers(2, train_with_and_without_validation, str(folder))


@pytest.mark.processes
def test_training_is_bit_identical_with_and_without_validation(runs):
    for ranks in runs[1]:
        for validating, without in ranks:
            assert validating[0] == without[0]
            assert validating[3] == without[3]
            assert len(validating[1]) == 4
            assert not without[1]


@pytest.mark.processes
def test_validation_sees_the_mean_of_the_workers_with_their_batch_norm_statistics(runs):
    for (first, _), (second, _) in zip(*runs[1], strict=True):
        for (step, training, seen), (_, _, seen_there) in zip(first[1], second[1], strict=True):
            assert not training
            assert seen == seen_there
            own, other = first[0][step - 1], second[0][step - 1]
            assert distance(own, other) > 1e-3  # else there is nothing to agree on
            assert distance(seen, mean(own, other)) < EXACT
        assert first[2] == second[2]
        assert len(set(first[2])) > 1


@pytest.mark.processes
def test_checkpoints_hold_the_model_that_was_validated(runs):
    for index, (first, _) in enumerate(runs[1][0]):
        for step, _, seen in first[1]:
            file = runs[0] / str(index) / f"step={step}.ckpt"
            state = torch.load(file, weights_only=True)["state_dict"]
            assert [value.double().flatten().tolist() for value in state.values()] == seen


@pytest.mark.processes
def test_all_ranks_end_with_the_mean_including_buffers(runs):
    for (first, _), (second, _) in zip(*runs[1], strict=True):
        assert first[3] == second[3]
        assert distance(first[3], mean(first[0][-1], second[0][-1])) < EXACT
        assert distance(first[0][-1], second[0][-1]) > 1e-3
        assert first[4] == second[4]  # metrics of trainer.test


def train_from_a_rate_of_zero(rank):
    models = []
    for adam in (False, True):
        module = Regression(warm_up=6, adam=adam)
        trainer(2, SlowMoStrategy(SlowMo(sync_every=1)), max_epochs=1).fit(module, data(rank))
        models.append(numbers(module))
    return models


@pytest.mark.processes
def test_a_learning_rate_of_zero_in_warm_up_gives_finite_equal_models():
    first, second = run_trainers(2, train_from_a_rate_of_zero)
    assert first == second
    start = numbers(Regression())
    for model in first:
        assert all_finite(model)
        assert distance(model, start) > 1e-2
