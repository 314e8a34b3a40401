"""Learning-rate schedules, stepped after every optimizer step.

Each takes the optimizer, whose groups hold the peak rates, and how long training will be. What happens at a share of
training moves along when a run is shortened; warm-ups are in epochs, or in steps where the paper has it so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def constant(optimizer: Optimizer, *, total_steps: int, steps_per_epoch: float) -> LambdaLR:
    """The same rate throughout.

    Args:
        optimizer: of the rates.
        total_steps: optimizer steps of the whole training.
        steps_per_epoch: optimizer steps of an epoch.
    """
    return LambdaLR(optimizer, lambda step: 1.0)


def milestones(
    optimizer: Optimizer,
    *,
    total_steps: int,
    steps_per_epoch: float,
    warmup_epochs: float = 5,
    warmup_from: float = 0.0,
    drops: Sequence[float] = (0.5, 0.75),
    factor: float = 0.1,
) -> LambdaLR:
    """Linear warm-up, then steps down: Goyal et al., "Accurate, Large Minibatch SGD", https://arxiv.org/abs/1706.02677.

    Args:
        optimizer: of the rates.
        total_steps: optimizer steps of the whole training.
        steps_per_epoch: optimizer steps of an epoch.
        warmup_epochs: length of the warm-up.
        warmup_from: where it starts, as a share of the peak rate.
        drops: when the rate falls, as shares of the training, in ascending order.
        factor: what the rate is multiplied by at each of them.

    Raises:
        ValueError: if ``drops`` is not ascending within 0 and 1.
    """
    if list(drops) != sorted(drops) or not all(0 <= drop <= 1 for drop in drops):
        raise ValueError(f"drops must be ascending shares of the training, from 0 to 1, got {list(drops)}.")
    warmup = warmup_epochs * steps_per_epoch

    def scale(step: int) -> float:
        decay = factor ** sum(step >= drop * total_steps for drop in drops)
        return decay * _rise(step, warmup, warmup_from)

    return LambdaLR(optimizer, scale)


def cosine(
    optimizer: Optimizer,
    *,
    total_steps: int,
    steps_per_epoch: float,
    warmup_epochs: float = 0,
    warmup_from: float = 0.0,
    final: float = 0.0,
) -> LambdaLR:
    """Linear warm-up, then half a cosine down: Loshchilov, Hutter, "SGDR", https://arxiv.org/abs/1608.03983.

    Args:
        optimizer: of the rates.
        total_steps: optimizer steps of the whole training.
        steps_per_epoch: optimizer steps of an epoch.
        warmup_epochs: length of the warm-up.
        warmup_from: where it starts, as a share of the peak rate.
        final: where the cosine ends, as a share of the peak rate.
    """
    warmup = warmup_epochs * steps_per_epoch

    def scale(step: int) -> float:
        if step < warmup:
            return _rise(step, warmup, warmup_from)
        done = min(1.0, (step - warmup) / max(1.0, total_steps - warmup))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))

    return LambdaLR(optimizer, scale)


def inverse_sqrt(
    optimizer: Optimizer,
    *,
    total_steps: int,
    steps_per_epoch: float,
    warmup_steps: int = 4000,
    warmup_init_lr: float = 1e-7,
) -> LambdaLR:
    """Linear warm-up, then the inverse square root of the step: Vaswani et al., https://arxiv.org/abs/1706.03762.

    Args:
        optimizer: of the rates.
        total_steps: optimizer steps of the whole training.
        steps_per_epoch: optimizer steps of an epoch.
        warmup_steps: optimizer steps until the peak rate.
        warmup_init_lr: the rate at the start.

    Raises:
        ValueError: if ``warmup_steps`` is not positive.
    """
    if warmup_steps < 1:
        raise ValueError(f"warmup_steps must be at least 1, got {warmup_steps}.")

    def scale(peak: float) -> Callable[[int], float]:
        start = warmup_init_lr / peak if peak else 0.0
        rise = (1 - start) / warmup_steps
        return lambda step: start + rise * step if step < warmup_steps else math.sqrt(warmup_steps / step)

    return LambdaLR(optimizer, [scale(group["lr"]) for group in optimizer.param_groups])


def _rise(step: int, warmup: float, start: float) -> float:
    """The share of the peak rate at a step: a straight line from ``start`` that reaches 1 after the warm-up."""
    return 1.0 if step >= warmup else start + (1 - start) * (step + 1) / (warmup + 1)
