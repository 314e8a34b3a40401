"""A new user's walk: install the wheel, write three lines in an empty folder, train, read the line after ``fit``.

The environment holds nothing but the wheel; what it depends on is found in the environment of the tests. ``make wheel``
does the same with all dependencies installed anew, trains the quickstart, and calls every command.
"""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
UV = next(
    (path for path in (Path(sys.executable).parent / "uv", shutil.which("uv")) if path and Path(path).exists()), None
)

WALK = """
import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset

import lightning_slowmo


class Line(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, _):
        x, y = batch
        return torch.nn.functional.mse_loss(self.layer(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


if __name__ == "__main__":
    x = torch.randn(400, 1)
    trainer = L.Trainer(strategy="slowmo", accelerator="cpu", devices=2, max_epochs=2, enable_progress_bar=False)
    trainer.fit(Line(), DataLoader(TensorDataset(x, 3 * x), batch_size=10))
    print("from", lightning_slowmo.__file__)
"""


def run(*command: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command outside of the repository, and nothing in the environment points there."""
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=clean | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands' folder of an environment with the wheel."""
    if UV is None:
        pytest.skip("uv is not installed; `make test` installs it")
    folder = tmp_path_factory.mktemp("wheel")
    backend = ["--no-build-isolation", "--python", sys.executable] if find_spec("hatchling") else []
    run(UV, "build", "--wheel", *backend, "--out-dir", folder, ROOT, folder=folder)
    run(UV, "venv", "--python", sys.executable, folder / "env", folder=folder)
    [wheel] = folder.glob("*.whl")
    commands = folder / "env" / "bin"
    run(UV, "pip", "install", "--python", commands / "python", "--no-deps", wheel, folder=folder)
    [packages] = folder.glob("env/lib/python*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    return commands


@pytest.mark.processes
def test_a_new_user_trains_in_an_empty_folder_and_reads_what_was_saved(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "walk.py").write_text(WALK)
    done = run(installed / "python", "walk.py", folder=tmp_path)
    assert str(installed.parent) in done.stdout
    line = r"3 syncs, \S+ MB sent per worker \(DDP would have sent 0.00032\), \d+ % of the time in syncs, largest drift"
    assert len(re.findall(line, done.stderr)) == 1, done.stderr


def test_the_recipes_and_their_configuration_are_in_the_wheel(installed: Path, tmp_path: Path) -> None:
    shown = run(installed / "slowmo-train", "--cfg", "job", "experiment=digits/slowmo", folder=tmp_path).stdout
    assert "_target_: lightning_slowmo.SlowMo\n" in shown
    commands = {f"slowmo-{name}" for name in ("train", "report", "plan", "reproduce")}
    assert commands <= {path.name for path in installed.iterdir()}
    [packages] = installed.parent.glob("lib/python*/site-packages")
    assert not {"recipes", "conf", "tests", "benchmarks"} & {path.name for path in packages.iterdir()}
    own = {str(path.relative_to(ROOT)) for name in ("conf", "recipes") for path in (ROOT / name).rglob("*.[py][ya]*")}
    bundled = packages / "lightning_slowmo" / "bundled"
    there = {str(path.relative_to(bundled)) for path in bundled.rglob("*.[py][ya]*")}
    assert {path for path in own if "__pycache__" not in path and not path.startswith("recipes/results")} == {
        path for path in there if "__pycache__" not in path
    }


def test_a_missing_extra_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_slowmo import commands

    monkeypatch.setattr(commands, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["/somewhere/slowmo-train"])
    with pytest.raises(SystemExit, match=r"slowmo-train needs hydra, .*: pip install 'lightning-slowmo\[recipes\]'"):
        commands.train()
