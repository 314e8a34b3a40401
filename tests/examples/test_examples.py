"""Every file in examples runs, and does what it says: ``make examples``."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.network import Unavailable, check

pytestmark = pytest.mark.examples

EXAMPLES = Path(__file__).parents[2] / "examples"
LIMIT = 600
"""Seconds; alone on two cores each takes less than 120."""


def run(folder: Path, *arguments: str) -> str:
    """Run a file of examples in a folder, and return what it printed.

    Raises:
        AssertionError: with its output, if it fails.
    """
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    command = [sys.executable, str(EXAMPLES / arguments[0]), *arguments[1:]]
    done = subprocess.run(command, cwd=folder, env=environment, timeout=LIMIT, text=True, capture_output=True)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def numbers(text: str) -> list[float]:
    """All numbers of a text, without the commas in them."""
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", text.replace(",", ""))]


def test_every_example_is_tested():
    here = Path(__file__).read_text()
    assert not [file.name for file in EXAMPLES.iterdir() if file.is_file() and f'"{file.name}"' not in here]


def test_the_quickstart_sends_a_twelfth_and_draws(tmp_path: Path):
    printed = run(tmp_path, "quickstart.py")
    sent = {row.split()[0]: float(row.split()[4]) for row in printed.splitlines() if " % " in row}
    assert set(sent) == {"ddp", "local_sgd", "slowmo", "diloco"}
    assert sent["ddp"] / sent["slowmo"] == pytest.approx(12, rel=0.01)
    assert (tmp_path / "quickstart.png").exists()


def test_fabric_goes_on_from_its_checkpoint_and_learns(tmp_path: Path):
    *epochs, report = run(tmp_path, "fabric.py").splitlines()
    assert [numbers(line)[0] for line in epochs] == [4, 5, 6, 7, 8]
    assert numbers(epochs[-1])[1] > 80  # 10 by guessing
    assert "bytes_sent" in report


def test_lora_sends_what_it_trains_and_nothing_else(tmp_path: Path):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    accuracy, steps, trained, everything, sent, ddp = numbers(run(tmp_path, "lora.py"))
    assert accuracy > 50  # 10 by guessing
    assert trained < 0.2 * everything  # a small model: of a large one, LoRA trains a percent or less
    assert sent == pytest.approx(steps // 12 * trained * 4 / 1e6, rel=0.05, abs=0.05)
    assert ddp == pytest.approx(steps * everything * 4 / 1e6, rel=0.01)


def test_the_gan_comes_nearer_to_the_data(tmp_path: Path):
    before, after, syncs, sent = numbers(run(tmp_path, "gan.py"))
    assert after < 0.5 * before
    assert syncs > 10
    assert sent > 1


def test_the_command_line_takes_the_file_and_overrides(tmp_path: Path):
    arguments = ["cli.py", "fit", "--config", str(EXAMPLES / "cli.yaml")]
    accuracy, syncs = numbers(run(tmp_path, *arguments))
    assert accuracy > 80
    more = numbers(run(tmp_path, *arguments, "--trainer.strategy.init_args.algorithm.init_args.sync_every=24"))
    assert more[1] < syncs


def test_ones_own_algorithm_is_local_sgd_where_it_should_be(tmp_path: Path):
    printed = run(tmp_path, "own_algorithm.py")
    assert "it is Local SGD: True" in printed
    assert numbers(printed.splitlines()[0])[-1] > 0


def test_diloco_is_faster_over_a_slow_link(tmp_path: Path):
    try:
        check()
    except Unavailable as reason:
        pytest.skip(str(reason))
    rows = run(tmp_path, "diloco_over_slow_links.py").splitlines()
    seconds = {row.split()[0]: numbers(row)[0] for row in rows[1:]}
    assert seconds["diloco"] < 0.5 * seconds["ddp"]


def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", 4)
    assert not [cell for cell in notebook.cells if cell.get("outputs")]  # outputs would go stale
    here = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=LIMIT, kernel_name="python3", resources=here).execute()
    printed = json.dumps([output for cell in notebook.cells for output in cell.get("outputs", [])])
    logged, by_hand = re.search(r"accuracy ([\d.]+)%.*here: ([\d.]+)%", printed).groups()
    assert float(logged) > 80
    assert logged == by_hand
