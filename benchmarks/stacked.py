"""Many workers on one core, quickly: their gradients come from one batched computation, and each has an engine.

The parameters of all workers lie one after another in one tensor for each layer, of which a worker's own are a view.
So a batched product makes a step of all of them, at little more than the cost of its arithmetic, and the algorithms are
the package's own, on workers that take turns (``Workers.simulated``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks.problems import Problem
from lightning_slowmo import Algorithm, Engine, Workers, together

Inner = Callable[[Sequence[nn.Parameter], float], list[Optimizer]]
"""Makes the optimizers of a worker's parameters at a peak learning rate."""


@dataclass(frozen=True)
class Training:
    """What all rows have in common.

    Attributes:
        workers: how many.
        batch: examples of one worker in a step.
        steps: optimizer steps.
        warmup: of them, in which the learning rate rises; then it follows half a cosine down to 0.
    """

    workers: int = 8
    batch: int = 8
    steps: int = 240
    warmup: int = 12


class Outcome(NamedTuple):
    """What a run came to: the rating of the consensus, and MB (10^6 bytes) that a worker has sent."""

    rating: float
    mb: float


def rate_at(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate at a step: a straight line up, then half a cosine."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def train(
    problem: Problem,
    training: Training,
    algorithm: Algorithm,
    inner: Inner,
    rate: float,
    seed: int,
    held_out: bool,
    accumulate: int = 1,
) -> Outcome:
    """Train, and look at the consensus at the end.

    Args:
        problem: data and models.
        training: the size of the training.
        algorithm: the configuration.
        inner: makes the optimizers.
        rate: peak learning rate of the first of them; those of the others keep their proportion to it.
        seed: of the model and the order of examples.
        held_out: whether held-out training examples rate it, and not the test data.
        accumulate: batches whose mean gradient makes one step; there are as many fewer steps.

    Returns:
        The rating, NaN if the run diverged, and MB.
    """
    learn, rating = problem.data(held_out)
    count = len(learn[0])
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1000 + seed))
    stacked = [value.repeat(training.workers, *[1] * value.dim()).requires_grad_() for value in problem.initial(seed)]
    models = [[nn.Parameter(value.detach()[i]) for value in stacked] for i in range(training.workers)]
    optimizers = [inner(model, rate) for model in models]
    peaks = [group["lr"] for optimizer in optimizers[0] for group in optimizer.param_groups]
    workers = Workers.simulated(training.workers)
    engines = together(workers, lambda own: Engine(algorithm, optimizers[own.rank], own))
    steps, warmup = training.steps // accumulate, training.warmup // accumulate
    step_examples = training.workers * training.batch * accumulate

    def turn(own: Workers) -> None:
        engine, mine = engines[own.rank], optimizers[own.rank]
        engine.after_backward()
        for index, optimizer in enumerate(mine):
            optimizer.step()
            engine.after_step(index)

    sent = [own.traffic.sent for own in workers]
    for step in range(steps):
        chosen = order[torch.arange(step * step_examples, (step + 1) * step_examples) % count]
        examples = tuple(each[chosen].view(training.workers, -1, *each.shape[1:]) for each in learn)
        loss = problem.loss(stacked, examples)
        gradients = [each.contiguous() for each in torch.autograd.grad(loss, stacked)]  # fused optimizers assume it
        if not math.isfinite(loss.item()):
            return Outcome(float("nan"), 0.0)
        share = rate_at(step, steps, warmup)
        for rank in range(training.workers):
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
        return Outcome(problem.rating(models[0], rating), sum(sent) / training.workers / 1e6)
