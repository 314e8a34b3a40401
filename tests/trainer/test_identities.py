"""Algorithms that must be equal are equal, through the Trainer, in float64."""

import pytest

from lightning_slowmo import BMUF, AllReduce, LocalSGD, SlowMo, SlowMoStrategy
from tests.harness import run_trainers
from tests.trainer.models import Regression, all_finite, data, distance, numbers, trainer

TOLERANCE = 1e-10


def train(rank, size, strategy, accumulate=1, clip=None, **model):
    module = Regression(**model)
    strategy = strategy if isinstance(strategy, str) else SlowMoStrategy(strategy)
    arguments = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip, "precision": "64-true"}
    trainer(size, strategy, **arguments).fit(module, data(rank, examples=36))
    return numbers(module)


def train_pairs(rank, size):
    momentum = {"sync_every": 1, "slow_momentum": 0.7}
    plain = SlowMo(sync_every=4, slow_momentum=0.0)
    bmuf = BMUF(3, 0.6, inner_buffers="maintain")
    slow = SlowMo(sync_every=3, slow_momentum=0.6, inner_buffers="maintain")
    pairs = {
        "allreduce is ddp": ((AllReduce(),), ("ddp",)),
        "... with accumulation": ((AllReduce(), 2), ("ddp", 2)),
        "... with clipping": ((AllReduce(), 1, 0.5), ("ddp", 1, 0.5)),
        "... with both": ((AllReduce(), 4, 0.3), ("ddp", 4, 0.3)),
    }
    results = {name: [train(rank, size, *side, momentum=0.5) for side in pair] for name, pair in pairs.items()}
    results |= {
        "slowmo without momentum is local SGD at any learning rate": [
            train(rank, size, plain, warm_up=5),
            train(rank, size, LocalSGD(4), warm_up=5),
        ],
        "slowmo at every step is SGD with momentum": [
            train(rank, size, SlowMo(**momentum)),
            train(rank, size, "ddp", momentum=momentum["slow_momentum"]),
        ],
        "bmuf is slowmo at a constant learning rate": [
            train(rank, size, bmuf),
            train(rank, size, slow),
        ],
    }
    differing = [
        train(rank, size, BMUF(3, 0.6, inner_buffers="maintain"), warm_up=5),
        train(rank, size, slow, warm_up=5),
    ]
    return results, differing


@pytest.mark.processes
@pytest.mark.parametrize("size", [1, 3])
def test_equal_algorithms_give_equal_models(size):
    for results, (bmuf, slowmo) in run_trainers(size, train_pairs, size):
        for name, (ours, reference) in results.items():
            assert distance(ours, reference) < TOLERANCE, name
        # Only SlowMo takes its momentum along when the learning rate changes, also from a rate of 0.
        assert all_finite(slowmo)
        assert distance(bmuf, slowmo) > 1e-4


def test_the_identities_are_between_models_that_differ_from_local_training():
    alone, together = (run_trainers(size, train, size, AllReduce())[0] for size in (1, 2))
    assert distance(alone, together) > 1e-3
