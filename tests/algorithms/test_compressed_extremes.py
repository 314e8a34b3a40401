"""Compressed algorithms where there is nothing to say, and where a worker has lost its numbers."""

import math
import warnings
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch

from lightning_slowmo import QPRSGD, APMSqueeze, DiLoCo, SlowMo, SQuARM, SyncError, Threshold
from lightning_slowmo.compression import QSGD, Sign, SignTopK, TopK
from tests.algorithms.training import CONSTANT, MOMENTUM, Problem, Training
from tests.on_workers import on_workers, taking_turns

THREE_BITS = QSGD(3, norm="max", bucket=64)
ALGORITHMS = [
    QPRSGD(2, THREE_BITS),
    QPRSGD(2, Sign("l1"), "two_shot", error_feedback=True),
    QPRSGD(2, THREE_BITS, "gossip"),
    SlowMo(sync_every=2, compressor=TopK(0.2)),
    DiLoCo(2, compressor=Sign("l2")),
    SQuARM("ring", 2, SignTopK(0.2), trigger=Threshold(1.0)),
    APMSqueeze(3),
    APMSqueeze(3, uncompressed_below=7),
]


@dataclass(frozen=True)
class Sick(Problem):
    """Worker 1 has gradients that are not finite at one step, the last before a sync."""

    bad: float = math.nan

    def gradient(self, worker, step, index, x):
        gradient = super().gradient(worker, step, index, x)
        return np.full_like(gradient, self.bad) if (worker, step) == (1, 9) else gradient


def training_of(workers, algorithm, problem):
    adam = isinstance(algorithm, APMSqueeze)
    optimizer = partial(torch.optim.Adam, betas=(0.9, 0.98)) if adam else MOMENTUM
    return Training(workers, algorithm, problem, optimizer, torch.float32)


@taking_turns(1, 3, each=ALGORITHMS)
def test_gradients_of_zero_move_nothing_by_a_bit(workers, case):
    training = training_of(workers, case, Problem(CONSTANT.groups, CONSTANT.rates, seed=1, scale=0.0))
    start = training.values()
    rows = training.trajectory()
    if isinstance(case, APMSqueeze):  # the exact mean of equal numbers at the end of the warm-up may lose the last bit
        np.testing.assert_allclose(rows[2], start, rtol=2**-22)
        start, rows = rows[2], rows[2:]
    assert (rows == start).all()
    assert training.engine.total.count


@on_workers(3, each=ALGORITHMS)
def test_numbers_that_are_not_finite_end_training_or_are_left_out_but_never_spread(workers, case):
    for bad in (math.nan, math.inf):
        problem = Sick(CONSTANT.groups, CONSTANT.rates, seed=1, bad=bad)
        with pytest.raises(SyncError, match="rank 1 are NaN or infinite"):
            training_of(workers, case, problem).trajectory()
        training = training_of(workers, case, problem)
        training.engine.on_nonfinite = "skip"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            rows = training.trajectory()
        assert len([w for w in caught if "left out of the mean" in str(w.message)]) == (workers.rank == 0)
        assert np.isfinite(rows).all()
        (unit,) = training.engine.units
        feedback = getattr(getattr(unit, "base", unit), "feedback", None)
        assert feedback is None or all(part.isfinite().all() for part in feedback.total())
