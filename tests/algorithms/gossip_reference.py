"""Gossip and SlowMo over gossip in plain numpy, worker by worker and message by message, as the papers list them.

Push-sum weights travel with the messages here, and nothing is shared with the package.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Gradient = Callable[[int, int, np.ndarray], np.ndarray]
"""Gradient of a worker at a step and a model."""


class Gossip:
    """All workers of one run.

    Args:
        matrix: mixing matrix of a step; entry [i, j] is the share of worker j's model that goes to worker i.
        start: the model of each worker, a row each.
        gradient: of whom, when and where.
        rate: learning rate gamma of a step.
        overlap: steps that a message is late.
        order: as in the package.
        momentum: of the local heavy-ball SGD.
    """

    def __init__(
        self,
        matrix: Callable[[int], np.ndarray],
        start: np.ndarray,
        gradient: Gradient,
        rate: Callable[[int], float],
        overlap: int = 0,
        order: str = "adapt_then_combine",
        momentum: float = 0.9,
    ) -> None:
        self.matrix, self.gradient, self.rate = matrix, gradient, rate
        self.overlap, self.order, self.momentum = overlap, order, momentum
        self.x = [row.copy() for row in start]
        self.w = [1.0 for _ in start]
        self.m = [np.zeros_like(row) for row in start]
        self.mail: list[tuple[int, int, np.ndarray, float]] = []  # (due at step, to whom, share of x, share of w)
        self.k = 0

    @property
    def z(self) -> np.ndarray:
        """The de-biased models."""
        return np.array([x / w for x, w in zip(self.x, self.w, strict=True)])

    def steps(self) -> list[np.ndarray]:
        """The optimizers' steps gamma d, at the de-biased models."""
        for i, z in enumerate(self.z):
            self.m[i] = self.momentum * self.m[i] + self.gradient(i, self.k, z)
        return [self.rate(self.k) * m for m in self.m]

    def step(self) -> None:
        """One step of all workers."""
        p, d, n = self.matrix(self.k), self.steps(), len(self.x)
        combine_first = self.order == "combine_while_adapt"
        half = [self.x[i].copy() if combine_first else self.x[i] - d[i] for i in range(n)]
        weights = list(self.w)
        for j in range(n):
            for i in range(n):
                if i != j and p[i, j]:
                    self.mail.append((self.k + self.overlap, i, p[i, j] * half[j], p[i, j] * weights[j]))
        for i in range(n):
            self.x[i], self.w[i] = p[i, i] * half[i], p[i, i] * weights[i]
            for due, to, x, w in self.mail:
                if (due, to) == (self.k, i):
                    self.x[i], self.w[i] = self.x[i] + x, self.w[i] + w
            if combine_first:
                self.x[i] = self.x[i] - d[i]
        self.mail = [letter for letter in self.mail if letter[0] > self.k]
        self.k += 1

    def total(self) -> tuple[np.ndarray, float]:
        """All mass, that in flight included: the sums of x and of w."""
        return (
            np.sum(self.x, axis=0) + sum(letter[2] for letter in self.mail),
            sum(self.w) + sum(letter[3] for letter in self.mail),
        )


class SlowMo:
    """SlowMo over gossip: Algorithm 1 of the paper with its u; line 2 resets the momentum."""

    def __init__(self, base: Gossip, every: int, beta: float, alpha: float = 1.0, average: bool = True) -> None:
        self.base, self.every, self.beta, self.alpha, self.average = base, every, beta, alpha, average
        self.anchor, self.u = base.z, np.zeros_like(base.z)

    def step(self) -> None:
        """One step, and lines 6 to 8 after every period."""
        rate = self.base.rate(self.base.k)
        self.base.step()
        if self.base.k % self.every:
            return
        base, n = self.base, len(self.base.x)
        if self.average:
            x, w = base.total()
            base.x, base.w, base.mail = [x / w] * n, [1.0] * n, []
        self.u = self.beta * self.u + (self.anchor - base.z) / rate
        self.anchor = self.anchor - self.alpha * rate * self.u
        moves = self.anchor - base.z  # of all mass that is a worker's, also that on its way to it
        base.x = [z * w for z, w in zip(self.anchor, base.w, strict=True)]
        base.mail = [(due, to, x + w * moves[to], w) for due, to, x, w in base.mail]
        base.m = [np.zeros_like(m) for m in base.m]
