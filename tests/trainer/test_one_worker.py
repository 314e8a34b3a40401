"""A single worker under every preset, and checkpoints that go from one worker to three and back."""

import os
import warnings

import pytest
import torch

from lightning_slowmo.presets import PRESETS
from tests.harness import run_trainers
from tests.trainer.models import TAKE_ADAM, Regression, all_finite, data, distance, numbers, trainer


class Start(Regression):
    """Remembers the model that training starts from."""

    def on_train_start(self):
        self.start = numbers(self)


def train_all(rank, size, folder, before, epochs):
    """Train every preset, from the checkpoints of another folder if there is one; save it in this one."""
    results = {}
    for name in PRESETS:
        module = Start(adam=name in TAKE_ADAM)
        fitting = trainer(size, name, max_epochs=epochs)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fitting.fit(module, data(rank, examples=16), ckpt_path=f"{before}/{name}.ckpt" if before else None)
        fitting.save_checkpoint(f"{folder}/{name}.ckpt")
        texts = [str(warning.message) for warning in caught if "worker" in str(warning.message)]
        results[name] = module.start, numbers(module), fitting.global_step, texts
    return results


def weights(path):
    state = torch.load(path, weights_only=True)["state_dict"]
    return [value.double().flatten().tolist() for value in state.values()]


@pytest.mark.processes
def test_every_preset_trains_alone_then_with_three_workers_then_alone_again(tmp_path):
    before = None
    for epochs, size in enumerate((1, 3, 1), start=1):
        folder = tmp_path / str(epochs)
        results = run_trainers(size, train_all, size, str(folder), before and str(before), epochs, limit=120)
        for name in PRESETS:
            start, end, steps, texts = results[0][name]
            assert all(result[name][:2] == (start, end) for result in results), name
            assert all_finite(end), name
            assert distance(start, end) > 1e-3, name
            assert steps == 4 * epochs, name
            assert weights(folder / f"{name}.ckpt") == end, name
            if before:
                assert start == weights(before / f"{name}.ckpt"), name
                assert any("workers" in text for text in texts), name
        before = folder


def train_plainly(rank, strategy):
    module = Regression(momentum=0.9)
    trainer(1, strategy).fit(module, data(3))
    return numbers(module)


@pytest.mark.processes
@pytest.mark.parametrize("name", ["local_sgd", "dpsgd", "sgp"])
def test_one_worker_that_only_averages_trains_as_without_a_strategy(name):
    assert run_trainers(1, train_plainly, name) == run_trainers(1, train_plainly, "ddp")


def train_alone_then_with_another(rank):
    trainer(1, "slowmo").fit(Regression(), data(0))
    os.environ["WORLD_SIZE"] = "2"  # as a Trainer(devices=2) in the same script sees it
    trainer(2, "slowmo").fit(Regression(), data(0))


@pytest.mark.processes
def test_a_process_group_of_an_earlier_trainer_with_fewer_devices_is_refused():
    (error,) = run_trainers(1, train_alone_then_with_another, expect_failure=True)
    assert "RuntimeError: torch.distributed was initialized with 1 process(es) before" in error
    assert "this one has 2" in error
