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

    def reset(self, index: int) -> None: ...


class SGD:
    """SGD, with heavy-ball or Nesterov momentum."""

    def __init__(self, momentum: float = 0.0, nesterov: bool = False) -> None:
        self.momentum, self.nesterov = momentum, nesterov
        self.m: dict[int, Array] = {}
        self.buffers = [self.m]

    def step(self, index: int, x: Array, g: Array, rate: float) -> Array:
        m = self.m[index] = self.momentum * self.m.get(index, 0.0) + g
        return x - rate * (g + self.momentum * m if self.nesterov else m)

    def reset(self, index: int) -> None:
        self.m.pop(index, None)


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

    def reset(self, index: int) -> None:
        for buffer in (self.m, self.v, self.t):
            buffer.pop(index, None)


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
    sync_every: int | list[int],
    outer: Outer,
    inner: Callable[[], Inner] = SGD,
    inner_buffers: str = "maintain",
    overlap: int = 0,
    fragments: int = 1,
) -> Array:
    """Every worker's parameters after every step: an array of workers x steps x elements.

    With overlap, what comes of an outer step is taken in some steps after the mean was taken; with fragments, each
    outer step is one of a part of the parameters. Instead of one period, the lengths of all may be given.
    """
    lengths = sync_every if isinstance(sync_every, list) else [sync_every // fragments] * len(problem.rates)
    ends = {int(end): turn for turn, end in enumerate(np.cumsum(lengths))}
    indices = range(len(problem.shapes))
    fragment_of = deal([int(np.prod(shape)) for shape in problem.shapes], fragments)
    start = problem.initial()
    x = [list(start) for _ in range(workers)]
    optimizers = [inner() for _ in range(workers)]
    history: list[list[Array]] = [[] for _ in range(workers)]
    corrections: dict[int, list[tuple[int, int, Array]]] = {}
    for step, rates in enumerate(problem.rates):
        for i in range(workers):
            for p in indices:
                g = problem.gradient(i, step, p, x[i][p])
                x[i][p] = optimizers[i].step(p, x[i][p], g, rates[problem.group_of[p]])
        if step + 1 in ends:
            chosen = [p for p in indices if fragment_of[p] == ends[step + 1] % fragments]
            for p in chosen:
                mean = sum(x[i][p] for i in range(workers)) / workers
                start[p] = outer(p, rates[problem.group_of[p]], start[p], mean)
                corrections.setdefault(step + overlap, []).extend((i, p, start[p] - x[i][p]) for i in range(workers))
            _treat(optimizers, inner_buffers, chosen)
        for i, p, correction in corrections.pop(step, []):
            x[i][p] = x[i][p] + correction
        for i in range(workers):
            history[i].append(np.concatenate([np.ravel(value) for value in x[i]]))
    return np.array(history)


def deal(sizes: list[int], fragments: int) -> list[int]:
    """The fragment of each parameter: in the order of their sizes, each goes where there is least."""
    totals = np.zeros(fragments)
    fragment_of = [0] * len(sizes)
    for p in np.argsort([-size for size in sizes], kind="stable"):
        fragment_of[p] = int(totals.argmin())
        totals[fragment_of[p]] += sizes[p]
    return fragment_of


def _treat(optimizers: list[Inner], inner_buffers: str, indices: list[int]) -> None:
    """Line 2 of SlowMo's Algorithm 1."""
    if inner_buffers == "reset":
        for optimizer in optimizers:
            for p in indices:
                optimizer.reset(p)
    elif inner_buffers == "average":
        for same in zip(*(optimizer.buffers for optimizer in optimizers), strict=True):
            mean = {p: sum(buffer[p] for buffer in same) / len(same) for p in indices}
            for buffer in same:
                buffer.update(mean)
