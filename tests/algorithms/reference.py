"""The papers' algorithms in plain numpy, on all workers in one process: what the package is compared with.

It shares no code with the package and keeps to the papers' own variables (SlowMo's u with its division by the learning
rate, BMUF's two models), where the package has others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from tests.algorithms.training import Array, Problem

# Inner optimizers: one object per worker ------------------------------------------------------------------------------


class Inner(Protocol):
    buffers: list[dict[int, Array]]

    def step(self, index: int, x: Array, g: Array, rate: float) -> Array: ...

    def reset(self) -> None: ...


class SGD:
    """SGD, with heavy-ball or Nesterov momentum."""

    def __init__(self, momentum: float = 0.0, nesterov: bool = False) -> None:
        self.momentum, self.nesterov = momentum, nesterov
        self.m: dict[int, Array] = {}
        self.buffers = [self.m]

    def step(self, index: int, x: Array, g: Array, rate: float) -> Array:
        m = self.m[index] = self.momentum * self.m.get(index, 0.0) + g
        return x - rate * (g + self.momentum * m if self.nesterov else m)

    def reset(self) -> None:
        self.m.clear()


class Adam:
    """Adam, with decoupled weight decay."""

    def __init__(self, b1: float = 0.9, b2: float = 0.98, eps: float = 1e-8, weight_decay: float = 0.0) -> None:
        self.b1, self.b2, self.eps, self.weight_decay = b1, b2, eps, weight_decay
        self.m: dict[int, Array] = {}
        self.v: dict[int, Array] = {}
        self.t: dict[int, int] = {}
        self.buffers = [self.m, self.v]

    def step(self, index: int, x: Array, g: Array, rate: float) -> Array:
        t = self.t[index] = self.t.get(index, 0) + 1
        m = self.m[index] = self.b1 * self.m.get(index, 0.0) + (1 - self.b1) * g
        v = self.v[index] = self.b2 * self.v.get(index, 0.0) + (1 - self.b2) * g * g
        x = x * (1 - rate * self.weight_decay)
        return x - rate * (m / (1 - self.b1**t)) / (np.sqrt(v / (1 - self.b2**t)) + self.eps)

    def reset(self) -> None:
        self.m.clear()
        self.v.clear()
        self.t.clear()


# Outer steps: from the last common point and the workers' mean to the next common point -------------------------------


class Average:
    """Local SGD."""

    def __call__(self, index: int, rate: float, start: Array, mean: Array) -> Array:
        return mean


class SlowMo:
    """Lines 7 and 8 of Algorithm 1, with the paper's u."""

    def __init__(self, beta: float, alpha: float = 1.0) -> None:
        self.beta, self.alpha = beta, alpha
        self.u: dict[int, Array] = {}

    def __call__(self, index: int, rate: float, start: Array, mean: Array) -> Array:
        if rate == 0:  # where the paper's line 7 is undefined
            self.u[index] = self.beta * self.u.get(index, 0.0)
            return start - self.alpha * (start - mean)
        u = self.u[index] = self.beta * self.u.get(index, 0.0) + (start - mean) / rate
        return start - self.alpha * rate * u


class BMUF:
    """Blockwise model-update filtering: W is the filtered model, and local steps start from W_g."""

    def __init__(self, eta: float, zeta: float = 1.0, nesterov: bool = False) -> None:
        self.eta, self.zeta, self.nesterov = eta, zeta, nesterov
        self.w: dict[int, Array] = {}
        self.d: dict[int, Array] = {}

    def __call__(self, index: int, rate: float, start: Array, mean: Array) -> Array:
        d = self.d[index] = self.eta * self.d.get(index, 0.0) + self.zeta * (mean - start)
        w = self.w[index] = self.w.get(index, start) + d
        return w + self.eta * d if self.nesterov else w


class DiLoCo:
    """Nesterov SGD on the outer gradient."""

    def __init__(self, lr: float = 0.7, momentum: float = 0.9) -> None:
        self.lr, self.momentum = lr, momentum
        self.v: dict[int, Array] = {}

    def __call__(self, index: int, rate: float, start: Array, mean: Array) -> Array:
        delta = start - mean
        v = self.v[index] = self.momentum * self.v.get(index, 0.0) + delta
        return start - self.lr * (delta + self.momentum * v)


Outer = Callable[[int, float, Array, Array], Array]


def trajectory(
    problem: Problem,
    workers: int,
    sync_every: int,
    outer: Outer,
    inner: Callable[[], Inner] = SGD,
    inner_buffers: str = "maintain",
) -> Array:
    """Every worker's parameters after every step: an array of workers x steps x elements."""
    indices = range(len(problem.shapes))
    start = problem.initial()
    x = [list(start) for _ in range(workers)]
    optimizers = [inner() for _ in range(workers)]
    history: list[list[Array]] = [[] for _ in range(workers)]
    for step, rates in enumerate(problem.rates):
        for i in range(workers):
            for p in indices:
                g = problem.gradient(i, step, p, x[i][p])
                x[i][p] = optimizers[i].step(p, x[i][p], g, rates[problem.group_of[p]])
        if (step + 1) % sync_every == 0:
            means = [sum(x[i][p] for i in range(workers)) / workers for p in indices]
            start = [outer(p, rates[problem.group_of[p]], start[p], means[p]) for p in indices]
            x = [list(start) for _ in range(workers)]
            _treat(optimizers, inner_buffers)
        for i in range(workers):
            history[i].append(np.concatenate([np.ravel(value) for value in x[i]]))
    return np.array(history)


def _treat(optimizers: list[Inner], inner_buffers: str) -> None:
    """Line 2 of SlowMo's Algorithm 1."""
    if inner_buffers == "reset":
        for optimizer in optimizers:
            optimizer.reset()
    elif inner_buffers == "average":
        for same in zip(*(optimizer.buffers for optimizer in optimizers), strict=True):
            mean = {p: sum(buffer[p] for buffer in same) / len(same) for p in same[0]}
            for buffer in same:
                buffer.update(mean)
