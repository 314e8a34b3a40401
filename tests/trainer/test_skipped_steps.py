"""``training_step`` that returns None: a local step of size 0, where no other worker waits for its gradients."""

import pytest

from lightning_slowmo import AllReduce, Gossip, LocalSGD, SlowMo, SlowMoStrategy
from tests.harness import run_trainers
from tests.trainer.models import Regression, data, distance, numbers, trainer

ALGORITHMS = {"LocalSGD": LocalSGD(3), "SlowMo": SlowMo(sync_every=3), "Gossip": Gossip("ring")}
ARGUMENTS = {
    "plain": {},
    "accumulated": {"accumulate_grad_batches": 2},
    "clipped": {"gradient_clip_val": 0.5},
    "bf16-mixed": {"precision": "bf16-mixed"},
}


class Skipping(Regression):
    """Skips some batches on one rank: by None, or by a loss whose gradient is zero."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        if self.global_rank == 0 and batch_idx in (2, 5):
            return None if self.how == "none" else loss * 0
        return loss


def fit_skipping(rank, size):
    models, ends = {}, {}
    for name, algorithm in ALGORITHMS.items():
        for kind, arguments in ARGUMENTS.items():
            for how in ("none", "zero"):
                module = Skipping(how)
                fitting = trainer(size, SlowMoStrategy(algorithm), **arguments)
                fitting.fit(module, data(rank))
                models[name, kind, how] = numbers(module)
                ends[name, kind, how] = fitting.global_step, fitting.strategy.report.count
    try:
        trainer(size, SlowMoStrategy(AllReduce())).fit(Skipping("none"), data(rank))
        error = ""
    except RuntimeError as raised:
        error = str(raised)
    return models, ends, error


@pytest.mark.processes
@pytest.mark.parametrize("size", [3])
def test_a_step_that_is_skipped_is_one_without_a_gradient(size):
    results = run_trainers(size, fit_skipping, size, limit=90)
    models, ends, errors = zip(*results, strict=True)
    assert all(own == ends[0] for own in ends)
    for name in ALGORITHMS:
        for kind in ARGUMENTS:
            skipped, zero = models[0][name, kind, "none"], models[0][name, kind, "zero"]
            assert all(own[name, kind, "none"] == skipped for own in models), (name, kind)
            # Not to the bit: an accumulated gradient of zero is added, a missing one is not.
            assert distance(skipped, zero) < 1e-6, (name, kind)
            assert ends[0][name, kind, "none"] == ends[0][name, kind, "zero"]
    assert "returning None in distributed training is not supported" in errors[0]
    assert all("rank 0 failed: RuntimeError: Skipping the `training_step`" in error for error in errors[1:])
