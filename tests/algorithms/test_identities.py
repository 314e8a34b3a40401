"""Algorithms that must be one another, to 1e-10 in float64, on real worker processes."""

import copy
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from lightning_slowmo import BMUF, AllReduce, DiLoCo, LocalSGD, SlowMo, Workers
from tests.algorithms import reference
from tests.algorithms.training import (
    CHANGING,
    CONSTANT,
    GROUPS,
    MOMENTUM,
    PLAIN,
    Problem,
    Training,
    differ,
    same,
    train,
)
from tests.on_workers import taking_turns

SIZES = (1, 2, 3, 4)

FACTORS = [1 / (1 + step // 4) for step in range(24)]
DECAYING = Problem(GROUPS, tuple((0.1 * factor, 0.05 * factor) for factor in FACTORS), seed=2)
"""All learning rates fall by the same factor, and only between periods of four steps."""


@taking_turns(*SIZES)
def test_slowmo_without_slow_momentum_is_local_sgd_at_any_learning_rate(workers):
    slowmo = SlowMo(sync_every=4, slow_momentum=0.0, slow_lr=1.0, inner_buffers="maintain")
    for optimizer in (PLAIN, MOMENTUM):
        same(train(workers, slowmo, CHANGING, optimizer), train(workers, LocalSGD(4), CHANGING, optimizer))
    differ(train(workers, replace(slowmo, slow_momentum=0.5), CHANGING), train(workers, LocalSGD(4), CHANGING))


@taking_turns(*SIZES)
def test_slowmo_at_every_step_is_large_batch_sgd_with_momentum(workers):
    beta, alpha = 0.6, 0.7
    for problem in (CONSTANT, CHANGING):
        slowmo = train(workers, SlowMo(sync_every=1, slow_momentum=beta, slow_lr=alpha), problem)
        scaled = replace(problem, rates=tuple(tuple(alpha * rate for rate in rates) for rates in problem.rates))
        same(slowmo, large_batch(scaled, workers.size, partial(torch.optim.SGD, lr=0.1, momentum=beta)))


@taking_turns(*SIZES)
def test_all_reduce_is_training_on_the_mean_gradient(workers):
    adam = partial(torch.optim.Adam, lr=0.1)
    for optimizer in (PLAIN, MOMENTUM, adam):
        same(train(workers, AllReduce(), CHANGING, optimizer), large_batch(CHANGING, workers.size, optimizer))


def large_batch(problem: Problem, workers: int, optimizer) -> np.ndarray:
    """One torch optimizer on the mean of all workers' gradients."""

    class MeanGradient(Problem):
        def gradient(self, worker, step, index, x):
            return self.mean_gradient(workers, step, index, x)

        def mean_gradient(self, workers, step, index, x):
            return problem.mean_gradient(workers, step, index, x)

    # LocalSGD on a worker that is alone does nothing but let the optimizer step.
    return train(Workers(), LocalSGD(), MeanGradient(**vars(problem)), optimizer)


@taking_turns(*SIZES)
def test_bmuf_is_slowmo_at_a_constant_learning_rate(workers):
    slowmo = SlowMo(sync_every=4, slow_momentum=0.6, slow_lr=0.8)
    bmuf = BMUF(sync_every=4, block_momentum=0.6, block_lr=0.8)
    for optimizer in (PLAIN, MOMENTUM):
        same(train(workers, bmuf, CONSTANT, optimizer), train(workers, slowmo, CONSTANT, optimizer))


@taking_turns(*SIZES)
def test_bmuf_parts_from_slowmo_when_the_rate_changes_by_the_unscaled_momentum_alone(workers):
    slowmo = train(workers, SlowMo(sync_every=4, slow_momentum=0.6), DECAYING)
    bmuf = BMUF(sync_every=4, block_momentum=0.6)
    plain = train(workers, bmuf, DECAYING)
    same(plain[:7], slowmo[:7])  # the first momentum that is carried to another rate moves step 8
    differ(plain, slowmo)

    rescaled = Training(workers, bmuf, DECAYING)
    for step in range(len(DECAYING.rates)):
        rescaled.engine.units[0].block_momentum = 0.6 * FACTORS[step] / FACTORS[max(0, step - 4)]
        rescaled.step()
        same(rescaled.values(), slowmo[step])


@taking_turns(*SIZES)
def test_bmuf_keeps_to_its_papers_two_models(workers):
    for nesterov in (False, True):
        bmuf = BMUF(sync_every=4, block_momentum=0.6, block_lr=0.8, nesterov=nesterov)
        paper = reference.trajectory(CHANGING, workers.size, 4, reference.BMUF(0.6, 0.8, nesterov))
        same(train(workers, bmuf, CHANGING), paper[workers.rank])


@taking_turns(*SIZES)
def test_bmuf_by_default_has_the_papers_momentum_of_one_less_the_nth_part(workers):
    explicit = BMUF(sync_every=4, block_momentum=1 - 1 / workers.size)
    same(train(workers, BMUF(sync_every=4), CHANGING), train(workers, explicit, CHANGING))


@taking_turns(2)
def test_bmuf_averages_during_its_warm_up_and_starts_without_momentum(workers):
    bmuf = BMUF(sync_every=4, block_momentum=0.6, warmup_steps=8)
    warm, cold = train(workers, bmuf, CHANGING), train(workers, LocalSGD(4), CHANGING)
    same(warm[:15], cold[:15])  # the third block ends at step 12 and has no momentum to carry yet
    differ(warm, cold)


@taking_turns(*SIZES)
def test_nesterov_bmuf_is_diloco_with_an_outer_rate_of_one(workers):
    bmuf = BMUF(sync_every=4, block_momentum=0.6, nesterov=True, inner_buffers="maintain")
    diloco = DiLoCo(sync_every=4, outer_lr=1.0, outer_momentum=0.6)
    for optimizer in (PLAIN, MOMENTUM):
        same(train(workers, bmuf, CHANGING, optimizer), train(workers, diloco, CHANGING, optimizer))


@taking_turns(*SIZES)
def test_diloco_is_its_closed_form_and_torchs_nesterov_sgd(workers):
    nesterov = partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)
    adamw = partial(torch.optim.AdamW, lr=0.1, betas=(0.9, 0.98), weight_decay=0.1)
    inner = partial(reference.Adam, weight_decay=0.1)
    closed = reference.trajectory(CHANGING, workers.size, 4, reference.DiLoCo(), inner)[workers.rank]
    same(train(workers, DiLoCo(sync_every=4), CHANGING, adamw), closed)
    same(train(workers, DiLoCo(sync_every=4, outer_optimizer=nesterov), CHANGING, adamw), closed)


@taking_turns(2, 3)
def test_diloco_with_any_outer_optimizer_is_that_optimizer_on_the_outer_gradient(workers):
    outer = partial(torch.optim.Adam, lr=0.05)

    class OuterAdam:
        """The same Adam, one of its own for each parameter."""

        def __init__(self):
            self.anchors = {}

        def __call__(self, index, rate, start, mean):
            if index not in self.anchors:
                anchor = torch.nn.Parameter(torch.tensor(start))
                self.anchors[index] = anchor, outer([anchor])
            anchor, optimizer = self.anchors[index]
            anchor.grad = torch.as_tensor(start - mean)
            optimizer.step()
            return anchor.detach().numpy().copy()

    expected = reference.trajectory(CHANGING, workers.size, 4, OuterAdam())[workers.rank]
    same(train(workers, DiLoCo(sync_every=4, outer_optimizer=outer), CHANGING), expected)


@taking_turns(*SIZES)
def test_diloco_without_momentum_at_an_outer_rate_of_one_is_local_sgd(workers):
    diloco = DiLoCo(sync_every=4, outer_lr=1.0, outer_momentum=0.0)
    same(train(workers, diloco, CHANGING, MOMENTUM), train(workers, LocalSGD(4), CHANGING, MOMENTUM))


@taking_turns(*SIZES)
def test_slowmo_at_a_constant_rate_is_an_outer_sgd_on_the_pseudo_gradient(workers):
    slowmo = SlowMo(sync_every=4, slow_momentum=0.6, slow_lr=0.8, inner_buffers="maintain")
    outer = DiLoCo(sync_every=4, outer_optimizer=partial(torch.optim.SGD, lr=0.8, momentum=0.6))
    for optimizer in (PLAIN, MOMENTUM):
        same(train(workers, slowmo, CONSTANT, optimizer), train(workers, outer, CONSTANT, optimizer))
    differ(train(workers, slowmo, CHANGING), train(workers, outer, CHANGING))


@taking_turns(1)
def test_one_worker_without_slow_momentum_is_lookahead(workers):
    alpha = 0.5
    fast, slow, expected = CHANGING.initial(), CHANGING.initial(), []
    for step, rates in enumerate(CHANGING.rates):
        for index, group in enumerate(CHANGING.group_of):
            fast[index] = fast[index] - rates[group] * CHANGING.gradient(0, step, index, fast[index])
        if (step + 1) % 4 == 0:
            slow = [s + alpha * (f - s) for s, f in zip(slow, fast, strict=True)]
            fast = list(slow)
        expected.append(np.concatenate([np.ravel(value) for value in fast]))
    same(train(workers, SlowMo(sync_every=4, slow_momentum=0.0, slow_lr=alpha), CHANGING), np.stack(expected))


@taking_turns(2, 3, 4)
def test_workers_with_the_same_data_do_what_one_worker_does(workers):
    shared = replace(CHANGING, shared=True)
    for algorithm in (LocalSGD(4), SlowMo(sync_every=4), BMUF(4, block_momentum=0.5), DiLoCo(4), AllReduce()):
        same(train(workers, algorithm, shared, MOMENTUM), train(Workers(), algorithm, shared, MOMENTUM))


@taking_turns(2, 3, 4)
def test_after_each_slow_step_all_workers_agree_to_the_last_bit(workers):
    adam = partial(torch.optim.Adam, lr=0.1)
    for algorithm in (SlowMo(sync_every=4), SlowMo(sync_every=4, inner_buffers="average"), BMUF(4), DiLoCo(4)):
        for optimizer in (MOMENTUM, adam):
            training = Training(workers, algorithm, CHANGING, optimizer)
            running = training.engine.units[0]
            for step in range(1, len(CHANGING.rates) + 1):
                training.step()
                bits = workers.gather(training.values().tolist())
                assert all(row == bits[0] for row in bits) == (step % 4 == 0)
                for state in (running.anchor, running.momentum):
                    rows = workers.gather(torch.cat([run.flatten() for run in state]).tolist())
                    assert all(row == rows[0] for row in rows)
            assert any(run.any() for run in running.momentum)


@taking_turns(1, 2, 3)
def test_the_papers_u_scales_as_the_gradients_do(workers):
    c = 4.0  # a power of two changes no rounding
    rates = tuple(tuple(rate * c for rate in row) for row in CHANGING.rates)
    one = Training(workers, SlowMo(sync_every=4, slow_lr=0.5), CHANGING)
    two = Training(workers, SlowMo(sync_every=4, slow_lr=0.5), replace(CHANGING, rates=rates, scale=1 / c))
    np.testing.assert_array_equal(one.trajectory(), two.trajectory())

    def u(training):
        running = training.engine.units[0]
        groups = [run.group for run in running.layout.runs]
        return [v / (0.5 * running.momentum_rates[0][group]) for v, group in zip(running.momentum, groups, strict=True)]

    for a, b in zip(u(one), u(two), strict=True):
        assert a.any()
        torch.testing.assert_close(b, a / c)


@taking_turns(1, 2, 3)
def test_a_learning_rate_of_zero_moves_nothing_and_divides_nothing(workers):
    warm = tuple((0.0, 0.0) for _ in range(6)) + CHANGING.rates[6:]
    slowmo = SlowMo(sync_every=4, slow_momentum=0.6)
    training = Training(workers, slowmo, replace(CHANGING, rates=warm))
    start, trajectory = training.values(), training.trajectory()
    assert np.isfinite(trajectory).all()
    same(trajectory[:6], np.tile(start, (6, 1)))
    paper = reference.trajectory(replace(CHANGING, rates=warm), workers.size, 4, reference.SlowMo(0.6))
    same(trajectory, paper[workers.rank])


@taking_turns(1, 2, 3)
def test_a_pause_at_rate_zero_decays_the_slow_momentum_and_keeps_its_units(workers):
    paused = CHANGING.rates[:8] + ((0.0, 0.0),) * 4 + tuple((2 * a, 3 * b) for a, b in CHANGING.rates[12:])
    problem = replace(CHANGING, rates=paused)
    ours = train(workers, SlowMo(sync_every=4, slow_momentum=0.6, slow_lr=0.8), problem)
    paper = reference.trajectory(problem, workers.size, 4, reference.SlowMo(0.6, 0.8))
    same(ours, paper[workers.rank])
    same(ours[8:12], np.tile(ours[7], (4, 1)))


@taking_turns(1, 2, 3, 4)
def test_without_averaging_slow_momentum_of_zero_is_the_base(workers):
    base = LocalSGD(3)
    variant = SlowMo(base, sync_every=4, slow_momentum=0.0, inner_buffers="maintain", average=False)
    same(train(workers, variant, CHANGING, MOMENTUM), train(workers, base, CHANGING, MOMENTUM))


@taking_turns(2, 3)
def test_without_averaging_the_mean_of_the_workers_obeys_the_slow_step(workers):
    """With a linear inner step, the mean of slow steps is the slow step of the mean."""
    variant = SlowMo(AllReduce(), sync_every=4, slow_momentum=0.6, average=False)
    exact = SlowMo(AllReduce(), sync_every=4, slow_momentum=0.6)
    same(train(workers, variant, CHANGING), train(workers, exact, CHANGING))


@taking_turns(1, 2, 3)
def test_the_base_may_average_more_often_than_the_slow_step(workers):
    """Averaging every two steps under a slow step of four: the slow step sees the same pseudo-gradient."""
    both = Training(workers, SlowMo(LocalSGD(2), sync_every=4, slow_momentum=0.0), CHANGING)
    same(both.trajectory(), train(workers, LocalSGD(2), CHANGING))
    assert both.engine.total.count == len(CHANGING.rates) // 2


@taking_turns(2)
def test_configurations_are_not_changed_by_a_run(workers):
    algorithm = SlowMo(sync_every=4)
    before = copy.deepcopy(algorithm)
    train(workers, algorithm, CHANGING)
    assert algorithm == before
