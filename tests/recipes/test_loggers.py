"""What the loggers write, and that they all write the same."""

import csv
import math
import re
import struct
import zlib

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from wandb.proto.wandb_internal_pb2 import Record
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from recipes.job import versions
from tests.recipes.small_runs import CONF, configuration, run_all

PAPER = {"title": "SlowMo", "arxiv": "1910.00643", "table": "Table 1", "row": "a test", "value": 93.2, "unit": "%"}
SETTINGS = [
    "strategy=slowmo",
    "strategy.algorithm.sync_every=5",
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=23",
]


def read_wandb(path):
    """The records of a W&B file: a LevelDB log of wandb's own protobuf messages; wandb reads it in Go alone."""
    content = path.read_bytes()
    assert content[:4] == b":W&B"
    place, size, message = 7, 32768, b""
    while place < len(content):
        if size - place % size < 7:  # no header fits into the rest of this block
            place += size - place % size
            continue
        checksum, length, kind = struct.unpack("<IHB", content[place : place + 7])
        if not kind:
            break
        piece = content[place + 7 : place + 7 + length]
        assert zlib.crc32(bytes([kind]) + piece) == checksum
        message += piece
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record = Record()
            record.ParseFromString(message)
            yield record
            message = b""


def nested(item):
    return ".".join(item.nested_key) or item.key


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    paper = ",".join(f"{name}:{value!r}" for name, value in PAPER.items())
    run_all({folder: [*SETTINGS, "logger=wandb", "seed=4", "sweep_name=tests", "paper={" + paper + "}"]})
    return folder


@pytest.fixture(scope="module")
def records(logged):
    (path,) = logged.glob("wandb/offline-run-*/run-*.wandb")
    return list(read_wandb(path))


@pytest.mark.processes
def test_wandb_has_every_number_of_the_csv_file(logged, records):
    ours = []
    with (logged / "csv" / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            step = int(row.pop("step"))
            ours.append((step, {name: float(value) for name, value in row.items() if value}))
    theirs = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            row = {nested(item): yaml.safe_load(item.value_json) for item in record.history.item}
            step = row.pop("trainer/global_step")
            theirs.append((step, {name: value for name, value in row.items() if not name.startswith("_")}))
    assert len(ours) == len(theirs) >= 7  # four syncs, two training losses, validation, progress and test at its end
    for (step, mine), (other_step, other) in zip(ours, theirs, strict=True):
        assert step == other_step
        assert mine.keys() == other.keys()
        assert all(math.isclose(mine[name], other[name], rel_tol=1e-9, abs_tol=1e-12) for name in mine)
    names = {name for _, row in ours for name in row}
    assert {"sync/bytes_sent", "sync/drift", "train/loss", "val/accuracy", "test/accuracy", "progress/mb_sent"} <= names


@pytest.mark.processes
def test_wandb_knows_the_configuration_the_code_and_the_paper(records):
    config = {}
    for record in records:
        updates = {"run": record.run.config, "config": record.config}.get(record.WhichOneof("record_type"))
        config |= {nested(item): yaml.safe_load(item.value_json) for item in (updates.update if updates else ())}
    assert config["strategy"]["algorithm"]["sync_every"] == 5
    assert config["seed"] == 4
    assert config["paper"] == PAPER
    assert config["versions"] == versions() | {"code": config["versions"]["code"]}
    assert re.fullmatch("[0-9a-f]{40}", config["versions"]["code"] or "0" * 40)  # null outside a repository
    assert config["run"]["strategy"] == "slowmo"
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (run.project, run.run_group, list(run.tags)) == ("lightning-slowmo", "tests", ["slowmo", "digits", "mlp"])


@pytest.mark.parametrize(
    ("choice", "expected"), [("csv", [CSVLogger]), ("wandb", [CSVLogger, WandbLogger]), ("none", [])]
)
def test_each_choice_is_a_dict_of_loggers(tmp_path, choice, expected):
    config = configuration(tmp_path, [f"logger={choice}"])
    loggers = [instantiate(each) for each in config.logger.values()]
    assert [type(logger) for logger in loggers] == expected
    assert all(logger.log_dir == f"{tmp_path}/csv/" for logger in loggers if isinstance(logger, CSVLogger))


def test_wandb_needs_no_account_unless_told_to_go_online(tmp_path):
    assert configuration(tmp_path, ["logger=wandb"]).logger.wandb.offline
    assert not configuration(tmp_path, ["logger=wandb", "logger.wandb.offline=false"]).logger.wandb.offline


@pytest.mark.processes
def test_tensorboard_has_the_numbers_of_the_csv_file(tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run_all({tmp_path: [*SETTINGS, "logger=tensorboard"]})
    events = accumulators.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    with (tmp_path / "csv" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for name in ("sync/bytes_sent", "train/loss", "val/accuracy", "test/accuracy", "progress/mb_sent"):
        ours = [(int(row["step"]), pytest.approx(float(row[name]), rel=1e-6)) for row in rows if row[name]]
        assert ours == [(event.step, event.value) for event in events.Scalars(name)], name


def test_the_sweep_of_wandb_makes_command_lines_that_hydra_takes():
    sweep = yaml.safe_load((CONF / "sweep" / "wandb.yaml").read_text())
    assert (CONF.parent / sweep["program"]).is_file()
    assert sweep["command"][:4] == ["${env}", "python", "-m", "recipes.train"]
    for pick in (0, -1):
        chosen = {name: {"value": values["values"][pick]} for name, values in sweep["parameters"].items()}
        appended = create_sweep_command_args({"args": chosen})["args_no_hyphens"]
        words = [
            word for each in sweep["command"][4:] for word in (appended if each == "${args_no_hyphens}" else [each])
        ]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("train", words)
        assert config.metric == sweep["metric"]["name"]
        assert config.strategy.algorithm.sync_every == chosen["strategy.algorithm.sync_every"]["value"]
        assert config.strategy.algorithm.slow_momentum == chosen["strategy.algorithm.slow_momentum"]["value"]
        assert not config.logger.wandb.offline
