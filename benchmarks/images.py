"""Images of CIFAR-10's shape, and a LightningModule that learns them: 2.2 million parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.accuracy import load_images, prepare

CLASSES = 10


def save(path: Path | None, folder: Path) -> None:
    """Write ``train.pt`` and ``test.pt``, images as bytes and labels, for all workers to map into memory.

    Args:
        path: a tar of JPEG files in ``train/<class>/`` and ``test/<class>/``; None generates images.
        folder: where to.
    """
    if path is not None:
        load_images(path, folder)
        return
    generator = torch.Generator().manual_seed(0)
    prototypes = nn.functional.interpolate(torch.randn(CLASSES, 3, 8, 8, generator=generator), 32, mode="bilinear")
    for split, count in (("train", 20_000), ("test", 2_000)):
        labels = torch.randint(CLASSES, (count,), generator=generator)
        images = torch.empty(count, 3, 32, 32, dtype=torch.uint8)
        for rows in torch.arange(count).split(1000):
            noisy = prototypes[labels[rows]] + 2 * torch.randn(len(rows), 3, 32, 32, generator=generator)
            images[rows] = noisy.mul_(40).add_(128).clamp_(0, 255).byte()
        torch.save((images, labels), folder / f"{split}.pt")


class Batches(IterableDataset):
    """Random batches of this worker's share of the images, without end.

    Args:
        folder: where :func:`save` has put them.
        rank: this worker.
        size: number of workers.
        batch: examples in a batch.
        seed: of the order, the same on all workers.
    """

    def __init__(self, folder: Path, rank: int, size: int, batch: int, seed: int) -> None:
        self.images, self.labels = torch.load(folder / "train.pt", weights_only=True, mmap=True)
        self.share = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed))[rank::size]
        self.batch = batch
        self.generator = torch.Generator().manual_seed(1000 * seed + rank)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            rows = self.share[torch.randint(len(self.share), (self.batch,), generator=self.generator)]
            yield prepare(self.images[rows], self.generator), self.labels[rows]


class TestShare(IterableDataset):
    """This worker's share of the test images, batch by batch.

    Args:
        folder: where :func:`save` has put them.
        rank: this worker.
        size: number of workers.
        most: how many images of all are looked at.
    """

    def __init__(self, folder: Path, rank: int, size: int, most: int) -> None:
        images, labels = torch.load(folder / "test.pt", weights_only=True, mmap=True)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:most][rank::size]
        self.images, self.labels = images[order], labels[order]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.arange(len(self.labels)).split(100):
            yield prepare(self.images[rows]), self.labels[rows]


def loader(dataset: IterableDataset) -> DataLoader:
    """A loader of what comes in batches already."""
    return DataLoader(dataset, batch_size=None)


class Classifier(L.LightningModule):
    """A convolutional network and Adam, with a warm-up and a cosine decay of the learning rate.

    Args:
        lr: largest learning rate.
        steps: length of the schedule; None keeps the rate constant.
        seed: of the initial model.
        plain: whether SGD without momentum takes Adam's place, at thirty times the learning rate.
    """

    def __init__(self, lr: float = 1e-3, steps: int | None = None, seed: int = 0, plain: bool = False) -> None:
        super().__init__()
        self.lr, self.steps, self.plain = lr, steps, plain
        self.right: list[int] = []
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            layers: list[nn.Module] = []
            channels = 3
            for width, halve in ((64, True), (128, True), (256, True), (384, False), (256, True)):
                layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.GroupNorm(8, width), nn.ReLU()]
                layers += [nn.MaxPool2d(2)] if halve else []
                channels = width
            layers += [nn.Flatten(), nn.Linear(channels * 4, 64), nn.ReLU(), nn.Linear(64, CLASSES)]
            self.net = nn.Sequential(*layers)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def on_validation_epoch_start(self) -> None:
        self.right.append(0)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.right[-1] += int((self.net(images).argmax(1) == labels).sum())

    def configure_optimizers(self) -> Any:
        optimizer: torch.optim.Optimizer
        if self.plain:
            optimizer = torch.optim.SGD(self.parameters(), lr=30 * self.lr)
        else:
            optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        if self.steps is None:
            return optimizer
        steps, rise = self.steps, max(1, self.steps // 20)
        decay = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda k: min(1, (k + 1) / rise) * 0.5 * (1 + math.cos(math.pi * min(1, k / steps)))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}
