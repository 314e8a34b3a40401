"""Experiments with all their workers in one process: configurations, tuning on held-out images, predicted seconds."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lightning_slowmo import PRESETS, Gossip, SlowMo
from lightning_slowmo.algorithms import Algorithm
from lightning_slowmo.plan.model import DDP, Link
from recipes import tune
from recipes.images import Digits
from recipes.record import Record
from recipes.report.__main__ import main as report
from recipes.report.predicted import Network, algorithm_of
from recipes.report.runs import Group, Run
from recipes.reproduce.__main__ import main as reproduce
from recipes.reproduce.launchers import Job
from recipes.reproduce.pool import _train, composed
from recipes.reproduce.tables import TABLES, chosen
from recipes.simulated import simulated


def configured(*overrides):
    return simulated(composed(Job("", Path("folder"), overrides)))


def test_a_paper_s_row_has_the_paper_s_number_of_workers():
    config = configured("experiment=cifar10/slowmo_local_sgd", "trainer=simulated")
    assert config.strategy._target_ == "lightning_slowmo.SimulatedStrategy"
    assert (config.strategy.workers, config.trainer.devices, config.trainer.num_nodes) == (32, 1, 1)
    assert config.strategy.algorithm.sync_every == 12
    assert "workers" not in config.trainer
    assert (
        configured("experiment=cifar10/slowmo_local_sgd", "trainer=simulated", "trainer.workers=8").strategy.workers
        == 8
    )


def test_ddp_is_simulated_by_what_it_does():
    config = configured("experiment=digits/ddp", "trainer=simulated")
    assert config.strategy.algorithm._target_ == "lightning_slowmo.AllReduce"


def test_other_trainers_are_left_alone():
    assert configured("experiment=digits/slowmo").strategy._target_ == "lightning_slowmo.SlowMoStrategy"


def test_options_that_need_processes_are_refused():
    with pytest.raises(ValueError, match=r"strategy.shard_slow_state needs processes"):
        configured("experiment=digits/slowmo", "trainer=simulated", "strategy.shard_slow_state=true")
    with pytest.raises(ValueError, match="does not say how many workers"):
        configured("experiment=digits/slowmo", "trainer=simulated", "trainer.devices=auto")


class Fitting:
    global_rank, world_size = 0, 1
    strategy = SimpleNamespace(root_device=torch.device("cpu"))


def test_images_that_are_held_out_are_validated_and_not_trained_on():
    data = Digits(batch_size=16, held_out=300)
    data.trainer = Fitting()
    data.setup("fit")
    train, val, test = (data.images[f"{part}_images"] for part in ("train", "val", "test"))
    every = Digits()
    every.trainer = Fitting()
    every.setup("fit")
    assert len(val) == 300
    assert len(train) + 300 == len(every.images["train_images"])
    assert torch.equal(test, every.images["test_images"])
    assert torch.equal(every.images["val_images"], test)
    both = torch.cat([train, val]).flatten(1).double().sum(1).sort().values
    assert torch.equal(both, every.images["train_images"].flatten(1).double().sum(1).sort().values)
    with pytest.raises(ValueError, match="held_out must be at least 0"):
        Digits(held_out=10**6)._split(every.read())


def test_a_row_is_tried_with_what_its_configuration_has(tmp_path):
    rows = {row.name: row for row in chosen(TABLES["digits"], "digits_(ddp|slowmo)$")}
    grid = ("optimizer.lr=0.1,0.2", "strategy.algorithm.slow_momentum=0.3,0.5,0.7")
    found = {name: tune.trials(row, grid, [1, 2], tmp_path, ()) for name, row in rows.items()}
    assert {name: len(trials) for name, trials in found.items()} == {"digits_ddp": 2, "digits_slowmo": 6}
    folders = {job.folder for trials in found.values() for trial in trials for job in trial.jobs}
    assert len(folders) == 2 * (2 + 6)


def test_the_best_mean_over_the_seeds_is_chosen_and_failures_never_are(tmp_path):
    (row,) = chosen(TABLES["digits"], "digits_ddp")
    found = tune.trials(row, ("optimizer.lr=0.1,0.2,0.3,0.4",), [1, 2], tmp_path, ())
    for trial, values in zip(found, [(80.0, 82.0), (90.0, 70.0), (float("nan"), 99.0), (99.0,)], strict=True):
        for job, value in zip(trial.jobs, values, strict=False):
            record(value=value).write(job.folder)
    best = tune.summary(found)["digits_ddp"]
    assert best["overrides"] == ["optimizer.lr=0.1"]
    assert best["score"] == 81.0
    assert best["runs"] == 7
    assert len(best["scores"]) == 4


def record(**changed):
    values = {
        "experiment": "digits/slowmo",
        "label": "slowmo",
        "algorithm": repr(SlowMo()),
        "data": "digits",
        "model": "mlp",
        "overrides": ["trainer=simulated"],
        "seed": 1,
        "metric": "val/accuracy",
        "mode": "max",
        "value": 1.0,
        "steps": 10,
        "epochs": 1,
        "workers": 4,
        "seconds": 1.0,
        "ms_per_step": 40.0,
        "mb_sent": 1.0,
        "parameters": 1000,
        "shapes": [[1000, 1000]],
    }
    return Record(**(values | changed))


@pytest.mark.parametrize("name", PRESETS)
def test_the_algorithm_of_a_record_is_known_again(name):
    assert algorithm_of(record(label=name, algorithm=repr(PRESETS[name]))) == PRESETS[name]


def test_no_text_of_a_record_is_executed():
    assert algorithm_of(record(algorithm="__import__('os').getcwd()")) is None
    assert algorithm_of(record(algorithm="SlowMo(base=print('x'))")) is None
    assert algorithm_of(record(algorithm="Engine(1, 2, 3)")) is None
    assert algorithm_of(record(label="ddp", algorithm="")) == DDP()
    assert isinstance(algorithm_of(record(algorithm=repr(SlowMo(Gossip())))), Algorithm)


def test_slower_links_take_longer_and_a_simulated_step_is_that_of_one_worker(tmp_path):
    group = Group((Run(tmp_path, record(), {}),), ())
    fast, slow = (Network(Link(bandwidth, 1e-4)).seconds_per_step(group) for bandwidth in (1e12, 1e8))
    assert 0.01 <= fast < 0.02 < slow
    real = Group((Run(tmp_path, record(overrides=[]), {}),), ())
    assert Network(Link(1e8, 1e-4)).seconds_per_step(real) is None
    assert Network(Link(1e8, 1e-4), step=0.01).seconds_per_step(real) == pytest.approx(slow)


@pytest.mark.processes
def test_tuned_rows_are_trained_and_reported(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = ["trainer.max_epochs=1", "data.batch_size=8"]
    grid = ["--grid", "optimizer.lr=0.01,0.3"]
    tune.main(["digits", "--rows", "local", *grid, "--workers", "4", "--held-out", "200", "--folder", "tune", *few])
    tuned = json.loads((tmp_path / "tune/digits/tuned.json").read_text())
    assert tuned["digits_local_sgd"]["overrides"] == ["optimizer.lr=0.3"]
    arguments = [
        "digits",
        "--rows",
        "local",
        "--launch",
        "simulated",
        "--workers",
        "4",
        "--parallel",
        "2",
        "--seeds",
        "1",
    ]
    # One pool of processes is enough: these runs stay in this one.
    monkeypatch.setattr(
        "recipes.reproduce.__main__.train_all", lambda jobs, processes: [j.name for j in jobs if _train(j)]
    )
    reproduce([*arguments, "--folder", "final", "--tuned", "tune/digits/tuned.json", *few])
    assert "local_sgd" in capsys.readouterr().out
    [written] = (tmp_path / "final").rglob("result.json")
    assert Record.read(written.parent).workers == 4
    assert "optimizer.lr=0.3" in Record.read(written.parent).overrides
    report(["final", "--bandwidth", "10mbit"])
    assert "predicted ms per step, 10 Mbit/s and 0.2 ms" in capsys.readouterr().out
    assert (tmp_path / "final/report/over_predicted_seconds.png").is_file()
    with pytest.raises(SystemExit):
        reproduce([*arguments[:2], "sgp", *arguments[3:], "--tuned", "tune/digits/tuned.json"])
    assert "has no choice for" in capsys.readouterr().err


def test_a_job_is_composed_as_the_command_line_would(tmp_path):
    config = composed(Job("a", tmp_path, ("experiment=digits/slowmo", "seed=3", "hydra.mode=RUN")))
    assert (config.seed, config.run.folder, config.run.strategy) == (3, str(tmp_path), "slowmo")
    assert config.run.overrides == ["experiment=digits/slowmo", "seed=3"]
