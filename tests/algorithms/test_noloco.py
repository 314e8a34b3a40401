"""NoLoCo against its listing in numpy, and what it becomes at the ends of its settings."""

from functools import partial

import numpy as np
import torch

from lightning_slowmo import Gossip, NoLoCo, SlowMo, Stages, Workers
from lightning_slowmo.communication import Reason
from lightning_slowmo.topology import RandomMatching
from tests.algorithms import reference
from tests.algorithms.training import CHANGING, CONSTANT, MOMENTUM, Training, differ, same, small_buckets, train
from tests.on_workers import taking_turns


def listing(problem, workers, every, eta, mu, seed=0):
    """The authors' two terms: the group's outer gradient and the pull to its slow weights; heavy-ball SGD inside."""
    phi = [problem.initial() for _ in range(workers)]
    x = [[value.copy() for value in each] for each in phi]
    m, inner = ([[np.zeros_like(value) for value in each] for each in phi] for _ in range(2))
    matching, rows, syncs = RandomMatching(seed).on(workers) if workers > 1 else None, [], 0
    for step, rates in enumerate(problem.rates):
        for i in range(workers):
            for p, group in enumerate(problem.group_of):
                inner[i][p] = 0.9 * inner[i][p] + problem.gradient(i, step, p, x[i][p])
                x[i][p] = x[i][p] - rates[group] * inner[i][p]
        if (step + 1) % every == 0:
            pairs = matching.weights(syncs) if matching is not None else np.eye(1)
            groups = [[j for j in range(workers) if pairs[i, j]] for i in range(workers)]
            assert all(len(group) <= 2 for group in groups)
            syncs += 1
            new = []
            for i, group in enumerate(groups):
                for p in range(len(problem.shapes)):
                    gradient = sum(x[j][p] - phi[j][p] for j in group) / len(group)
                    pull = sum(phi[j][p] for j in group) / len(group) - phi[i][p]
                    m[i][p] = mu * m[i][p] + eta * gradient + eta * pull
                new.append([phi[i][p] + m[i][p] for p in range(len(problem.shapes))])
            phi = new
            x = [[value.copy() for value in each] for each in phi]
        rows.append([np.concatenate([value.ravel() for value in each]) for each in x])
    return np.array(rows)


@taking_turns(1, 2, 3, 4, 5)
def test_noloco_follows_the_authors_listing(workers):
    for every, eta, mu, seed in ((4, 0.7, 0.5, 0), (3, 0.9, 0.3, 7)):
        with small_buckets(workers):
            ours = train(workers, NoLoCo(every, eta, mu, seed), CHANGING, MOMENTUM)
        same(ours, listing(CHANGING, workers.size, every, eta, mu, seed)[:, workers.rank])


@taking_turns(2)
def test_of_two_workers_it_is_slowmo_at_a_constant_learning_rate(workers):
    """Both are heavy-ball momentum on the mean of all; the slow learning rate scales what comes in."""
    slowmo = SlowMo(sync_every=4, slow_momentum=0.5, slow_lr=0.7, inner_buffers="maintain")
    same(train(workers, NoLoCo(4, 0.7, 0.5), CONSTANT, MOMENTUM), train(workers, slowmo, CONSTANT, MOMENTUM))
    differ(train(workers, NoLoCo(4, 0.7, 0.3), CONSTANT, MOMENTUM), train(workers, slowmo, CONSTANT, MOMENTUM))


@taking_turns(4)
def test_without_momentum_at_rate_one_it_is_gossip_of_pairs_after_local_steps(workers):
    gossip = Gossip(RandomMatching(3), push_sum=False)
    same(train(workers, NoLoCo(1, 1.0, 0.0, seed=3), CHANGING), train(workers, gossip, CHANGING))


@taking_turns(4)
def test_the_mean_of_the_slow_weights_moves_as_one_heavy_ball(workers):
    run = Training(workers, NoLoCo(3, 0.8, 0.6), CHANGING)
    unit = run.engine.units[0]

    def mean(buffers):
        rows = np.array(workers.gather(torch.cat([flat.flatten() for flat in buffers]).tolist()))
        return rows.mean(axis=0)

    momentum = np.zeros_like(mean(unit.anchor))
    while run.steps < len(CHANGING.rates):
        before = mean(unit.anchor)
        if run.steps % 3 == 2:
            pending = unit.pending
            run.engine.units[0].clock.period = 10**6  # look at the parameters before the outer step
            run.step()
            x = mean(unit.layout.snapshot())
            unit.clock.period = 3
            run.engine.meet(Reason.SYNC, 0, unit.due())
            assert pending == 2
            momentum = 0.6 * momentum + 0.8 * (x - before)
            np.testing.assert_allclose(mean(unit.anchor), before + momentum, rtol=0, atol=1e-12)
        else:
            run.step()


@taking_turns(4)
def test_schedules_apply(workers):
    ours = train(workers, NoLoCo(Stages({0: 2, 8: 4}), 0.7, 0.5), CHANGING, MOMENTUM)
    same(ours[:8], listing(CHANGING, workers.size, 2, 0.7, 0.5)[:8, workers.rank])
    differ(ours, listing(CHANGING, workers.size, 2, 0.7, 0.5)[:, workers.rank])


def test_alone_it_is_the_heavy_ball_outer_loop():
    slowmo = reference.trajectory(CONSTANT, 1, 4, reference.SlowMo(0.5, 0.7), partial(reference.SGD, 0.9))
    same(train(Workers(), NoLoCo(4, 0.7, 0.5), CONSTANT, MOMENTUM), slowmo[0])
