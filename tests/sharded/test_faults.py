"""A killed process of a sharded worker, and checkpoints that are torn."""

import json
import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest

from lightning_slowmo import SlowMo, SlowMoModelParallelStrategy, Workers
from lightning_slowmo.checkpoint import distributed
from tests.harness import run_trainers
from tests.sharded.modules import Sharded, loader
from tests.trainer.models import trainer


class Slow(Sharded):
    """Says that it trains, and takes its time."""

    def __init__(self, sign: str) -> None:
        super().__init__()
        self.sign = sign

    def on_train_batch_start(self, *_):
        Path(self.sign).touch()
        time.sleep(0.2)


def train_until_one_is_killed(rank, folder):
    strategy = SlowMoModelParallelStrategy(SlowMo(sync_every=3), workers=2, sync_timeout=timedelta(seconds=60))
    start = time.monotonic()
    try:
        trainer(4, strategy, max_epochs=50).fit(Slow(f"{folder}/{rank}"), loader(rank // 2, rank % 2, 2))
    except Exception as error:
        return str(error), time.monotonic() - start
    return "trained to the end", 0.0


@pytest.mark.faults
@pytest.mark.processes
def test_a_killed_process_is_named_by_all_others_of_its_own_worker_too(tmp_path):
    def kill(processes):
        deadline = time.monotonic() + 120
        while len(list(tmp_path.iterdir())) < 4 and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1)
        os.kill(processes[3].pid, signal.SIGKILL)

    outcomes = run_trainers(4, train_until_one_is_killed, str(tmp_path), limit=200, expect_failure=True, meanwhile=kill)
    for outcome in outcomes[:3]:
        assert "rank 3" in outcome[0], outcome


# Torn checkpoints, without processes ----------------------------------------------------------------------------------


def test_damaged_missing_and_foreign_files_of_a_folder_are_named(tmp_path):
    for name, content in (("a", b"weights"), ("b", b"more"), ("c", b"rest")):
        (tmp_path / name).write_bytes(content)
    alone = Workers()
    expected = {name: distributed.sha256(tmp_path / name) for name in "abc"}
    distributed.verify(tmp_path, json.loads(json.dumps(expected)), alone)
    (tmp_path / "a").write_bytes(b"weighty")
    (tmp_path / "b").unlink()
    with pytest.raises(ValueError, match="is torn: a is damaged or of another save; b is missing"):
        distributed.verify(tmp_path, expected, alone)


def test_what_was_written_takes_the_place_of_a_folder_or_a_file(tmp_path):
    path = tmp_path / "model.ckpt"

    def write(kind):
        part = tmp_path / "model.ckpt.part"
        if kind == "folder":
            part.mkdir()
            (part / "meta.pt").write_text(kind)
        else:
            part.write_text(kind)
        distributed.move(part, path)

    for kind in ("file", "folder", "folder", "file", "file"):
        write(kind)
        assert (path / "meta.pt" if kind == "folder" else path).read_text() == kind
        assert [entry.name for entry in tmp_path.iterdir()] == ["model.ckpt"]
