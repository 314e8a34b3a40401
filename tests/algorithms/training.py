"""Random problems on which workers disagree, and an engine that trains on them: what the tests here have in common."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_slowmo import Algorithm, Engine, Workers
from lightning_slowmo.bucket_sizes import BucketSizes

Array = NDArray[np.float64]
Shape = tuple[int, ...]

PLAIN = partial(torch.optim.SGD, lr=0.1)
MOMENTUM = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


@dataclass(frozen=True)
class Problem:
    """Noisy gradients of a smooth function, other ones for each worker and step.

    Attributes:
        groups: shapes of the parameters of each parameter group.
        rates: learning rate by step and group.
        seed: of everything random.
        shared: whether all workers draw the same gradients.
        scale: factor of all gradients.
    """

    groups: tuple[tuple[Shape, ...], ...]
    rates: tuple[tuple[float, ...], ...]
    seed: int = 0
    shared: bool = False
    scale: float = 1.0

    @property
    def shapes(self) -> list[Shape]:
        return [shape for group in self.groups for shape in group]

    @property
    def group_of(self) -> list[int]:
        """The group of each parameter."""
        return [index for index, group in enumerate(self.groups) for _ in group]

    def initial(self) -> list[Array]:
        rng = np.random.default_rng(self.seed)
        return [rng.normal(size=shape) for shape in self.shapes]

    def gradient(self, worker: int, step: int, index: int, x: Array) -> Array:
        noise = np.random.default_rng((self.seed, 0 if self.shared else worker, step, index)).normal(size=x.shape)
        return self.scale * (x - noise + 0.3 * np.sin(3 * x))

    def mean_gradient(self, workers: int, step: int, index: int, x: Array) -> Array:
        return sum(self.gradient(worker, step, index, x) for worker in range(workers)) / workers


GROUPS: tuple[tuple[Shape, ...], ...] = (((3, 2), ()), ((7,), (0,), (2, 1, 3)))
STEPS = 24

CHANGING = Problem(GROUPS, tuple((0.1 + 0.05 * math.sin(step), 0.02 * (1 + step % 5)) for step in range(STEPS)), seed=1)
"""Learning rates that differ by group and change at every step."""

CONSTANT = replace(CHANGING, rates=((0.1, 0.05),) * STEPS)


def random_problem(seed: int) -> Problem:
    """Any shapes, groups and learning rates; among the parameters a scalar, an empty one and one of many buckets."""
    rng = np.random.default_rng(seed)
    shapes: list[Shape] = [(), (0,), (90 + 2 * seed,)]
    shapes += [tuple(map(int, rng.integers(1, 6, size=rng.integers(1, 4)))) for _ in range(4)]
    rng.shuffle(shapes)
    cut = int(rng.integers(1, len(shapes)))
    rates = rng.uniform(0.01, 0.2, size=(int(rng.integers(10, 20)), 2))
    return Problem((tuple(shapes[:cut]), tuple(shapes[cut:])), tuple(map(tuple, rates.tolist())), seed)


@contextmanager
def small_buckets(
    workers: Workers, bucket_bytes: int = 256, in_place_bytes: int = 512, block_numel: int = 10
) -> Iterator[None]:
    """Let small models have many buckets, under way at the same time, some of them in place, of several blocks."""
    usual, workers.sizes = workers.sizes, BucketSizes(bucket_bytes, in_place_bytes, block_numel)
    try:
        yield
    finally:
        workers.sizes = usual


class Training:
    """An engine on a problem, step by step."""

    def __init__(
        self,
        workers: Workers,
        algorithm: Algorithm,
        problem: Problem,
        optimizer: Callable[..., Optimizer] = PLAIN,
        dtype: torch.dtype = torch.float64,
        start: Array | None = None,
    ) -> None:
        self.workers = workers
        self.problem = problem
        initial = problem.initial()
        if start is not None:
            pieces = np.split(start, np.cumsum([value.size for value in initial])[:-1])
            initial = [piece.reshape(value.shape) for piece, value in zip(pieces, initial, strict=True)]
        self.parameters = [Parameter(torch.tensor(value, dtype=dtype)) for value in initial]
        left = iter(self.parameters)
        self.optimizer = optimizer([{"params": [next(left) for _ in group]} for group in problem.groups])
        self.engine = Engine(algorithm, [self.optimizer], workers)
        self.steps = 0

    def step(self) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.problem.rates[self.steps], strict=True):
            group["lr"] = rate
        for index, parameter in enumerate(self.parameters):
            x = parameter.detach().double().numpy()
            gradient = self.problem.gradient(self.workers.rank, self.steps, index, x)
            parameter.grad = torch.as_tensor(gradient, dtype=parameter.dtype)
        self.engine.after_backward()
        self.engine.before_step()
        self.optimizer.step()
        self.engine.after_step()
        self.optimizer.zero_grad()
        self.steps += 1

    def values(self) -> Array:
        """All parameters of this worker in one vector."""
        return np.concatenate([parameter.detach().double().numpy().ravel() for parameter in self.parameters])

    def trajectory(self) -> Array:
        """Take all steps; the parameters after each."""
        rows = []
        while self.steps < len(self.problem.rates):
            self.step()
            rows.append(self.values())
        return np.stack(rows)


def train(
    workers: Workers,
    algorithm: Algorithm,
    problem: Problem,
    optimizer: Callable[..., Optimizer] = PLAIN,
    dtype: torch.dtype = torch.float64,
) -> Array:
    """This worker's parameters after each step."""
    return Training(workers, algorithm, problem, optimizer, dtype).trajectory()


def goes_on_bit_exactly(
    make: Callable[[], Training], at: int, whole: Training | None = None, expected: Array | None = None
) -> None:
    """Fail unless a run from state that was saved after some steps is the run itself, to the last bit.

    Args:
        make: makes a run at its start.
        at: steps before the state is saved.
        whole: a run that has taken some of them already; a new one if None.
        expected: the trajectory of a run of which no state was saved; if None, that of ``whole``.
    """
    whole = whole if whole is not None else make()
    while whole.steps < at:
        whole.step()
    file = io.BytesIO()  # through a file, and without unpickling anything but tensors and plain values
    torch.save([whole.engine.shared_state(), whole.engine.local_state(), whole.optimizer.state_dict()], file)
    file.seek(0)
    shared, local, inner = torch.load(file, weights_only=True)
    resumed = make()
    resumed.optimizer.load_state_dict(inner)
    resumed.engine.load_shared_state(shared)
    resumed.engine.load_local_state(local)
    resumed.steps = at
    np.testing.assert_array_equal(resumed.values(), whole.values())
    rows = expected[at:] if expected is not None else whole.trajectory()
    np.testing.assert_array_equal(resumed.trajectory(), rows)


def same(a: Array, b: Array, tolerance: float = 1e-10) -> None:
    """Fail unless two trajectories agree at every step."""
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


def differ(a: Array, b: Array) -> None:
    """Fail unless two trajectories part clearly: what makes an identity between two others worth anything."""
    assert np.abs(a - b).max() > 1e-3
