"""Every file of ``conf/experiment``: it composes, fits what it configures, says what it stands for, and trains."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from recipes import config as configuration_check
from recipes.record import Record
from recipes.simulated import simulated
from tests.recipes.data import write_tar, write_tree
from tests.recipes.small_runs import CONF, configuration, run_all

FOLDER = CONF / "experiment"
EXPERIMENTS = sorted(str(path.relative_to(FOLDER).with_suffix("")) for path in FOLDER.rglob("[!_]*.yaml"))
OWN = {"cifar10_small", "digits", "multi30k", "text"}
"""Folders of experiments that are no paper's."""

SMALL_NETWORK = ["model=resnet20", "model.network.depth=8", "model.network.width=4"]
"""Instead of the paper's, which the first experiment of each folder trains: the others differ in their strategy."""

TABLE_1 = {
    "cifar10": {"local_sgd", "osgp", "sgp", "ar_sgd"},
    "imagenet": {"local_sgd", "osgp", "sgp", "ar_sgd"},
    "wmt16": {"local_adam", "sgp", "ar_adam"},
}


def folder_of(experiment: str) -> str:
    return experiment.partition("/")[0]


def test_all_rows_of_slowmos_table_are_there():
    for data, bases in TABLE_1.items():
        there = {name.partition("/")[2] for name in EXPERIMENTS if folder_of(name) == data}
        with_slowmo = {f"slowmo_{base}" for base in bases if data != "wmt16" or base != "ar_adam"}
        assert bases | with_slowmo <= there


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_it_composes_and_fits_what_it_configures(experiment, tmp_path):
    if folder_of(experiment) in ("multi30k", "wmt16") and find_spec("fairseq") is None:
        pytest.skip("fairseq is not installed: pip install 'lightning-slowmo[translation]'")
    config = configuration(tmp_path, [f"experiment={experiment}"])
    configuration_check.check(config)
    assert config.run.experiment == experiment
    paper = config.paper
    if folder_of(experiment) in OWN:
        assert paper is None
        return
    assert {"title", "arxiv", "table", "row", "value", "unstated"} <= set(paper)
    assert paper.value is None or isinstance(paper.value, float)
    assert paper.unstated


@pytest.mark.parametrize("experiment", {folder_of(name): name for name in EXPERIMENTS}.values())
def test_trainer_cpu_puts_it_on_this_machines_processor(experiment, tmp_path):
    trainer = configuration(tmp_path, [f"experiment={experiment}", "trainer=cpu"]).trainer
    assert (trainer.accelerator, trainer.num_nodes, trainer.precision) == ("cpu", 1, "32-true")
    assert trainer.devices in (2, 4)


@pytest.mark.parametrize(
    ("experiment", "machines"),
    [
        ("cifar10/sgp", (32, 1, "32-true")),
        ("qprsgd/ring", (1, 8, "32-true")),
        ("choco/sign", (1, 8, "32-true")),
    ],
)
def test_the_papers_machines_are_the_default(experiment, machines, tmp_path):
    trainer = configuration(tmp_path, [f"experiment={experiment}"]).trainer
    assert (trainer.num_nodes, trainer.devices, trainer.precision) == machines
    assert trainer.accelerator == "gpu"
    played = simulated(configuration(tmp_path, [f"experiment={experiment}", "trainer=simulated"]))
    assert played.strategy.workers == machines[0] * machines[1]


@pytest.mark.parametrize(
    ("experiment", "machines"), [("imagenet/sgp", (32, 8, "32-true")), ("wmt16/sgp", (8, 8, "16-mixed"))]
)
def test_the_papers_machines_with_several_processes_a_worker(experiment, machines, tmp_path):
    trainer = configuration(tmp_path, [f"experiment={experiment}"]).trainer
    assert (trainer.num_nodes, trainer.devices, trainer.precision) == machines


@pytest.mark.parametrize("experiment", [name for name in EXPERIMENTS if name.endswith("tau_sweep")])
def test_a_sweep_runs_by_itself_over_keys_that_exist(experiment, tmp_path):
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(CONF), version_base="1.3"):
        hydra = compose("train", [f"experiment={experiment}"], return_hydra_config=True).hydra
        assert str(hydra.mode) == "RunMode.MULTIRUN"
        for key, values in hydra.sweeper.params.items():
            for value in str(values).split(","):
                config = compose("train", [f"experiment={experiment}", f"{key}={value}"])
                if key != "strategy":
                    assert str(OmegaConf.select(config, key)) == value


@pytest.mark.processes
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.faults)])
def test_image_experiments_train(tmp_path, every):
    """One of each folder; in ``make faults`` every one. Strategies have tests of their own."""
    write_tree(tmp_path / "small", size=16)
    write_tar(tmp_path / "small", tmp_path / "small.tar.xz")
    write_tree(tmp_path / "large", size=40, split="val")
    runs: dict[Path, list[str]] = {}
    folders: set[str] = set()
    last = {folder_of(name): name for name in EXPERIMENTS}
    for experiment in EXPERIMENTS if every else last.values():
        if folder_of(experiment) in ("multi30k", "wmt16", "text"):
            continue  # in test_translation.py and test_text.py
        overrides = [f"experiment={experiment}", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.num_nodes=1"]
        overrides += ["trainer.max_epochs=1", "trainer.limit_train_batches=2", "data.batch_size=2"]
        overrides += ["trainer.limit_val_batches=2", "trainer.limit_test_batches=2"]
        config = configuration(tmp_path, overrides)
        large = folder_of(experiment) == "imagenet"
        if folder_of(experiment) in folders and "root" in config.data:
            overrides += [*SMALL_NETWORK, *(["model.network.classes=1000"] if large else [])]
        folders.add(folder_of(experiment))
        if "root" in config.data:
            overrides += [f"data.root={tmp_path}/large" if large else f"data.root={tmp_path}/small.tar.xz"]
            overrides += ["data.size=32", "data.resize=36", "data.num_workers=0"] if large else []
            overrides += [] if large else [f"data.cache={tmp_path}/cache"]
        if "workers_per_node" in config.strategy:
            overrides += ["strategy.workers_per_node=null"]
        if OmegaConf.select(config, "strategy.algorithm.sync_every"):
            overrides += ["strategy.algorithm.sync_every=2"]
        if OmegaConf.select(config, "strategy.algorithm.warmup_steps"):
            overrides += ["strategy.algorithm.warmup_steps=1"]
        runs[tmp_path / "runs" / experiment] = overrides
    assert len(runs) > (50 if every else 5)
    run_all(runs, limit=600)
    for folder, overrides in runs.items():
        record = Record.read(folder)
        assert f"experiment={record.experiment}" == overrides[0]
        assert (record.steps, record.epochs, record.workers) == (2, 1, 2)
        assert 0 <= record.value <= 100
        assert record.mb_sent > 0
        assert record.seconds > 0
        assert (folder / "csv" / "metrics.csv").is_file()
