"""CIFAR-10 for a network of 20,754 parameters, which is convolutions of patches that do not overlap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from benchmarks.problems.problem import Measure, Split
from recipes.images.files import cached, read_cifar10

WIDTHS = (24, 48, 64)
"""Channels after patches of 4 x 4 pixels, 2 x 2 of those, and 2 x 2 of those."""

HELD_OUT = 5000
"""Training images that rate learning rates, drawn once; the test images are looked at by final runs alone."""


@dataclass(frozen=True)
class Images:
    """The problem: a :class:`~benchmarks.problems.Problem`.

    Attributes:
        path: torchvision's files, or a folder or tar of images.
    """

    path: str
    measure: ClassVar[Measure] = Measure("test accuracy, %", 2)
    hidden: ClassVar[frozenset[int]] = frozenset({0, 2, 4})

    def data(self, held_out: bool) -> tuple[Split, Split]:
        """Images as bytes [N, 8, 8, 48], patch by patch, and their labels."""
        return _data(self.path, held_out)

    def initial(self, seed: int) -> list[Tensor]:
        """Weights [inputs, outputs] and biases of one model."""
        generator = torch.Generator().manual_seed(seed)
        sizes = [(48, WIDTHS[0]), (4 * WIDTHS[0], WIDTHS[1]), (4 * WIDTHS[1], WIDTHS[2]), (4 * WIDTHS[2], 10)]
        values = []
        for inputs, outputs in sizes:
            values += [torch.randn(inputs, outputs, generator=generator) * math.sqrt(2 / inputs), torch.zeros(outputs)]
        return values

    def loss(self, values: Sequence[Tensor], examples: Split) -> Tensor:
        """Cross-entropy."""
        patches, labels = examples
        losses = nn.functional.cross_entropy(logits(values, patches).flatten(0, 1), labels.flatten(), reduction="sum")
        return losses / labels.shape[1]

    def rating(self, values: Sequence[Tensor], split: Split) -> float:
        """Accuracy in percent."""
        model = [value[None] for value in values]
        patches, labels = split
        right = [
            (logits(model, some[None])[0].argmax(-1) == theirs).sum()
            for some, theirs in zip(patches.split(1000), labels.split(1000), strict=True)
        ]
        return 100 * float(sum(right)) / len(labels)


@cache
def _data(path: str, held_out: bool) -> tuple[Split, Split]:
    root = Path(path)
    images = cached(root, Path.home() / ".cache" / "lightning-slowmo", lambda: read_cifar10(root))
    train, test = ((cut(images[f"{name}_images"]), images[f"{name}_labels"]) for name in ("train", "test"))
    if not held_out:
        return train, test
    order = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(0))
    rating, rest = order[:HELD_OUT], order[HELD_OUT:]
    return tuple(each[rest] for each in train), tuple(each[rating] for each in train)


def cut(images: Tensor) -> Tensor:
    """Patches [N, 8, 8, 48] of images [N, 3, 32, 32]."""
    return _merged(images.permute(0, 2, 3, 1)[None], 4)[0].contiguous()


def _merged(grid: Tensor, size: int) -> Tensor:
    """Squares of ``size`` x ``size`` places as one each, in [workers, images, height, width, channels]."""
    squares = grid.unflatten(3, (-1, size)).unflatten(2, (-1, size)).transpose(3, 4)
    return squares.flatten(4)


def logits(values: Sequence[Tensor], patches: Tensor) -> Tensor:
    """Of each worker's model for its own images.

    Args:
        values: weights [workers, inputs, outputs] and biases [workers, outputs].
        patches: bytes, [workers, images, 8, 8, 48].

    Returns:
        [workers, images, 10].
    """
    grid = torch.relu(_dense(patches.to(values[0].dtype).div_(64).sub_(2), *values[:2]))
    for layer in (2, 4):
        grid = torch.relu(_dense(_merged(grid, 2), *values[layer : layer + 2]))
    return _dense(grid.flatten(2), *values[-2:])


def _dense(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    rows = torch.baddbmm(bias[:, None], inputs.flatten(1, -2), weight)
    return rows.view(*inputs.shape[:-1], weight.shape[-1])
