"""Checkpoints of sharded slow state: every rank writes its pieces, and any number of workers go on from them."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_slowmo import SlowMo, SlowMoStrategy
from tests.harness import run_trainers
from tests.trainer.models import Regression, data, numbers, trainer


def fit(rank, size, folder, shard, resume=None):
    saving = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=8)
    strategy = SlowMoStrategy(SlowMo(sync_every=3), shard_slow_state=shard)
    fitting = trainer(size, strategy, callbacks=[saving], enable_checkpointing=True)
    module = Regression(momentum=0.5)
    fitting.fit(module, data(rank), ckpt_path=resume)
    return numbers(module)


def save_and_resume(rank, folder):
    straight = fit(rank, 2, folder, True)
    path = f"{folder}/step=8.ckpt"
    return straight, fit(rank, 2, f"{folder}/again", True, path), fit(rank, 2, f"{folder}/whole", False, path)


def go_on(rank, folder):
    return fit(rank, 3, f"{folder}/three", True, f"{folder}/step=8.ckpt")


@pytest.mark.processes
def test_ranks_write_their_pieces_and_a_resume_is_bit_exact_sharded_or_not(tmp_path):
    for straight, sharded, whole in run_trainers(2, save_and_resume, str(tmp_path)):
        assert sharded == straight
        assert whole == straight
    [save] = Path(f"{tmp_path}/step=8.ckpt.slowmo").iterdir()
    assert {file.name for file in save.iterdir()} >= {"shared.pt", "slow00000.pt", "slow00001.pt"}
    numels = []
    for rank in (0, 1):
        pieces = torch.load(save / f"slow{rank:05d}.pt", weights_only=True)["pieces"]
        numels.append(sum(flat.numel() for tensor in pieces for _, flat in tensor))
    parameters = sum(p.numel() for p in Regression().parameters())
    assert sum(numels) == 2 * parameters  # anchor and momentum, each element once
    assert max(numels) < 1.5 * parameters
    ends = run_trainers(3, go_on, str(tmp_path))
    assert all(end == ends[0] for end in ends)
