"""Every way in which Lightning or torchrun starts processes trains the same model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import free_port
from tests.trainer.models import Regression, distance, numbers

ROOT = Path(__file__).parents[2]
SCRIPT = "tests.trainer.train_script"


def launch(command, folder):
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PL_", "LOCAL_", "WORLD_", "RANK"))}
    environment = clean | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MASTER_PORT": str(free_port())}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {file.stem: json.loads(file.read_text()) for file in Path(folder).glob("*.json")}


@pytest.mark.processes
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.faults)])
def test_popen_fork_torchrun_and_spawn_train_the_same_model(tmp_path, every):
    """In ``make test`` popen and fork alone: the others import Lightning three times each."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()), "-m", SCRIPT]
    commands = {
        "popen": ["-m", SCRIPT, "slowmo"],
        "spawn": ["-m", SCRIPT, "slowmo_spawn"],
        "fork": ["-m", SCRIPT, "slowmo_fork"],
        "torchrun": [*torchrun, "slowmo"],
    }
    if not every:
        del commands["spawn"], commands["torchrun"]
    models = {}
    for name, command in commands.items():
        folder = tmp_path / name
        folder.mkdir()
        models[name] = launch([*command, str(folder)], folder)
    expected = models["popen"]["0"]
    assert distance(expected, numbers(Regression())) > 1e-2
    reports = {name: written.pop("report") for name, written in models.items()}
    assert reports["popen"]["count"] > 0
    assert reports["popen"]["largest_drift"] >= reports["popen"]["drift"] > 0
    for name, written in models.items():
        assert reports[name] == reports["popen"], name
        assert written.keys() == {"0", "1", "afterwards"}, name
        assert written["0"] == written["1"] == written["afterwards"] == expected, name
