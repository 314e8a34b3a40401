"""What a training step without a sync costs, next to the same step under Lightning's single-device strategy.

    python -m benchmarks.local_step

Both Trainers run in one process, in alternating short fits of the same convolutional network, so that the ratio holds
on a noisy machine. The period is longer than the run: no step here is followed by a sync.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_slowmo import SlowMo, SlowMoStrategy


class Network(L.LightningModule):
    """A small ResNet-like stack, about 30 ms a step on one core; it notes when each step ends."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, padding=1)]
        for _ in range(8):
            layers += [nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)]
        self.net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
        self.ends: list[float] = []

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def on_train_batch_end(self, *_: object) -> None:
        self.ends.append(time.perf_counter())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, nesterov=True)


def median_step(strategy: object, steps: int) -> float:
    """Median seconds from one step's end to the next."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(16 * steps, 3, 32, 32), torch.randint(0, 10, (16 * steps,)))
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Network()
    trainer.fit(model, DataLoader(data, batch_size=16))
    return statistics.median(b - a for a, b in zip(model.ends[5:], model.ends[6:], strict=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    ratios = []
    for _ in range(arguments.repeats):
        single = median_step("auto", arguments.steps)
        slowmo = median_step(SlowMoStrategy(SlowMo(sync_every=10**6)), arguments.steps)
        ratios.append(slowmo / single)
        print(f"single device {single * 1e3:7.2f} ms   slowmo {slowmo * 1e3:7.2f} ms   ratio {ratios[-1]:.3f}")
    print(f"median ratio {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
