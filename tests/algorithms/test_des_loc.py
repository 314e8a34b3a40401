"""DES-LOC against its listing in numpy, and Local Adam at the ends of its periods."""

from functools import partial

import numpy as np
import pytest
import torch

from lightning_slowmo import DESLOC, QSR, LocalSGD, SlowMo, Workers
from tests.algorithms import reference
from tests.algorithms.training import CHANGING, Training, differ, goes_on_bit_exactly, same, train
from tests.on_workers import taking_turns

ADAM = partial(torch.optim.Adam, lr=0.1, betas=(0.9, 0.98))


def listing(problem, workers, every_x, every_u, every_v):
    """Before step t, whatever has a period that divides t is averaged; then each worker makes its Adam step."""
    x = [problem.initial() for _ in range(workers)]
    inner = [reference.Adam() for _ in range(workers)]
    rows = []

    def average(values):
        for p in range(len(problem.shapes)):
            mean = sum(each[p] for each in values) / workers
            for each in values:
                each[p] = mean

    for t in range(len(problem.rates) + 1):
        if t and t % every_u == 0:
            average([adam.m for adam in inner])
        if t and t % every_v == 0:
            average([adam.v for adam in inner])
        if t and t % every_x == 0:
            average(x)
        if t:
            rows.append([np.concatenate([np.ravel(value) for value in each]) for each in x])
        if t < len(problem.rates):
            for i in range(workers):
                for p, group in enumerate(problem.group_of):
                    g = problem.gradient(i, t, p, x[i][p])
                    x[i][p] = inner[i].step(p, x[i][p], g, problem.rates[t][group])
    return np.array(rows)


@taking_turns(1, 2, 3)
def test_des_loc_follows_its_listing(workers):
    for periods in ((2, None, None), (4, 3, 5), (3, 2, 1)):
        ours = train(workers, DESLOC(*periods), CHANGING, ADAM)
        every = (periods[0], periods[1] or 3 * periods[0], periods[2] or 6 * periods[0])
        same(ours, listing(CHANGING, workers.size, *every)[:, workers.rank])


@taking_turns(2, 3)
def test_at_the_ends_of_its_periods_it_is_local_adam(workers):
    whole = SlowMo(sync_every=4, slow_momentum=0.0, inner_buffers="average")
    same(train(workers, DESLOC(4, 4, 4), CHANGING, ADAM), train(workers, whole, CHANGING, ADAM))
    same(train(workers, DESLOC(4, 10**6, 10**6), CHANGING, ADAM), train(workers, LocalSGD(4), CHANGING, ADAM))
    differ(train(workers, DESLOC(4, 8, 12), CHANGING, ADAM), train(workers, LocalSGD(4), CHANGING, ADAM))


@taking_turns(2, each=[5, 7, 9])
def test_it_goes_on_between_its_averages_to_the_bit(workers, case):
    goes_on_bit_exactly(lambda: Training(workers, DESLOC(4, 3, 5), CHANGING, ADAM), case)


def test_other_optimizers_and_periods_are_refused():
    parameters = [torch.nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match=r"DESLOC needs torch\.optim\.Adam or AdamW, got SGD"):
        DESLOC().bind(torch.optim.SGD(parameters, lr=0.1), Workers())
    with pytest.raises(ValueError, match="amsgrad"):
        DESLOC().bind(torch.optim.Adam(parameters, amsgrad=True), Workers())
    with pytest.raises(ValueError, match="first_every must be an integer of at least 1, got 0"):
        DESLOC(first_every=0)
    with pytest.raises(
        ValueError, match=r"sync_every of DESLOC must be an integer, got QSR.*counts from the beginning"
    ):
        DESLOC(QSR(4))
