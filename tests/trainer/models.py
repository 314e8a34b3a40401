"""Small LightningModules, data and Trainers for the tests of the strategy."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import lightning_slowmo  # noqa: F401  (registers the names)

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", ".*does not have many workers.*")
warnings.filterwarnings("ignore", ".*configure_optimizers.*|.*`val_dataloader`.*")

FEATURES = 5

TAKE_ADAM = ("apmsqueeze", "des_loc")
"""Presets that need Adam or AdamW."""


def data(seed: int, examples: int = 32, batch_size: int = 4) -> DataLoader:
    """A noisy regression problem; give each rank its own seed, so that local steps drift apart."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(examples, FEATURES, generator=generator)
    targets = inputs.sum(1, keepdim=True) + torch.randn(examples, 1, generator=generator)
    return DataLoader(TensorDataset(inputs, targets), batch_size=batch_size)


class Regression(L.LightningModule):
    """Two layers, optionally with BatchNorm between them."""

    def __init__(
        self,
        lr: float = 0.05,
        momentum: float = 0.0,
        adam: bool = False,
        batch_norm: bool = False,
        warm_up: int = 0,
        hidden: int = 4,
        seed: int = 1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            norm = [torch.nn.BatchNorm1d(hidden)] if batch_norm else []
            first, last = torch.nn.Linear(FEATURES, hidden), torch.nn.Linear(hidden, 1)
            self.net = torch.nn.Sequential(first, *norm, torch.nn.Tanh(), last)

    def loss(self, batch: list[Tensor]) -> Tensor:
        inputs, targets = batch
        return torch.nn.functional.mse_loss(self.net(inputs), targets)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    test_step = predict_step = validation_step

    def configure_optimizers(self) -> Any:
        h = self.hparams
        if h.adam:
            optimizer: torch.optim.Optimizer = torch.optim.Adam(self.parameters(), lr=h.lr)
        else:
            optimizer = torch.optim.SGD(self.parameters(), lr=h.lr, momentum=h.momentum)
        if not h.warm_up:
            return optimizer
        # From exactly 0 up to lr, then down again: the rate changes at every step.
        ramp = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: step / h.warm_up if step < h.warm_up else h.warm_up / step
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": ramp, "interval": "step"}}


def trainer(size: int, strategy: Any, **arguments: Any) -> L.Trainer:
    """A quiet Trainer in which each rank keeps the data that it is given."""
    defaults = {
        "accelerator": "cpu",
        "devices": size,
        "strategy": strategy,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "max_epochs": 2,
    }
    return L.Trainer(**(defaults | arguments))


def numbers(module: torch.nn.Module) -> list[list[float]]:
    """All parameters and buffers, as plain lists that can be compared bit by bit."""
    return [tensor.detach().double().flatten().tolist() for tensor in module.state_dict().values()]


def distance(a: list[list[float]], b: list[list[float]]) -> float:
    """The largest difference between two models."""
    return max(abs(x - y) for left, right in zip(a, b, strict=True) for x, y in zip(left, right, strict=True))


def all_finite(model: list[list[float]]) -> bool:
    return all(torch.tensor(values).isfinite().all() for values in model)
