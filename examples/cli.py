"""LightningCLI: strategy and algorithm in YAML, or on the command line.

python examples/cli.py fit --config examples/cli.yaml
python examples/cli.py fit --config examples/cli.yaml --trainer.strategy.algorithm.init_args.sync_every=6
python examples/cli.py fit --config examples/cli.yaml --trainer.strategy=diloco
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import lightning as L
import torch
from lightning.pytorch.cli import LightningCLI
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_slowmo  # noqa: F401  registers the presets' names


class Digits(L.LightningModule):
    """A network of two layers.

    Args:
        width: of the hidden layer.
        lr: learning rate of AdamW.
    """

    def __init__(self, width: int = 128, lr: float = 2e-3):
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

    def training_step(self, batch, _):
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def validation_step(self, batch, _):
        images, labels = batch
        self.log("accuracy", (self.net(images).argmax(1) == labels).float().mean(), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class Data(L.LightningDataModule):
    """Handwritten digits.

    Args:
        batch: images for each worker and step.
    """

    def __init__(self, batch: int = 16):
        super().__init__()
        self.batch = batch

    def setup(self, stage):
        images, labels = load_digits(return_X_y=True)
        data = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
        generator = torch.Generator().manual_seed(0)
        self.train, self.test = torch.utils.data.random_split(data, [1437, 360], generator)

    def train_dataloader(self):
        return DataLoader(self.train, self.batch, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.test, 60)


if __name__ == "__main__":
    cli = LightningCLI(Digits, Data, save_config_callback=None)
    if cli.trainer.is_global_zero:
        print(f"accuracy {cli.trainer.callback_metrics['accuracy']:.1%}, {cli.trainer.strategy.report.count} syncs")
