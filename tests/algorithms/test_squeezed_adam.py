"""APMSqueeze against Adam, a numpy listing with a frozen second moment, and its own accounts."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from lightning_slowmo import AllReduce, APMSqueeze, Engine
from lightning_slowmo.communication.compressed import mean_bytes
from lightning_slowmo.communication.meeting import Header, Reason
from lightning_slowmo.communication.workers import Workers
from lightning_slowmo.compression import Identity, Sign, TopK
from tests.algorithms.training import CHANGING, STEPS, Training, goes_on_bit_exactly, same, small_buckets, train
from tests.on_workers import taking_turns

B1, B2, EPS, DECAY = 0.9, 0.98, 1e-8, 0.1
OPTIMIZERS = {
    "adam": partial(torch.optim.Adam, betas=(B1, B2)),
    "foreach": partial(torch.optim.Adam, betas=(B1, B2), foreach=True),
    "fused": partial(torch.optim.Adam, betas=(B1, B2), fused=True),
    "adamw": partial(torch.optim.AdamW, betas=(B1, B2), weight_decay=DECAY),
    "l2": partial(torch.optim.Adam, betas=(B1, B2), weight_decay=DECAY),
}


def listing(workers, warmup, kind):
    """Adam on mean gradients for ``warmup`` steps, then with its second moment as it was; parameters after each."""
    xs = CHANGING.initial()
    ms, vs = [np.zeros_like(x) for x in xs], [np.zeros_like(x) for x in xs]
    rows = []
    for t in range(STEPS):
        for i, group in enumerate(CHANGING.group_of):
            rate = CHANGING.rates[t][group]
            g = CHANGING.mean_gradient(workers, t, i, xs[i])
            if kind == "l2":
                g = g + DECAY * xs[i]
            if kind == "adamw":
                xs[i] = xs[i] * (1 - rate * DECAY)
            ms[i] = B1 * ms[i] + (1 - B1) * g
            if t < warmup:
                vs[i] = B2 * vs[i] + (1 - B2) * g**2
            v = vs[i] / (1 - B2 ** min(t + 1, warmup))
            xs[i] = xs[i] - rate * ms[i] / (1 - B1 ** (t + 1)) / (np.sqrt(v) + EPS)
        rows.append(np.concatenate([x.ravel() for x in xs]))
    return np.stack(rows)


@taking_turns(1, 2, 3, 4, each=list(OPTIMIZERS))
def test_without_loss_it_is_adam_whose_second_moment_stops(workers, case):
    with small_buckets(workers):
        ours = train(workers, APMSqueeze(9, Identity(), floor=0.0), CHANGING, OPTIMIZERS[case])
    same(ours, listing(workers.size, 9, case))


@taking_turns(2)
def test_a_warm_up_without_end_is_adam(workers):
    ours = train(workers, APMSqueeze(10**6), CHANGING, OPTIMIZERS["adam"])
    same(ours, train(workers, AllReduce(), CHANGING, OPTIMIZERS["adam"]))


@taking_turns(1, 2, 3, 4, each=[Sign("l2"), TopK(0.2)])
def test_replicas_are_equal_and_what_is_left_out_is_sent_later(workers, case):
    with small_buckets(workers):
        training = Training(workers, APMSqueeze(6, case), CHANGING, OPTIMIZERS["adam"])
        (unit,) = training.engine.units
        missing = 0.0
        while training.steps < STEPS:
            old = torch.cat(unit.momentum).numpy().copy()
            x, step = [p.detach().numpy().copy() for p in training.parameters], training.steps
            training.step()
            rows = np.array(workers.gather(training.values().tolist()))
            assert (rows == rows[0]).all()
            if unit.syncs:
                means = [CHANGING.mean_gradient(workers.size, step, i, value) for i, value in enumerate(x)]
                wanted = B1 * old + (1 - B1) * np.concatenate([g.ravel() for g in means])
                total = np.concatenate([part.numpy().ravel() for part in unit.feedback.total()])
                np.testing.assert_allclose(torch.cat(unit.momentum), wanted + missing - total, rtol=0, atol=1e-12)
                missing = total
        assert unit.syncs == STEPS - 6
        assert np.abs(missing).max() > 1e-4


@taking_turns(1, 2, 3, 4)
def test_small_tensors_are_averaged_exactly(workers):
    """Those of fewer than 7 elements do as if nothing was compressed, bit for bit among workers; larger ones do not."""
    with small_buckets(workers):
        training = Training(workers, APMSqueeze(6, Sign("l2"), uncompressed_below=7), CHANGING, OPTIMIZERS["adam"])
        (unit,) = training.engine.units
        momenta = [np.zeros_like(x) for x in CHANGING.initial()]
        while training.steps < STEPS:
            x, step = [p.detach().numpy().copy() for p in training.parameters], training.steps
            training.step()
            views = dict(zip(map(id, unit.layout.parameters), unit.layout.per_parameter(unit.momentum), strict=True))
            for index, parameter in enumerate(training.parameters):
                gradient = CHANGING.mean_gradient(workers.size, step, index, x[index])
                momenta[index] = B1 * momenta[index] + (1 - B1) * gradient
                if unit.syncs and parameter.numel():
                    same_as_exact = np.allclose(views[id(parameter)], momenta[index], rtol=0, atol=1e-12)
                    assert same_as_exact == (parameter.numel() < 7), (step, tuple(parameter.shape))
            rows = np.array(workers.gather(training.values().tolist()))
            assert (rows == rows[0]).all()
    assert unit.syncs == STEPS - 6


@taking_turns(1, 3)
def test_if_all_tensors_are_small_it_is_adam_whose_second_moment_stops(workers):
    for algorithm in (APMSqueeze(9, Sign("l2"), uncompressed_below=10**6), APMSqueeze(9, Identity(), 7, floor=0.0)):
        with small_buckets(workers):
            ours = train(workers, algorithm, CHANGING, OPTIMIZERS["adamw"])
        same(ours, listing(workers.size, 9, "adamw"))


@taking_turns(2, 4)
def test_the_bytes_of_a_step_are_those_predicted(workers):
    """Two shots of each worker's signs for the large tensors, and a ring all-reduce of the small ones."""
    problem = replace(CHANGING, groups=(((30, 20), (20,)), ((11,), (101,))), rates=CHANGING.rates[:5])
    n = workers.size
    header = 8 * (n - 1) * (len(Header(Reason.SYNC, pending=(1,)).numbers()) + 1)  # and whether anybody skips the step
    for below, large, small in (
        (0, [(600, 20), (11, 101)], []),
        (50, [(600,), (101,)], [20, 11]),
        (10**6, [], [620, 112]),
    ):
        algorithm = APMSqueeze(2, uncompressed_below=below)
        training = Training(workers, algorithm, problem, OPTIMIZERS["adam"], torch.float32)
        for _ in range(3):
            training.step()
        before = workers.traffic.copy()
        training.step()
        sent = (workers.traffic - before).sent
        shots = sum(mean_bytes(Sign("l2"), segments, torch.float32, n, workers.rank) for segments in large)
        exact = sum(2 * (n - 1) * 4 * length // n for length in small)
        assert sent == header + shots + exact, below


@taking_turns(2, 4)
def test_after_the_warm_up_it_sends_96_percent_less(workers):
    big = replace(CHANGING, groups=(((300, 200), (200,)), ((100, 100),)), rates=CHANGING.rates[:6])
    sent = []
    for algorithm in (AllReduce(), APMSqueeze(2)):
        training = Training(workers, algorithm, big, OPTIMIZERS["adam"], torch.float32)
        for _ in range(2):
            training.step()
        before = workers.traffic.copy()
        training.trajectory()
        used = workers.traffic - before
        sent.append(used.sent - 100 * used.headers * (workers.size - 1))
    assert 0 < sent[1] <= 0.04 * sent[0], sent


@taking_turns(2)
def test_what_never_had_a_gradient_stays_and_a_skipped_step_is_skipped_by_all(workers):
    training = Training(workers, APMSqueeze(4), CHANGING, OPTIMIZERS["adam"])
    (unit,) = training.engine.units
    matrix = training.parameters[0]
    row = matrix.detach()[1].clone()
    for step in range(12):
        for index, parameter in enumerate(training.parameters):
            x = parameter.detach().numpy()
            parameter.grad = torch.as_tensor(CHANGING.gradient(workers.rank, step, index, x))
        matrix.grad[1] = 0
        training.engine.after_backward()
        training.engine.before_step()
        before = training.values()
        if not (step == 8 and workers.rank == 1):  # what a gradient scaler does
            training.optimizer.step()
        training.engine.after_step()
        assert np.array_equal(training.values(), before) == (step == 8)
        assert torch.equal(matrix.detach()[1], row)
    assert unit.syncs == 7
    assert float(unit.steps[0]) == 11


@taking_turns(2, 3)
def test_a_resumed_run_is_bit_for_bit_the_same_before_and_after_the_freeze(workers):
    for cut, below in ((3, 0), (10, 0), (3, 7), (10, 7)):
        algorithm = APMSqueeze(6, uncompressed_below=below)
        with small_buckets(workers):
            make = partial(Training, workers, algorithm, CHANGING, OPTIMIZERS["adamw"])
            goes_on_bit_exactly(make, at=cut)


@taking_turns(2)
def test_the_automatic_warm_up_ends_when_the_second_moment_is_stable(workers):
    problem = replace(CHANGING, rates=((1e-4, 1e-4),) * 200)
    optimizer = partial(torch.optim.Adam, betas=(B1, 0.95))
    training = Training(workers, APMSqueeze(), problem, optimizer)
    (unit,) = training.engine.units
    norms = {}
    while not unit.frozen and training.steps < 200:
        training.step()
        if training.steps % 20 == 0:
            states = training.optimizer.state.values()
            norms[training.steps] = sum(float(s["exp_avg_sq"].sum()) for s in states) / (1 - 0.95**training.steps)
            if unit.frozen:
                norms[training.steps] = float(sum(v.sum() for v in unit.variance))
    assert unit.frozen
    *earlier, before, last = norms.values()
    assert min(last / before, before / last) >= 0.96
    pairs = zip([*earlier, before], [*earlier, before][1:], strict=False)
    assert all(min(a / b, b / a) < 0.96 for a, b in pairs)


def test_other_optimizers_and_amsgrad_are_refused():
    parameters = [torch.nn.Parameter(torch.ones(3))]
    with pytest.raises(ValueError, match="needs torch"):
        APMSqueeze().bind(torch.optim.SGD(parameters, lr=0.1), Workers())
    with pytest.raises(ValueError, match="amsgrad"):
        APMSqueeze().bind(torch.optim.Adam(parameters, amsgrad=True), Workers())
    with pytest.raises(ValueError, match="warmup_steps"):
        APMSqueeze(0)
    with pytest.raises(ValueError, match="uncompressed_below"):
        APMSqueeze(uncompressed_below=-1)
    with pytest.raises(ValueError, match="floor must be a finite number of at least 0, got -1"):
        APMSqueeze(floor=-1)


@taking_turns(2)
def test_an_element_almost_without_gradients_in_the_warm_up_is_not_thrown_far(workers):
    """What made training diverge: all momenta of a tensor get one magnitude, and one is divided by next to 0."""
    rate, farthest = 0.01, {}
    for floor in (0.0, 0.1):
        parameter = torch.nn.Parameter(torch.zeros(512, dtype=torch.float64))
        optimizer = torch.optim.Adam([parameter], lr=rate, betas=(B1, B2))
        engine = Engine(APMSqueeze(8, floor=floor), [optimizer], workers)
        generator = torch.Generator().manual_seed(workers.rank)
        for _ in range(10):
            before = parameter.detach().clone()
            parameter.grad = torch.randn(512, generator=generator, dtype=torch.float64)
            parameter.grad[7] *= 1e-6
            engine.after_backward()
            optimizer.step()
            engine.after_step()
        assert engine.units[0].syncs == 2
        moved = (parameter.detach() - before).abs() / rate
        farthest[floor] = float(moved.max()), int(moved.argmax()), float(moved.median())
    assert farthest[0.0][0] > 1e4
    assert farthest[0.0][1] == 7
    assert farthest[0.1][0] < 20
    assert farthest[0.1][2] == pytest.approx(farthest[0.0][2])  # all others step as in the listing
