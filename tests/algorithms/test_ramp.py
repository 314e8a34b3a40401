"""Outer momenta that change (Pier), and the outer step of a single worker (SNOO)."""

import pickle
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from lightning_slowmo import AllReduce, DiLoCo, PostLocal, Ramp, SlowMo, Workers
from tests.algorithms import reference
from tests.algorithms.training import CHANGING, CONSTANT, MOMENTUM, Training, differ, goes_on_bit_exactly, same, train
from tests.on_workers import taking_turns

RAMP = Ramp({4: 0.1, 12: 0.9, 16: 0.9, 20: 0.3})
AT = {0: 0.1, 4: 0.1, 8: 0.5, 12: 0.9, 14: 0.9, 16: 0.9, 18: 0.6, 20: 0.3, 10**6: 0.3}


def test_a_ramp_is_straight_between_its_points():
    assert {step: pytest.approx(RAMP.at(step)) for step in AT} == AT
    twin = pickle.loads(pickle.dumps(RAMP))
    assert (twin, hash(twin), eval(repr(twin), {"Ramp": Ramp})) == (RAMP, hash(RAMP), RAMP)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ({}, "points must be a mapping"),
        (0.9, "points must be a mapping"),
        ({-1: 0.5}, "the step of a point must be an integer of at least 0, got -1"),
        ({0: 0.5, 9: 1.0}, r"the momentum at step 9 must be a number in \[0, 1\), got 1.0"),
    ],
)
def test_bad_ramps_are_refused(points, message):
    with pytest.raises(ValueError, match=message):
        Ramp(points)


class Ramped:
    """An outer step of the reference whose momentum is looked up at each period's end."""

    def __init__(self, outer, name, period):
        self.outer, self.name, self.period, self.ends = outer, name, period, {}

    def __call__(self, index, rate, start, mean):
        self.ends[index] = self.ends.get(index, 0) + self.period
        setattr(self.outer, self.name, RAMP.at(self.ends[index]))
        return self.outer(index, rate, start, mean)


@taking_turns(1, 2, 3)
def test_ramped_momenta_follow_the_reference(workers):
    inner = partial(reference.SGD, 0.9)
    slowmo = train(workers, SlowMo(sync_every=4, slow_momentum=RAMP, slow_lr=0.9), CHANGING, MOMENTUM)
    paper = Ramped(reference.SlowMo(0.0, 0.9), "beta", 4)
    same(slowmo, reference.trajectory(CHANGING, workers.size, 4, paper, inner, "reset")[workers.rank])
    diloco = train(workers, DiLoCo(3, outer_momentum=RAMP), CHANGING, MOMENTUM)
    paper = Ramped(reference.DiLoCo(), "momentum", 3)
    same(diloco, reference.trajectory(CHANGING, workers.size, 3, paper, inner)[workers.rank])
    differ(diloco, train(workers, DiLoCo(3), CHANGING, MOMENTUM))


@taking_turns(2)
def test_a_flat_ramp_is_its_constant_and_a_resume_keeps_its_place(workers):
    flat = train(workers, DiLoCo(3, outer_momentum=Ramp({7: 0.8})), CHANGING)
    np.testing.assert_array_equal(flat, train(workers, DiLoCo(3, outer_momentum=0.8), CHANGING))
    for algorithm in (DiLoCo(3, outer_momentum=RAMP), SlowMo(sync_every=5, slow_momentum=RAMP)):
        goes_on_bit_exactly(lambda algorithm=algorithm: Training(workers, algorithm, CHANGING, MOMENTUM), 8)


@taking_turns(2)
def test_after_averaged_gradients_a_ramp_is_where_training_is(workers):
    """Pier's start: synchronous steps, then outer steps whose momentum has its own course."""
    ours = train(workers, DiLoCo(PostLocal(8, 4), outer_momentum=RAMP), CHANGING, MOMENTUM)
    parts = Training(workers, AllReduce(), CHANGING, MOMENTUM)
    for _ in range(8):
        parts.step()
    later = Ramp({step - 8: momentum for step, momentum in RAMP.points.items() if step > 8} | {0: RAMP.at(8)})
    parts.engine = type(parts.engine)(DiLoCo(4, outer_momentum=later), [parts.optimizer], workers)
    same(ours[8:], parts.trajectory())


# SNOO: one worker -----------------------------------------------------------------------------------------------------


def snoo(problem, k, lr, mu):
    """Step-K Nesterov outer optimizer, by its listing: fast steps, then a Nesterov step along what they covered."""
    slow = problem.initial()
    fast, b, rows = [x.copy() for x in slow], [np.zeros_like(x) for x in slow], []
    m = [np.zeros_like(x) for x in slow]
    for step, rates in enumerate(problem.rates):
        for p, group in enumerate(problem.group_of):
            m[p] = 0.9 * m[p] + problem.gradient(0, step, p, fast[p])
            fast[p] = fast[p] - rates[group] * m[p]
            if (step + 1) % k == 0:
                s = slow[p] - fast[p]
                b[p] = mu * b[p] + s
                slow[p] = slow[p] - lr * (mu * b[p] + s)
                fast[p] = slow[p].copy()
        rows.append(np.concatenate([x.ravel() for x in fast]))
    return np.stack(rows)


def test_snoo_is_diloco_with_one_worker():
    alone = Workers()
    for k, lr, mu in ((1, 0.9, 0.5), (4, 0.68, 0.37), (5, 1.0, 0.0)):
        same(train(alone, DiLoCo(k, lr, mu), CHANGING, MOMENTUM), snoo(CHANGING, k, lr, mu))


def test_snoo_at_every_step_is_nesterov_and_at_rate_one_without_momentum_nothing():
    alone = Workers()
    nesterov = partial(torch.optim.SGD, lr=0.1, momentum=0.6, nesterov=True)
    scaled = replace(CONSTANT, rates=tuple(tuple(0.7 * rate for rate in rates) for rates in CONSTANT.rates))
    same(train(alone, DiLoCo(1, 0.7, 0.6), CONSTANT), train(alone, AllReduce(), scaled, nesterov))
    same(train(alone, DiLoCo(4, 1.0, 0.0), CHANGING, MOMENTUM), train(alone, AllReduce(), CHANGING, MOMENTUM))
