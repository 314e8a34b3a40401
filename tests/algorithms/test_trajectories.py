"""Whole trajectories against a plain numpy reference of the paper's Algorithm 1, on random problems."""

from functools import lru_cache, partial

import numpy as np
import torch
from torch.nn import Parameter

from lightning_slowmo import DiLoCo, Engine, LocalSGD, SlowMo
from tests.algorithms import reference
from tests.algorithms.training import random_problem, same, small_buckets, train
from tests.on_workers import taking_turns

SEEDS = range(2)

INNER = {
    "sgd": (partial(torch.optim.SGD, lr=0.1), reference.SGD),
    "momentum": (partial(torch.optim.SGD, lr=0.1, momentum=0.9), partial(reference.SGD, 0.9)),
    "nesterov": (partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True), partial(reference.SGD, 0.9, True)),
    "adam": (partial(torch.optim.Adam, lr=0.1, betas=(0.9, 0.98)), reference.Adam),
    "adamw": (
        partial(torch.optim.AdamW, lr=0.1, betas=(0.9, 0.98), weight_decay=0.1),
        partial(reference.Adam, weight_decay=0.1),
    ),
}
AUTO = {"sgd": "reset", "momentum": "reset", "nesterov": "reset", "adam": "maintain", "adamw": "maintain"}


@lru_cache(maxsize=4)
def expected(seed, size, case, buffers):
    """All workers' trajectories by the reference, computed once for all of them."""
    problem, (period, beta, alpha) = random_problem(seed), cases(seed)
    return reference.trajectory(problem, size, period, reference.SlowMo(beta, alpha), INNER[case][1], buffers)


def cases(seed):
    """Hyper-parameters of one random problem."""
    rng = np.random.default_rng(1000 + seed)
    return int(rng.integers(1, 6)), float(rng.uniform(0, 0.9)), float(rng.uniform(0.5, 1.2))


@taking_turns(1, 2, 4, each=list(INNER))
def test_slowmo_follows_the_papers_algorithm(workers, case):
    optimizer, _ = INNER[case]
    for seed in SEEDS:
        problem, (period, beta, alpha) = random_problem(seed), cases(seed)
        for buffers in ("reset", "maintain", "average", "auto"):
            slowmo = SlowMo(sync_every=period, slow_momentum=beta, slow_lr=alpha, inner_buffers=buffers)
            with small_buckets(workers):
                ours = train(workers, slowmo, problem, optimizer)
            treatment = AUTO[case] if buffers == "auto" else buffers
            same(ours, expected(seed, workers.size, case, treatment)[workers.rank])


@taking_turns(2, 3, each=list(INNER))
def test_local_sgd_averages_and_leaves_the_optimizers_alone(workers, case):
    optimizer, inner = INNER[case]
    for seed in SEEDS:
        problem, (period, _, _) = random_problem(seed), cases(seed)
        paper = reference.trajectory(problem, workers.size, period, reference.Average(), inner)
        same(train(workers, LocalSGD(period), problem, optimizer), paper[workers.rank])


@taking_turns(2, each=[(64, 32, 3), (64, 10**9, 10), (10**9, 8, 10**9), (8, 8, 1), (72, 10**9, 4)])
def test_no_size_of_buckets_changes_the_result(workers, case):
    problem = random_problem(5)
    for algorithm in (SlowMo(sync_every=3), DiLoCo(3)):
        expected = train(workers, algorithm, problem)
        with small_buckets(workers, *case):
            same(train(workers, algorithm, problem), expected)


@taking_turns(1, 2, 3, each=["sgd", "momentum", "adam"])
def test_float32_follows_to_five_digits(workers, case):
    optimizer, inner = INNER[case]
    for seed in SEEDS:
        problem, (period, beta, alpha) = random_problem(seed), cases(seed)
        slowmo = SlowMo(sync_every=period, slow_momentum=beta, slow_lr=alpha, inner_buffers="maintain")
        ours = train(workers, slowmo, problem, optimizer, torch.float32)
        paper = reference.trajectory(problem, workers.size, period, reference.SlowMo(beta, alpha), inner)[workers.rank]
        assert np.linalg.norm(ours - paper) <= 1e-5 * np.linalg.norm(paper)


@taking_turns(1, 2)
def test_bfloat16_parameters_do_not_lose_small_outer_steps(workers):
    """Fifty outer steps of 0.001 from 1.0: in bfloat16 slow state each would round to nothing."""
    for algorithm in (
        SlowMo(sync_every=1, slow_momentum=0.0, slow_lr=0.128),
        DiLoCo(1, outer_lr=0.128, outer_momentum=0.0),
        DiLoCo(1, outer_optimizer=partial(torch.optim.SGD, lr=0.128)),
    ):
        parameter = Parameter(torch.ones(5, dtype=torch.bfloat16))
        optimizer = torch.optim.SGD([parameter], lr=2.0**-7)
        engine = Engine(algorithm, [optimizer], workers)
        for _ in range(50):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            engine.after_step()
        assert engine.units[0].anchor[0].dtype == torch.float32
        torch.testing.assert_close(parameter.detach().float(), torch.full((5,), 0.95), atol=2.0**-8, rtol=0)
        torch.testing.assert_close(engine.units[0].anchor[0], torch.full((5,), 0.95), atol=1e-5, rtol=0)
