"""A LightningModule that shards itself, whatever the strategy's mesh is, and its data."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from tests.sharded.networks import WORDS, Network, batch, shard, whole
from tests.trainer.models import L

BATCHES = 8


class Sharded(L.LightningModule):
    """The network of the tests, in float64."""

    def __init__(self, adam: bool = False, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = Network()
        self.validated: list[float] = []
        self.started: list[list[float]] = []
        self.poison_at: int | None = None

    def configure_model(self) -> None:
        mesh = getattr(self, "_device_mesh", None)
        if mesh is not None and not hasattr(self.network.words.weight, "to_local"):
            shard(self.network, mesh)

    def training_step(self, tokens, batch_idx):
        loss = self.network.loss(tokens)
        return loss * float("nan") if self.poison_at == self.trainer.global_step else loss

    def on_train_start(self):
        self.started = numbers(self)

    def on_train_batch_start(self, *_):
        self.network.teach()

    def validation_step(self, tokens, batch_idx):
        self.validated.append(float(self.network.loss(tokens)))

    def configure_optimizers(self):
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if self.hparams.adam:
            return torch.optim.AdamW(trained, lr=self.hparams.lr)
        optimizer = torch.optim.SGD(trained, lr=self.hparams.lr, momentum=0.9)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class MetaInitialised(Sharded):
    """The same, made on the meta device."""

    def configure_model(self) -> None:
        if hasattr(self.network.words.weight, "to_local"):
            return
        with torch.device("meta"):
            self.network = Network()
        shard(self.network, self.device_mesh)


def loader(worker: int, place: int = 0, places: int = 1, batches: int = BATCHES) -> DataLoader:
    """The batches of one data-parallel process of a worker."""
    return DataLoader([batch(worker, step, place, places) for step in range(batches)], batch_size=None)


def numbers(module: nn.Module) -> list[list[float]]:
    """All parameters and buffers, whole, as plain lists that can be compared bit by bit."""
    return [whole(tensor).double().flatten().tolist() for tensor in module.state_dict().values()]


__all__ = ["BATCHES", "WORDS", "MetaInitialised", "Sharded", "fully_shard", "loader", "numbers"]
