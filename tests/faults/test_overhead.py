"""What a meeting costs, and that a step without one costs nothing.

Run as a script, it measures: ``python -m tests.faults.test_overhead``.
"""

import time

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from lightning_slowmo import Engine, LocalSGD, SlowMo, SlowMoStrategy, Workers
from lightning_slowmo.communication import Reason
from tests.harness import run, run_trainers
from tests.trainer.models import Regression, data, trainer

MEETINGS = 400


def measure_meetings(rank):
    module = torch.nn.Linear(4, 4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    engine = Engine(LocalSGD(10**6), [optimizer], Workers.from_world(), module)
    times = []
    for _ in range(MEETINGS):
        start = time.perf_counter()
        engine.meet(Reason.BARRIER)
        times.append(time.perf_counter() - start)
    times.sort()
    return times[len(times) // 2], times[0]


@pytest.mark.processes
def test_a_meeting_takes_no_more_than_a_millisecond():
    (median, best), _ = run(2, measure_meetings)
    assert best < 1e-3
    assert median < 20e-3  # on a machine that others use too; alone it is less than the best is here


class CountCollectives(Callback):
    """Counts the collectives of torch.distributed in each batch, whoever starts them."""

    NAMES = ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "barrier", "broadcast_object_list")

    def __init__(self):
        self.now, self.counts = 0, []

    def on_fit_start(self, *_):
        self.originals = {name: getattr(dist, name) for name in self.NAMES}
        for name, original in self.originals.items():
            setattr(dist, name, self.counting(original))

    def counting(self, original):
        def counted(*args, **kwargs):
            self.now += 1
            return original(*args, **kwargs)

        return counted

    def on_train_batch_start(self, *_):
        self.counts.append(self.now)
        self.now = 0

    def teardown(self, trainer, pl_module, stage):
        for name, original in self.originals.items():
            setattr(dist, name, original)


def count_collectives(rank):
    counting = CountCollectives()
    trainer(2, SlowMoStrategy(SlowMo(sync_every=5)), callbacks=counting, max_epochs=1).fit(
        Regression(), data(rank, examples=96)
    )
    return counting.counts[2:]  # the first is before training, the second has the meeting at the epoch's start


@pytest.mark.processes
def test_a_step_without_a_meeting_starts_no_collective():
    for counts in run_trainers(2, count_collectives):
        assert len(counts) == 22
        syncing = [count > 0 for count in counts]
        assert syncing == [batch % 5 == 0 for batch in range(2, 24)]
        assert set(counts) == {0, 2}  # a header and a sum


if __name__ == "__main__":
    median, best = run(2, measure_meetings)[0]
    print(f"A meeting takes {1000 * median:.2f} ms in the median of {MEETINGS}, {1000 * best:.2f} ms at best.")
