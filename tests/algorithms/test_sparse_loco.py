"""SparseLoCo against its equations in numpy, quantizer included, and what it becomes at the ends of its settings."""

from functools import partial

import numpy as np
import pytest
import torch

from lightning_slowmo import DiLoCo, LocalSGD, SparseLoCo
from lightning_slowmo.communication import Reason
from lightning_slowmo.compression import Bins, ChunkedTopK, Identity
from tests.algorithms.training import CHANGING, MOMENTUM, Training, differ, same, train
from tests.on_workers import taking_turns


def two_bits(v, bits=2, reach=6.0):
    """The authors' quantizer: bins of equal width around the mean; each value becomes the mean of its bin."""
    bins = 2**bits
    if v.size == 0:
        return v
    c = v - v.mean()
    sigma = np.sqrt((c**2).sum() / max(1, v.size - 1))
    w = reach * sigma / bins if sigma > 0 else 1.0
    codes = np.clip(np.round(c / w + bins / 2), 0, bins - 1)
    return np.array([v[codes == code].mean() for code in codes])


def sparse(e, k, chunk):
    """The k largest of each chunk of a tensor, in 2 bits each."""
    flat = e.ravel()
    kept = np.concatenate(
        [
            start + np.sort(np.argsort(-np.abs(flat[start : start + chunk]), kind="stable")[:k])
            for start in range(0, flat.size, chunk)
        ]
        or [np.zeros(0, int)]
    ).astype(int)
    q = np.zeros_like(flat)
    q[kept] = two_bits(flat[kept])
    return q.reshape(e.shape)


def listing(problem, workers, every, eta, beta, compress):
    """e = beta e + D; q = Q(TopK(e)); e = e - q; x = x - eta mean q; heavy-ball SGD inside."""
    shared = problem.initial()
    x = [[value.copy() for value in shared] for _ in range(workers)]
    e, inner = ([[np.zeros_like(value) for value in shared] for _ in range(workers)] for _ in range(2))
    rows = []
    for step, rates in enumerate(problem.rates):
        for i in range(workers):
            for p, group in enumerate(problem.group_of):
                inner[i][p] = 0.9 * inner[i][p] + problem.gradient(i, step, p, x[i][p])
                x[i][p] = x[i][p] - rates[group] * inner[i][p]
        if (step + 1) % every == 0:
            for p in range(len(shared)):
                told = []
                for i in range(workers):
                    e[i][p] = beta * e[i][p] + (shared[p] - x[i][p])
                    told.append(compress(e[i][p]))
                    e[i][p] = e[i][p] - told[-1]
                shared[p] = shared[p] - eta * sum(told) / workers
                for i in range(workers):
                    x[i][p] = shared[p].copy()
        rows.append([np.concatenate([value.ravel() for value in each]) for each in x])
    return np.array(rows)


@taking_turns(1, 2, 3, 4)
def test_sparse_loco_follows_its_equations(workers):
    for every, eta, beta, k, chunk in ((4, 1.0, 0.95, 2, 4), (3, 0.7, 0.8, 3, 5)):
        ours = train(workers, SparseLoCo(every, eta, beta, ChunkedTopK(k, chunk=chunk)), CHANGING, MOMENTUM)
        compress = partial(sparse, k=k, chunk=chunk)
        same(ours, listing(CHANGING, workers.size, every, eta, beta, compress)[:, workers.rank])


@taking_turns(1, 2, 3)
def test_without_loss_it_is_diloco_without_momentum_and_at_rate_one_local_sgd(workers):
    for beta in (0.0, 0.95):
        exact = SparseLoCo(4, 0.8, beta, Identity())
        same(train(workers, exact, CHANGING, MOMENTUM), train(workers, DiLoCo(4, 0.8, 0.0), CHANGING, MOMENTUM))
        whole = SparseLoCo(4, 1.0, beta, ChunkedTopK(k=4096, values=Identity()))
        same(train(workers, whole, CHANGING, MOMENTUM), train(workers, LocalSGD(4), CHANGING, MOMENTUM))
    few = SparseLoCo(4, 1.0, 0.95, ChunkedTopK(1, chunk=8))
    differ(train(workers, few, CHANGING, MOMENTUM), train(workers, LocalSGD(4), CHANGING, MOMENTUM))


@taking_turns(2, 3)
def test_an_error_that_does_not_decay_holds_all_that_was_not_told(workers):
    run = Training(workers, SparseLoCo(2, 1.0, 1.0, ChunkedTopK(1, chunk=8)), CHANGING)
    unit, differences = run.engine.units[0], 0.0
    while run.steps < len(CHANGING.rates):
        anchor = np.concatenate([flat.numpy() for flat in unit.anchor])
        last = run.steps % 2 == 1
        unit.clock.period += int(last)  # look at the parameters before the outer step
        run.step()
        if last:
            differences = differences + anchor - np.concatenate([flat.numpy() for flat in unit.layout.snapshot()])
            unit.clock.period -= 1
            run.engine.meet(Reason.SYNC, 0, unit.due())
    untold = np.concatenate([flat.numpy() for flat in unit.averager.residual])
    told = differences - untold  # sum of q_i
    mean = np.array(workers.gather(told.tolist())).mean(axis=0)
    anchor = np.concatenate([flat.numpy() for flat in unit.anchor])
    first = np.concatenate(
        [flat.numpy() for flat in Training(workers, LocalSGD(), CHANGING).engine.units[0].layout.snapshot()]
    )
    np.testing.assert_allclose(anchor, first - mean, rtol=0, atol=1e-10)
    assert np.abs(untold).max() > 1e-3


def test_the_quantizer_is_that_of_the_listing_and_takes_few_bytes():
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(3 * 4096 + 100, generator=generator, dtype=torch.float64)
    compressor = ChunkedTopK()
    segments = (2 * 4096, 0, 4096 + 90, 10)
    payload = compressor.compress(flat, segments)
    told = compressor.decompress(payload, segments, torch.float64)
    parts = [sparse(part.numpy(), 64, 4096) for part in flat.split(segments)]
    np.testing.assert_allclose(told.numpy(), np.concatenate(parts), rtol=0, atol=1e-12)
    kept = 64 * 4 + 10
    assert int((told != 0).sum()) == kept
    # Two bits a value, a table of four a tensor, and the places, at about eight bits each: 1/150 of float32.
    size = compressor.payload_bytes((4096 * 100,))
    assert size <= 100 * (64 * 2 / 8 + 64 * 8.5 / 8) + 16 + 8
    assert 4 * 4096 * 100 / size > 150


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SparseLoCo(error_decay=1.1), r"error_decay must be a number in \[0, 1\], got 1.1"),
        (lambda: SparseLoCo(outer_lr=-1.0), "outer_lr must be a finite number"),
        (lambda: SparseLoCo(compressor=0.1), "compressor must be a compressor"),
        (lambda: Bins(0), "bits is 0; it must be an integer from 1 to 8"),
        (lambda: Bins(reach=0.0), "reach is 0.0; it must be above 0"),
        (lambda: ChunkedTopK(k=0), "k is 0"),
        (lambda: ChunkedTopK(chunk=0), "chunk is 0"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
