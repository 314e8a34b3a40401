"""Batches of images that are cut out of memory, and augmented, as a whole.

The transforms of torchvision's v2 make one choice for a batch; here each image of it has its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import v2

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

    Raises:
        ValueError: if there are too few examples.
    """

    def __init__(self, examples: int, batch_size: int, rank: int, workers: int, shuffle: bool, seed: int = 0) -> None:
        fewest = batch_size * workers if shuffle else workers
        if examples < fewest:
            raise ValueError(f"{examples} examples are too few for {workers} workers with batches of {batch_size}.")
        self.examples, self.batch_size, self.rank, self.workers = examples, batch_size, rank, workers
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0

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

    def __iter__(self) -> Iterator[list[int]]:
        """Go through one epoch."""
        if not self.shuffle:
            mine = torch.arange(self.rank, self.examples, self.workers)
            yield from (part.tolist() for part in mine.tensor_split(len(self)))
            return
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        mine = torch.randperm(self.examples, generator=generator)[self.rank :: self.workers]
        yield from (part.tolist() for part in mine.split(self.batch_size)[: len(self)])


class TensorBatches(Dataset):
    """Images and labels in memory, a whole batch at a time."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __getitem__(self, rows: list[int]) -> Batch:
        return self.images[rows], self.labels[rows]


class RandomCrop(nn.Module):
    """Pad by reflection, then cut out a window of the old size, at a place of its own for each image.

    Args:
        padding: pixels on each side.
        generator: source of randomness, on the CPU.
    """

    def __init__(self, padding: int, generator: torch.Generator) -> None:
        super().__init__()
        self.padding, self.generator = padding, generator

    def forward(self, images: Tensor) -> Tensor:
        """Crop a batch."""
        count, _, height, width = images.shape
        padded = v2.functional.pad(images, [self.padding] * 4, padding_mode="reflect")
        places = torch.randint(2 * self.padding + 1, (2, count), generator=self.generator)
        places = places.to(images.device, non_blocking=True)  # else the host would wait for the GPU
        rows = places[0, :, None] + torch.arange(height, device=images.device)
        columns = places[1, :, None] + torch.arange(width, device=images.device)
        each = torch.arange(count, device=images.device)[:, None, None]
        return padded.permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class RandomFlip(nn.Module):
    """Mirror half of the images.

    Args:
        generator: source of randomness, on the CPU.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, images: Tensor) -> Tensor:
        """Mirror some of a batch."""
        mirrored = torch.rand(len(images), generator=self.generator) < 0.5
        mirrored = mirrored.to(images.device, non_blocking=True)
        return torch.where(mirrored[:, None, None, None], v2.functional.horizontal_flip(images), images)


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
