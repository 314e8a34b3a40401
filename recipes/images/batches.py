"""Batches of images that are cut out of memory, and augmented, as a whole.

The transforms of torchvision's v2 make one choice for a batch; here each image of it has its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

Batch = tuple[Tensor, Tensor]
"""Images and labels."""


class Batches:
    """This worker's batches of indices, as many on every worker.

    In training, all examples are shuffled anew each epoch and dealt to the workers; what does not fill a batch on every
    worker is left out. In evaluation every example comes once, so batches differ in size by one.

    Args:
        examples: number of all examples.
        batch_size: of one worker.
        rank: of this worker.
        workers: number of workers.
        shuffle: whether it is for training.
        seed: of the shuffles.
        device: where tensors of indices are wanted; None: lists.

    Raises:
        ValueError: if there are too few examples.
    """

    def __init__(
        self,
        examples: int,
        batch_size: int,
        rank: int,
        workers: int,
        shuffle: bool,
        seed: int = 0,
        device: torch.device | None = None,
    ) -> None:
        fewest = batch_size * workers if shuffle else workers
        if examples < fewest:
            raise ValueError(f"{examples} examples are too few for {workers} workers with batches of {batch_size}.")
        self.examples, self.batch_size, self.rank, self.workers = examples, batch_size, rank, workers
        self.shuffle, self.seed, self.epoch, self.device = shuffle, seed, 0, device

    @property
    def sampler(self) -> Batches:
        """Where Lightning looks for :meth:`set_epoch`, should this be a DataLoader's batch sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Say which shuffle comes next; Lightning does so."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Number of batches."""
        if self.shuffle:
            return self.examples // (self.batch_size * self.workers)
        return math.ceil(self.examples / (self.batch_size * self.workers))

    def __iter__(self) -> Iterator[Any]:
        """Go through one epoch."""
        parts = self._parts()
        yield from parts if self.device is not None else (part.tolist() for part in parts)

    def _parts(self) -> Sequence[Tensor]:
        if not self.shuffle:
            return torch.arange(self.rank, self.examples, self.workers, device=self.device).tensor_split(len(self))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        mine = torch.randperm(self.examples, generator=generator)[self.rank :: self.workers]
        return mine.to(self.device or "cpu").split(self.batch_size)[: len(self)]


class TensorBatches(Dataset):
    """Images and labels in memory, of the CPU or a GPU, a whole batch at a time."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __getitem__(self, rows: Tensor) -> Batch:
        return self.images[rows], self.labels[rows]


class CropAndFlip(nn.Module):
    """Pad by reflection, cut out a window of the old size, and mirror half of the images, each by a choice of its own.

    All of it is one gathering of pixels, by a table that says which ones each choice takes.

    Args:
        crop: pixels of padding on each side; 0 does not crop.
        flip: whether images are mirrored.
        generator: source of randomness, on the CPU.
    """

    def __init__(self, crop: int, flip: bool, generator: torch.Generator) -> None:
        super().__init__()
        self.crop, self.flip, self.generator = crop, flip, generator
        self._table: Tensor | None = None
        self._made_for: tuple[int, int, torch.device] | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Augment a batch."""
        if not (self.crop or self.flip):
            return images
        count, channels, height, width = images.shape
        choices = self._choices(count).to(images.device, non_blocking=True)  # else the host would wait for a GPU
        pixels = self._table_for(height, width, images.device)[choices]
        return images.flatten(2).gather(2, pixels[:, None].expand(-1, channels, -1)).view_as(images)

    def _choices(self, count: int) -> Tensor:
        """A row of the table for each image. NumPy takes a tenth of torch's time for arithmetic of so few numbers."""
        places = 2 * self.crop + 1
        top = left = np.zeros(count, dtype=np.int64)
        if self.crop:
            top, left = torch.randint(places, (2, count), generator=self.generator).numpy()
        mirrored = torch.rand(count, generator=self.generator).numpy() < 0.5 if self.flip else 0
        return torch.from_numpy((2 * top + mirrored) * places + left)

    def _table_for(self, height: int, width: int, device: torch.device) -> Tensor:
        """The pixels of every choice: by place of the upper edge, whether mirrored, and place of the left edge."""
        if self._table is None or self._made_for != (height, width, device):
            rows, columns = (_windows(size, self.crop) for size in (height, width))
            views = torch.stack([columns, columns.flip(1)])
            pixels = rows[:, None, None, :, None] * width + views[None, :, :, None, :]
            self._table, self._made_for = pixels.flatten(0, 2).flatten(1).to(device), (height, width, device)
        return self._table


def _windows(size: int, padding: int) -> Tensor:
    """The pixels of a row of ``size``, padded by reflection, that a window as long takes, at each of its places."""
    return torch.from_numpy(np.pad(np.arange(size), padding, mode="reflect")).unfold(0, size, 1)


class Normalize(nn.Module):
    """Bytes to floating-point numbers of mean 0 and deviation 1.

    Torchvision's transform copies mean and deviation to the device for every batch, for which the host waits.

    Args:
        mean: of each channel, in [0, 1].
        std: of each channel.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.mean, self.std = (255 * torch.tensor(values)[:, None, None] for values in (mean, std))

    def forward(self, images: Tensor) -> Tensor:
        """Normalize a batch."""
        if self.mean.device != images.device:
            self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)
        return (images - self.mean) / self.std
