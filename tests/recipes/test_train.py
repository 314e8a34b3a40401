"""The entry point: sweeps, errors before anything starts, and what is left of a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from lightning_slowmo import PRESETS
from recipes import config as configuration_check
from recipes import job, schedules, train
from recipes.record import Record
from recipes.simulated import simulated
from tests.harness import run_trainers
from tests.recipes.small_runs import CONF, configuration, run_all

SHORT = ["trainer.max_epochs=1", "trainer.limit_train_batches=4", "trainer.enable_progress_bar=false"]


def command_line(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Call ``python -m recipes.train`` in an empty folder."""
    environment = os.environ | {"PYTHONPATH": str(CONF.parent)}
    command = [sys.executable, "-m", "recipes.train", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)


def composed(*overrides: str):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", list(overrides))


# Groups ---------------------------------------------------------------------------------------------------------------


def test_there_is_a_strategy_for_each_preset_and_ddp():
    assert {path.stem for path in (CONF / "strategy").glob("[!_]*.yaml")} == {*PRESETS, "ddp", "slowmo_fsdp"}


@pytest.mark.parametrize("name", PRESETS)
def test_a_strategys_file_is_its_preset_spelled_out(name):
    config = composed(f"strategy={name}")
    configuration_check.check(config, groups=["strategy"])
    assert instantiate(config.strategy, _convert_="all").algorithm == PRESETS[name]
    written = OmegaConf.to_container(config.strategy.algorithm)
    assert {"_target_", *vars(PRESETS[name])} == set(written), "all arguments are there to be overridden"


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "compressor").glob("*.yaml")))
def test_a_compressor_can_be_put_into_a_strategy(name):
    config = composed("strategy=choco_sgd", f"compressor@strategy.algorithm.compressor={name}")
    configuration_check.check(config, groups=["strategy"])
    compressor = instantiate(config.strategy, _convert_="all").algorithm.compressor
    assert type(compressor).__name__.lower() == name.replace("_", "").removesuffix("l2")


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "trainer").glob("*.yaml")))
def test_trainers_fit_lightnings(name, tmp_path):
    machines = ["machines={num_nodes: 2, devices: 4, precision: 32-true}"] if name == "paper" else []
    config = simulated(configuration(tmp_path, [f"trainer={name}", *machines]))
    configuration_check.check(config, groups=["trainer"])


# Refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    [
        "strategy.algorithm.slow_momentm=0.4",
        "trainer.max_epoch=3",
        "sead=1",
        "strategy=slowmoo",
        "experiment=cifar10/x",
    ],
)
def test_typos_are_refused_by_hydra(override):
    with pytest.raises(ConfigCompositionException) as error:
        composed(override)
    assert override.partition("=")[0].rpartition(".")[2] in str(error.value) + str(error.value.__cause__)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+strategy.algorithm.slow_momentm=0.4"], r"strategy\.algorithm\.slow_momentm is not known: .*slow_momentum"),
        (["+data.batchsize=4"], r"data\.batchsize is not known: recipes\.images\.Digits takes batch_size"),
        (["+optimizer.rate=4"], r"optimizer\.rate is not known: torch\.optim\.SGD takes"),
        (["seed=one"], r"seed must be int, got 'one'"),
        (["mode=most"], r"mode must be 'max' or 'min', got 'most'"),
        (["trainer.max_epochs=many"], r"trainer\.max_epochs must be int or null, got 'many'"),
        (["data.batch_size=1.5"], r"data\.batch_size must be int, got 1\.5"),
        (["data.flip=perhaps"], r"data\.flip must be bool, got 'perhaps'"),
        (["data.mean=0.5"], r"data\.mean must be .*Sequence\[float\], got 0\.5"),
        (["optimizer.lr=fast"], r"optimizer\.lr must be float or Tensor, got 'fast'"),
        (["strategy.algorithm.slow_momentum=much"], r"slow_momentum must be float or Ramp, got 'much'"),
        (["strategy.algorithm.inner_buffers=lose"], r"inner_buffers must be 'reset' or .*'auto', got 'lose'"),
        (["strategy.algorithm.base=sgp"], r"strategy\.algorithm\.base must be Algorithm or null, got 'sgp'"),
        (["strategy.algorithm.slow_momentum=true"], r"slow_momentum must be float or Ramp, got True"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_starts(overrides, message, tmp_path):
    config = configuration(tmp_path, overrides)
    with pytest.raises(ValueError, match=message):
        configuration_check.check(config)


def test_values_that_fit_are_let_through(tmp_path):
    overrides = ["optimizer.lr=1", "trainer.max_epochs=null", "trainer.devices=[0,1]", "strategy.algorithm.base=null"]
    configuration_check.check(configuration(tmp_path, [*overrides, "ckpt_path=here.ckpt"]))


def test_several_machines_need_a_launcher_from_outside(tmp_path):
    config = configuration(tmp_path, ["trainer=multi_node"])
    with pytest.raises(ValueError, match=r"num_nodes=2.*torchrun --nnodes 2 --nproc-per-node 8"):
        train.processes_of(config.trainer)


@pytest.mark.parametrize(
    ("devices", "accelerator", "expected"), [(3, "cpu", 3), ([0, 2], "gpu", 2), ("auto", "cpu", 1)]
)
def test_as_many_processes_as_devices(devices, accelerator, expected):
    trainer = OmegaConf.create({"num_nodes": 1, "devices": devices, "accelerator": accelerator})
    assert train.processes_of(trainer) == expected


# Runs -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A sweep of two runs of two workers, from the command line."""
    folder = tmp_path_factory.mktemp("sweep")
    values = ["seed=3", "strategy.algorithm.slow_momentum=0,0.4", "strategy.algorithm.sync_every=2"]
    done = command_line(folder, "--multirun", *values, *SHORT, "hydra.sweep.dir=runs")
    assert done.returncode == 0, done.stderr
    return folder / "runs"


@pytest.mark.processes
def test_each_run_of_a_sweep_has_its_folder_and_nothing_else(sweep):
    assert sorted(path.name for path in sweep.iterdir()) == ["0", "1", "multirun.yaml"]
    for folder in ("0", "1"):
        assert {path.name for path in (sweep / folder).iterdir()} == {".hydra", "csv", "result.json", "train.log"}
    assert not (sweep.parent / "outputs").exists()


@pytest.mark.processes
def test_a_sweep_trains_with_what_it_sweeps_over(sweep):
    records = [Record.read(sweep / str(i)) for i in range(2)]
    assert [(r.seed, r.slow_momentum) for r in records] == [(3, 0.0), (3, 0.4)]
    for record, folder in zip(records, range(2), strict=True):
        overrides = yaml.safe_load((sweep / str(folder) / ".hydra" / "overrides.yaml").read_text())
        assert record.overrides == overrides
        assert (record.label, record.data, record.model, record.experiment) == ("slowmo", "digits", "mlp", None)
        assert (record.steps, record.epochs, record.workers, record.sync_every) == (4, 1, 2, 2)
        assert record.algorithm.startswith("SlowMo(")
        assert record.parameters == 64 * 64 + 64 + 64 * 10 + 10
        assert record.ms_per_step == pytest.approx(1000 * record.seconds / 4, abs=0.5)
        # two syncs and the mean for validation and at the end, each of 4 bytes a parameter, and small headers
        assert record.mb_sent == pytest.approx(2 * 4 * record.parameters / 1e6, rel=1.5)
    losses = [(sweep / str(i) / "csv" / "metrics.csv").read_text() for i in range(2)]
    assert len(set(losses)) == 2


@pytest.mark.processes
def test_progress_is_logged_beside_what_was_validated(sweep):
    import csv

    with (sweep / "0" / "csv" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["val/accuracy"]]
    assert len(rows) == 1
    record = Record.read(sweep / "0")
    assert float(rows[0]["progress/seconds"]) == pytest.approx(record.seconds, rel=0.5)
    assert 0 < float(rows[0]["progress/mb_sent"]) <= record.mb_sent


def _main(rank: int, folder: str) -> tuple:
    torch.manual_seed(0)
    value = train.main.__wrapped__(configuration(Path(folder), [*SHORT, "strategy=ddp", "model.network.hidden=8"]))
    return rank, value


@pytest.mark.processes
def test_processes_of_torchrun_are_the_workers_and_the_first_returns_the_metric(tmp_path):
    (first, value), (second, nothing) = run_trainers(2, _main, str(tmp_path))
    record = Record.read(tmp_path)
    assert (first, second, nothing) == (0, 1, None)
    assert value == record.value
    assert (record.workers, record.label) == (2, "ddp")
    assert record.mb_sent == pytest.approx(4 * 4 * record.parameters / 1e6)  # a ring of two sends each gradient once


@pytest.mark.processes
@pytest.mark.parametrize("strategy", ["slowmo", "ddp"])
def test_a_resumed_run_goes_on_and_so_does_what_it_measures(strategy, tmp_path):
    once = [f"strategy={strategy}", "trainer.limit_train_batches=4", "callbacks=checkpoint"]
    once += ["strategy.algorithm.sync_every=2"] if strategy == "slowmo" else []
    first, resumed, whole = (tmp_path / name for name in ("first", "resumed", "whole"))
    runs = {
        first: [*once, "trainer.max_epochs=1"],
        resumed: [*once, "trainer.max_epochs=2", f"ckpt_path={first}/checkpoints/last.ckpt"],
        whole: [*once, "trainer.max_epochs=2"],
    }
    run_all(runs)
    records = {folder: Record.read(folder) for folder in runs}
    assert [records[folder].steps for folder in runs] == [4, 8, 8]
    kept = torch.load(first / "checkpoints" / "last.ckpt", weights_only=False)["progress"]
    assert 0 < kept["seconds"] < records[resumed].seconds
    # what ended the first run (SlowMo's last mean) comes after its checkpoint
    assert records[resumed].mb_sent == pytest.approx(records[whole].mb_sent, rel=0.02)


@pytest.mark.faults
@pytest.mark.processes
def test_a_worker_that_fails_ends_the_run_with_its_message(tmp_path):
    done = command_line(tmp_path, *SHORT, "schedule=milestones", "schedule.drops=[0.9,0.1]", "hydra.run.dir=run")
    assert done.returncode == 1
    last = done.stderr[done.stderr.index("Error executing job") :]
    assert "of 2 failed with exit code 1. ValueError: drops must be ascending shares" in last
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.processes
def test_a_typo_on_the_command_line_is_one_readable_error(tmp_path):
    done = command_line(tmp_path, "strategy.algorithm.slow_momentm=0.4")
    assert done.returncode == 1
    assert "Could not override 'strategy.algorithm.slow_momentm'" in done.stderr
    assert "Traceback" not in done.stderr


# The record -----------------------------------------------------------------------------------------------------------


def test_a_record_is_read_as_it_was_written(tmp_path):
    record = Record(
        *("a/b", "slowmo", "SlowMo()", "digits", "mlp", ["seed=1"], 1, "test/accuracy", "max", 93.1),
        *(10, 2, 4, 1.5, 150.0, 0.25, 4810, 12, 0.7, {"torch": "2", "code": None}, {"value": 93.2}),
    )
    record.write(tmp_path / "new")
    assert Record.read(tmp_path / "new") == record
    assert json.loads((tmp_path / "new" / "result.json").read_text())["paper"] == {"value": 93.2}
    (tmp_path / "result.json").write_text('{"seed": 1}')
    with pytest.raises(ValueError, match="is not the record of a run"):
        Record.read(tmp_path)


def test_versions_name_the_commit():
    found = job.versions()
    assert {"lightning_slowmo", "torch", "lightning", "code"} <= set(found)
    assert found["code"] is None or len(found["code"]) == 40


# Schedules ------------------------------------------------------------------------------------------------------------


def rates(schedule, steps: int, lr: float = 2.0, **arguments) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = schedule(optimizer, total_steps=steps, steps_per_epoch=10, **arguments)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_milestones_rise_and_fall_where_they_should():
    found = rates(schedules.milestones, 100, warmup_epochs=2, warmup_from=0.25, drops=[0.5, 0.75], factor=0.1)
    assert found[20:50] == pytest.approx([2.0] * 30)
    assert found[50:75] == pytest.approx([0.2] * 25)
    assert found[75:] == pytest.approx([0.02] * 25)
    steps = [later - earlier for earlier, later in pairwise(found[:21])]
    assert steps == pytest.approx([1.5 / 21] * 20), "a straight line"
    assert found[0] == pytest.approx(0.5 + 1.5 / 21)
    with pytest.raises(ValueError, match="ascending"):
        rates(schedules.milestones, 1, drops=[0.5, 0.2])


def test_constant_and_cosine():
    assert rates(schedules.constant, 5) == [2.0] * 5
    found = rates(schedules.cosine, 100, warmup_epochs=2, final=0.1)
    assert found[20] == pytest.approx(2.0)
    assert found[60] == pytest.approx(0.1 * 2 + 0.9 * 2 * 0.5)
    assert found[-1] == pytest.approx(0.2, abs=0.01)
    assert found[:21] == sorted(found[:21])


def test_inverse_sqrt_is_fairseqs():
    found = rates(schedules.inverse_sqrt, 100, lr=5e-4, warmup_steps=25, warmup_init_lr=1e-7)
    assert found[0] == pytest.approx(1e-7)
    assert found[10] == pytest.approx(1e-7 + 10 * (5e-4 - 1e-7) / 25)
    assert found[25] == pytest.approx(5e-4)
    assert found[64] == pytest.approx(5e-4 * 5 / 8)
