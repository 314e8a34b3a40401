"""Schedules of ``sync_every`` through the Trainer: from flags, YAML and Hydra, by its epochs, and across a resume."""

import json

import hydra
import pytest
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI

from lightning_slowmo import (
    BMUF,
    QPRSGD,
    QSR,
    AllReduce,
    DiLoCo,
    LocalSGD,
    PostLocal,
    SlowMo,
    SlowMoStrategy,
    SQuARM,
    Stages,
)
from tests.harness import run_trainers
from tests.trainer.models import Regression, data, numbers, trainer
from tests.trainer.test_configuration import cli

KINDS = (LocalSGD, SlowMo, BMUF, DiLoCo, QPRSGD, SQuARM)
SCHEDULES = {
    "PostLocal": (PostLocal(20, 3), {"start": 20, "every": 3}),
    "QSR": (QSR(2, 0.25, warmup_steps=7), {"base": 2, "coefficient": 0.25, "warmup_steps": 7}),
    "Stages": (Stages({0: 1, 10: 4}, by="epoch"), {"stages": {0: 1, 10: 4}, "by": "epoch"}),
}


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_flags_yaml_and_hydra_give_the_schedule_to_every_algorithm(name, tmp_path):
    schedule, arguments = SCHEDULES[name]
    for kind in KINDS:
        flags = [f"--trainer.strategy.algorithm=lightning_slowmo.{kind.__name__}"]
        value = json.dumps({"class_path": f"lightning_slowmo.{name}", "init_args": arguments})
        flags += [f"--trainer.strategy.algorithm.sync_every={value}"]
        strategy = cli("--trainer.strategy=lightning_slowmo.SlowMoStrategy", *flags).trainer.strategy
        assert strategy.algorithm == kind(sync_every=schedule)
        target = {"_target_": f"lightning_slowmo.{kind.__name__}"}
        config = target | {"sync_every": {"_target_": f"lightning_slowmo.{name}"} | arguments}
        assert hydra.utils.instantiate(config) == kind(sync_every=schedule)
        assert hydra.utils.instantiate(config, _convert_="all") == kind(sync_every=schedule)
    file = tmp_path / "config.yaml"
    file.write_text(
        "trainer:\n  strategy:\n    class_path: lightning_slowmo.SlowMoStrategy\n    init_args:\n      algorithm:\n"
        "        class_path: lightning_slowmo.SlowMo\n        init_args:\n          sync_every:\n"
        f"            class_path: lightning_slowmo.{name}\n            init_args: {arguments!r}\n".replace("'", "")
    )
    quiet = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.logger=false"]
    made = LightningCLI(Regression, args=[f"--config={file}", *quiet], run=False, save_config_callback=None)
    assert made.trainer.strategy.algorithm == SlowMo(sync_every=schedule)


class Ends(Callback):
    """Collects the steps at which a period ended, and the learning rate of each step."""

    def __init__(self):
        self.steps, self.rates, self.count = [], [], 0

    def on_train_batch_start(self, trainer, *_):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, *_):
        if trainer.strategy.report.count > self.count:
            self.count = trainer.strategy.report.count
            self.steps.append(trainer.global_step)


def fit(schedule, epochs, folder=None, ckpt=None, save_at=None):
    seen, module = Ends(), Regression(warm_up=5)
    callbacks = [seen]
    if save_at is not None:
        callbacks.append(ModelCheckpoint(folder, "{step}", every_n_train_steps=save_at, save_top_k=-1))
    arguments = {"max_epochs": epochs, "callbacks": callbacks, "enable_checkpointing": save_at is not None}
    run = trainer(1, SlowMoStrategy(SlowMo(sync_every=schedule)), **arguments)
    run.fit(module, data(0), ckpt_path=ckpt)
    return seen, module


def test_qsr_takes_the_rate_of_a_periods_first_step_and_goes_on_from_a_checkpoint_in_its_middle(tmp_path):
    schedule = QSR(2, 0.06, warmup_steps=5)
    seen, module = fit(schedule, 4, tmp_path, save_at=16)
    expected, end = [], 0
    for length in schedule.periods(seen.rates):
        end += length
        expected.append(end)
    assert len({*schedule.periods(seen.rates)}) > 3
    assert seen.steps == expected[: len(seen.steps)]
    assert len(expected) - len(seen.steps) <= 1  # the last may be cut by the end of training
    assert 16 not in seen.steps  # so the checkpoint is of the middle of a period
    again, resumed = fit(schedule, 4, ckpt=tmp_path / "step=16.ckpt")
    assert again.steps == [step for step in seen.steps if step > 16]
    assert numbers(resumed) == numbers(module)


def test_stages_by_epoch_follow_the_trainers_epochs():
    seen, _ = fit(Stages({0: 1, 1: 4, 2: 8}, by="epoch"), 4)
    assert seen.steps == [*range(1, 9), 12, 16, 24, 32]


def post_local(rank, size):
    results = []
    for algorithm in (SlowMo(sync_every=PostLocal(10**6)), AllReduce(), SlowMo(sync_every=PostLocal(12, 4))):
        module = Regression(momentum=0.5)
        run = trainer(size, SlowMoStrategy(algorithm), max_epochs=2)
        run.fit(module, data(rank))
        results.append((numbers(module), run.strategy.report.count))
    return results


@pytest.mark.processes
def test_post_local_is_allreduce_through_the_trainer_until_it_starts():
    for never, allreduce, started in run_trainers(2, post_local, 2):
        assert never == allreduce
        assert started[0] != allreduce[0]
        assert started[1] == 2  # the beginning of local steps at step 12, and the end of a period at 16
