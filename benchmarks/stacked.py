"""Many workers on one core, quickly: their gradients come from one batched computation, and each has an engine.

The parameters of all workers lie one after another in one tensor for each layer, of which a worker's own are a view.
So a batched product makes a step of all of them, at little more than the cost of its arithmetic, and the algorithms are
the package's own, on workers that take turns (``Workers.simulated``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_slowmo import Algorithm, Engine, Workers, together
from recipes.images.files import cached, read_cifar10

Inner = Callable[[Sequence[nn.Parameter], float], list[Optimizer]]
"""Makes the optimizers of a worker's parameters at a peak learning rate."""

WIDTHS = (24, 48, 64)
"""Channels after patches of 4 x 4 pixels, 2 x 2 of those, and 2 x 2 of those."""

HELD_OUT = 5000
"""Training images that rate learning rates, drawn once; the test images are looked at by final runs alone."""


@dataclass(frozen=True)
class Task:
    """What all rows have in common.

    Attributes:
        data: torchvision's files, or a folder or tar of images.
        workers: how many.
        batch: images of one worker in a step.
        steps: optimizer steps.
        warmup: of them, in which the learning rate rises; then it follows half a cosine down to 0.
    """

    data: str
    workers: int = 8
    batch: int = 8
    steps: int = 240
    warmup: int = 12


class Outcome(NamedTuple):
    """What a run came to: accuracy of the consensus in percent, and MB (10^6 bytes) that a worker has sent."""

    accuracy: float
    mb: float


class Split(NamedTuple):
    """Images as bytes [N, 8, 8, 48], patch by patch, and their labels."""

    patches: Tensor
    labels: Tensor


@cache
def data(path: str, held_out: bool) -> tuple[Split, Split]:
    """What is trained on, and what rates it: held-out training images, or the test images."""
    root = Path(path)
    images = cached(root, Path.home() / ".cache" / "lightning-slowmo", lambda: read_cifar10(root))
    train, test = (Split(_cut(images[f"{name}_images"]), images[f"{name}_labels"]) for name in ("train", "test"))
    if not held_out:
        return train, test
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(0))
    rating, rest = order[:HELD_OUT], order[HELD_OUT:]
    return Split(*(each[rest] for each in train)), Split(*(each[rating] for each in train))


def _cut(images: Tensor) -> Tensor:
    return _merged(images.permute(0, 2, 3, 1)[None], 4)[0].contiguous()


def initial(seed: int) -> list[Tensor]:
    """Weights [inputs, outputs] and biases of one model."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(48, WIDTHS[0]), (4 * WIDTHS[0], WIDTHS[1]), (4 * WIDTHS[1], WIDTHS[2]), (4 * WIDTHS[2], 10)]
    values = []
    for inputs, outputs in sizes:
        values += [torch.randn(inputs, outputs, generator=generator) * math.sqrt(2 / inputs), torch.zeros(outputs)]
    return values


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
    grid = torch.relu(_dense(patches.float().div_(64).sub_(2), *values[:2]))
    for layer in (2, 4):
        grid = torch.relu(_dense(_merged(grid, 2), *values[layer : layer + 2]))
    return _dense(grid.flatten(2), *values[-2:])


def _dense(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    rows = torch.baddbmm(bias[:, None], inputs.flatten(1, -2), weight)
    return rows.view(*inputs.shape[:-1], weight.shape[-1])


def accuracy(values: Sequence[Tensor], split: Split) -> float:
    """Of one model, in percent."""
    model = [value[None] for value in values]
    right = [
        (logits(model, patches[None])[0].argmax(-1) == labels).sum()
        for patches, labels in zip(split.patches.split(1000), split.labels.split(1000), strict=True)
    ]
    return 100 * float(sum(right)) / len(split.labels)


def rate_at(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate at a step: a straight line up, then half a cosine."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def train(
    task: Task, algorithm: Algorithm, inner: Inner, rate: float, seed: int, held_out: bool, accumulate: int = 1
) -> Outcome:
    """Train, and look at the consensus at the end.

    Args:
        task: the problem.
        algorithm: the configuration.
        inner: makes the optimizers.
        rate: peak learning rate of the first of them; those of the others keep their proportion to it.
        seed: of the model and the order of images.
        held_out: whether held-out training images rate it, and not the test images.
        accumulate: batches whose mean gradient makes one step; there are as many fewer steps.

    Returns:
        Accuracy, NaN if the run diverged, and MB.
    """
    learn, rating = data(task.data, held_out)
    order = torch.randperm(len(learn.labels), generator=torch.Generator().manual_seed(1000 + seed))
    stacked = [value.repeat(task.workers, *[1] * value.dim()).requires_grad_() for value in initial(seed)]
    models = [[nn.Parameter(value.detach()[i]) for value in stacked] for i in range(task.workers)]
    optimizers = [inner(model, rate) for model in models]
    peaks = [group["lr"] for optimizer in optimizers[0] for group in optimizer.param_groups]
    workers = Workers.simulated(task.workers)
    engines = together(workers, lambda own: Engine(algorithm, optimizers[own.rank], own))
    steps, warmup = task.steps // accumulate, task.warmup // accumulate
    step_images = task.workers * task.batch * accumulate

    def turn(own: Workers) -> None:
        engine, mine = engines[own.rank], optimizers[own.rank]
        engine.after_backward()
        for index, optimizer in enumerate(mine):
            optimizer.step()
            engine.after_step(index)

    sent = [own.traffic.sent for own in workers]
    for step in range(steps):
        chosen = order[torch.arange(step * step_images, (step + 1) * step_images) % len(order)]
        patches = learn.patches[chosen].view(task.workers, -1, *learn.patches.shape[1:])
        labels = learn.labels[chosen].view(task.workers, -1)
        losses = nn.functional.cross_entropy(logits(stacked, patches).flatten(0, 1), labels.flatten(), reduction="sum")
        gradients = torch.autograd.grad(losses / labels.shape[1], stacked)
        if not math.isfinite(losses.item()):
            return Outcome(float("nan"), 0.0)
        share = rate_at(step, steps, warmup)
        for rank in range(task.workers):
            for parameter, gradient in zip(models[rank], gradients, strict=True):
                parameter.grad = gradient[rank]
            groups = [group for optimizer in optimizers[rank] for group in optimizer.param_groups]
            for group, peak in zip(groups, peaks, strict=True):
                group["lr"] = peak * share
        together(workers, turn)
    sent = [own.traffic.sent - before for own, before in zip(workers, sent, strict=True)]
    together(workers, lambda own: engines[own.rank].finish())
    if not all(value.isfinite().all() for value in models[0]):
        return Outcome(float("nan"), 0.0)
    with torch.no_grad():
        return Outcome(accuracy(models[0], rating), sum(sent) / task.workers / 1e6)
