"""A GAN, two workers: two optimizers and manual optimization.

    python examples/gan.py

A generator of handwritten digits (8 x 8 pixels) against a discriminator. Each optimizer has an algorithm of its own at
work: its own count of steps, anchor and momentum. Nothing in the module knows of it; optimizers come from
``self.optimizers()``, as Lightning asks.
"""

import logging
import os
import warnings

os.environ["OMP_NUM_THREADS"] = "1"

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_slowmo import SlowMo, SlowMoStrategy

NOISE, EPOCHS = 16, 30


class GAN(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            *(nn.Linear(NOISE, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 64), nn.Sigmoid())
        )
        self.discriminator = nn.Sequential(nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1))

    def training_step(self, batch, _):
        (real,) = batch
        for_generator, for_discriminator = self.optimizers()
        fake = self.generator(torch.randn(len(real), NOISE, device=self.device))

        self.toggle_optimizer(for_discriminator)
        # softplus(-x) is the loss of calling x real, softplus(x) that of calling it a fake
        loss = (
            nn.functional.softplus(-self.discriminator(real))
            + nn.functional.softplus(self.discriminator(fake.detach()))
        ).mean()
        for_discriminator.zero_grad()
        self.manual_backward(loss)
        for_discriminator.step()
        self.untoggle_optimizer(for_discriminator)

        self.toggle_optimizer(for_generator)
        loss = nn.functional.softplus(-self.discriminator(fake)).mean()
        for_generator.zero_grad()
        self.manual_backward(loss)
        for_generator.step()
        self.untoggle_optimizer(for_generator)

    def configure_optimizers(self):
        kwargs = {"lr": 1e-3, "betas": (0.5, 0.999)}
        return torch.optim.Adam(self.generator.parameters(), **kwargs), torch.optim.Adam(
            self.discriminator.parameters(), **kwargs
        )


@torch.no_grad()
def distance(module, images):
    """How far the mean of generated images is from the mean image, per pixel, in units of a pixel's range."""
    module.eval()  # BatchNorm's own statistics
    generated = module.generator(torch.randn(1000, NOISE))
    module.train()  # Lightning trains a module in the mode in which it finds it
    return (generated.mean(0) - images.mean(0)).abs().mean().item()


def main():
    """Train, and say how far generated images are from real ones."""
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore", module=r"lightning\.|torch\.")
    L.seed_everything(1, workers=True, verbose=False)
    images = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    module = GAN()
    before = distance(module, images)
    trainer = L.Trainer(
        strategy=SlowMoStrategy(SlowMo(sync_every=12)), accelerator="cpu", devices=2, max_epochs=EPOCHS,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(images), 32, shuffle=True, drop_last=True))
    if trainer.is_global_zero:
        report = trainer.strategy.report
        print(f"distance from the mean image: {before:.3f} before training, {distance(module, images):.3f} after")
        print(f"{report.count} syncs of generator and discriminator, {report.bytes_sent / 1e6:.1f} MB sent")


if __name__ == "__main__":
    main()
