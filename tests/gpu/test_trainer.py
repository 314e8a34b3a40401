"""The Trainer on GPUs over NCCL: mixed precision, and checkpoints that go from GPU to CPU and back."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities import disable_possible_user_warnings
from torch.utils.data import DataLoader, TensorDataset

from lightning_slowmo import SlowMo, SlowMoStrategy
from tests.gpu.on_one_card import BOTH, run

pytestmark = pytest.mark.gpu


class Model(L.LightningModule):
    """A regression on which each rank has its own data; the gradients of one step of rank 1 may be infinite."""

    def __init__(self, dtype: torch.dtype, overflow_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).to(dtype)
        self.type = dtype
        self.overflow_at = overflow_at
        self.skipped = 0

    def training_step(self, batch, batch_idx):
        loss = (self.layers(batch[0]) - batch[1]).square().mean()
        return loss * torch.inf if self.global_rank == 1 and batch_idx == self.overflow_at else loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(self.global_rank)
        inputs = torch.randn(48, 6, generator=generator, dtype=torch.float64).to(self.type)
        return DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True).sin()), batch_size=4)


def trainer(accelerator: str, size: int, steps: int, **options) -> L.Trainer:
    disable_possible_user_warnings()
    return L.Trainer(
        accelerator=accelerator,
        devices=1,
        num_nodes=size,
        max_steps=steps,
        strategy=SlowMoStrategy(SlowMo(sync_every=2), process_group_backend=BOTH, sync_timeout=timedelta(seconds=15)),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )


class Killed(Model):
    """Rank 1 is killed in the sum of its third sync, or before the header of it."""

    def __init__(self, in_the_sum: bool) -> None:
        super().__init__(torch.float32)
        self.in_the_sum = in_the_sum

    def on_train_batch_start(self, batch, batch_idx):
        if self.global_rank == 1 and batch_idx == 5:
            if not self.in_the_sum:
                os.kill(os.getpid(), signal.SIGKILL)
            for unit in self.trainer.strategy.engine.units:
                unit.sync = lambda round: os.kill(os.getpid(), signal.SIGKILL)


def lose_a_worker(rank: int, in_the_sum: bool) -> tuple[str, float]:
    """What a survivor hears, and the seconds after which its fit has ended and its process could."""
    start, text = time.monotonic(), ""
    try:
        trainer("gpu", 3, 12).fit(Killed(in_the_sum))
    except Exception as error:
        text = str(error)
    torch.cuda.synchronize()
    torch.distributed.destroy_process_group()
    return text, time.monotonic() - start


@pytest.mark.parametrize("in_the_sum", [False, True])
def test_a_process_whose_fit_has_lost_a_worker_can_end(in_the_sum):
    first, died, third = run(3, lose_a_worker, in_the_sum, limit=90, expect_failure=True)
    assert died == f"died with exit code {-signal.SIGKILL}"
    for text, seconds in (first, third):
        assert "rank 1" in text
        assert seconds < 60


def values(model: Model) -> torch.Tensor:
    return torch.cat([parameter.detach().cpu().double().flatten() for parameter in model.parameters()])


def skip_a_step(rank: int, precision: str) -> torch.Tensor:
    model = Model(torch.float32, overflow_at=3)
    trainer("gpu", 2, 10, precision=precision).fit(model)
    return values(model)


def test_a_scaler_that_skips_on_one_rank():
    first, second = run(2, skip_a_step, "16-mixed")
    assert first.isfinite().all()
    assert torch.equal(first, second)


def test_bfloat16():
    model = run(2, train_in_bfloat16)
    assert model[0].isfinite().all()
    assert torch.equal(*model)


def train_in_bfloat16(rank: int) -> torch.Tensor:
    model = Model(torch.float32)
    trainer("gpu", 2, 10, precision="bf16-mixed").fit(model)
    return values(model)


def move(rank: int, folder: str) -> dict[str, torch.Tensor]:
    """Train to step 5 on one device, and from there to step 10 on the other one."""
    results = {}
    for first in ("gpu", "cpu"):
        model = Model(torch.float64)
        start = trainer(first, 2, 5, precision="64-true")
        start.fit(model)
        path = f"{folder}/{first}.ckpt"
        start.save_checkpoint(path)
        for second in ("gpu", "cpu"):
            model = Model(torch.float64)
            trainer(second, 2, 10, precision="64-true").fit(model, ckpt_path=path)
            results[f"{first} {second}"] = values(model)
    return results


def test_checkpoints_go_from_gpu_to_cpu_and_back(tmp_path):
    first, second = run(2, move, str(tmp_path))
    for name, result in first.items():
        assert torch.equal(result, second[name])
        assert torch.allclose(result, first["cpu cpu"], rtol=0, atol=1e-9), name
