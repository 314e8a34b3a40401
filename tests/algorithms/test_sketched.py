"""SketchedSGD and SensedSGD against numpy listings, plain SGD, and their own accounts."""

from copy import deepcopy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from lightning_slowmo import SensedSGD, SketchedSGD, SyncError
from lightning_slowmo.communication.workers import Workers
from lightning_slowmo.compression.indices import index_bytes
from tests.algorithms.training import (
    CHANGING,
    PLAIN,
    STEPS,
    Problem,
    Training,
    differ,
    goes_on_bit_exactly,
    same,
    small_buckets,
    train,
)
from tests.on_workers import taking_turns

PROBLEM = replace(CHANGING, groups=(((3, 2), (), (17, 3)), ((7,), (0,), (2, 1, 3), (40,))))
"""Below, tensors with fewer than 7 elements are sent as they are: some of either kind, an empty and a scalar one."""

SKETCHED = SketchedSGD(k=0.1, rows=3, columns=0.2, candidates=2, uncompressed_below=7, seed=4)
SENSED = SensedSGD(measurements=0.5, sparsity=0.1, block=32, iterations=4, uncompressed_below=7, seed=4)
MOMENTA = 0.0, 0.9


def flat(xs):
    return np.concatenate([x.ravel() for x in xs])


def everyone(workers, training):
    """The parameters of every worker."""
    return np.array(workers.gather(training.values().tolist()))


def momentum_sgd(workers, momentum):
    """SGD on mean gradients, the parameters after each step."""
    xs, rows = PROBLEM.initial(), []
    us = [np.zeros_like(x) for x in xs]
    for t in range(STEPS):
        for i, group in enumerate(PROBLEM.group_of):
            us[i] = momentum * us[i] + PROBLEM.mean_gradient(workers, t, i, xs[i])
            xs[i] = xs[i] - PROBLEM.rates[t][group] * us[i]
        rows.append(flat(xs))
    return np.stack(rows)


class Listing:
    """A problem whose large tensors are one vector, and whose small ones take momentum steps; see ``mean``."""

    def __init__(self, workers, momentum):
        self.workers, self.momentum, self.xs = workers, momentum, PROBLEM.initial()
        self.large = [i for i, x in enumerate(self.xs) if x.size >= 7]
        self.cuts = np.cumsum([self.xs[i].size for i in self.large])[:-1]
        self.d = sum(self.xs[i].size for i in self.large)
        self.small = [np.zeros_like(x) for x in self.xs]

    def trajectory(self):
        rows = []
        for t in range(STEPS):
            gs = [[PROBLEM.gradient(w, t, i, x) for i, x in enumerate(self.xs)] for w in range(self.workers)]
            update = self.step(t, [np.concatenate([g[i].ravel() for i in self.large]) for g in gs])
            pieces = dict(zip(self.large, np.split(update, self.cuts), strict=True))
            for i, group in enumerate(PROBLEM.group_of):
                self.small[i] = self.momentum * self.small[i] + sum(g[i] for g in gs) / self.workers
                direction = pieces[i].reshape(self.xs[i].shape) if i in pieces else self.small[i]
                self.xs[i] = self.xs[i] - PROBLEM.rates[t][group] * direction
            rows.append(flat(self.xs))
        return np.stack(rows)


class SketchedListing(Listing):
    """The paper's listing; only where the sketch sees large elements is asked of the sketch itself."""

    def __init__(self, config, workers):
        super().__init__(workers, config.momentum)
        self.config = config
        self.u, self.v = np.zeros((2, workers, self.d))

    def step(self, t, gradients):
        self.u = self.config.momentum * self.u + np.stack(gradients)
        self.v = self.v + self.u
        sketch = self.config.sketch(self.d, t)
        table = sum(sketch.sketch(torch.as_tensor(v)) for v in self.v)
        asked = sketch.heavy_hitters(table, self.d, self.config.asked(self.d))[0].numpy()
        mean = self.v.mean(0)
        places = asked[np.argsort(-np.abs(mean[asked]), kind="stable")[: self.config.kept(self.d)]]
        update = np.zeros(self.d)
        update[places] = mean[places]
        self.v[:, places] = 0
        if self.config.momentum_masking:
            self.u[:, places] = 0
        return update


class SensedListing(Listing):
    """One server for all, and the sensing matrix written out."""

    def __init__(self, config, workers):
        super().__init__(workers, config.momentum)
        self.config, self.sensing = config, config.sensing()
        units = torch.eye(self.d, dtype=torch.float64)
        self.phi = np.stack([self.sensing.measure(unit).numpy().ravel() for unit in units], axis=1)
        self.u = self.v = np.zeros(len(self.phi))

    def step(self, t, gradients):
        self.u = self.config.momentum * self.u + sum(self.phi @ g for g in gradients) / self.workers
        self.v = self.v + self.u
        table = torch.as_tensor(self.v.reshape(self.sensing.shape(self.d)))
        found = self.sensing.recover(table, self.d, self.config.kept(self.d), self.config.iterations)
        update = np.zeros((self.sensing.height(self.d), table.shape[1]))
        np.put_along_axis(update, found.positions.numpy(), found.values.numpy(), axis=0)
        update = update.ravel()[: self.d]
        self.v = self.v - self.phi @ update
        return update


@taking_turns(1, 2, 3, 4, each=[(momentum, masking) for momentum in MOMENTA for masking in (True, False)])
def test_sketched_sgd_is_the_listing(workers, case):
    config = replace(SKETCHED, momentum=case[0], momentum_masking=case[1])
    with small_buckets(workers):
        same(train(workers, config, PROBLEM), SketchedListing(config, workers.size).trajectory())


@taking_turns(1, 2, 3, 4, each=list(MOMENTA))
def test_sensed_sgd_is_the_listing(workers, case):
    config = replace(SENSED, momentum=case)
    with small_buckets(workers):
        same(train(workers, config, PROBLEM), SensedListing(config, workers.size).trajectory())


@taking_turns(2)
def test_every_switch_makes_a_difference(workers):
    ours = train(workers, SKETCHED, PROBLEM)
    for change in ({"k": 0.2}, {"momentum": 0.0}, {"momentum_masking": False}, {"seed": 5}, {"uncompressed_below": 0}):
        differ(ours, train(workers, replace(SKETCHED, **change), PROBLEM))
    ours = train(workers, SENSED, PROBLEM)
    for change in ({"measurements": 0.7}, {"sparsity": 0.2}, {"momentum": 0.0}, {"seed": 5}, {"iterations": 0}):
        differ(ours, train(workers, replace(SENSED, **change), PROBLEM))


@taking_turns(1, 2, 3)
def test_when_all_elements_move_it_is_sgd(workers):
    """With masking no momentum survives a step; tensors that are sent as they are keep theirs, so there are none."""
    for momentum in MOMENTA:
        all_move = replace(SKETCHED, k=1.0, uncompressed_below=0, momentum=momentum)
        same(train(workers, all_move, PROBLEM), momentum_sgd(workers.size, 0.0))
        same(train(workers, replace(all_move, momentum_masking=False), PROBLEM), momentum_sgd(workers.size, momentum))
        all_move = replace(SENSED, measurements=1.0, sparsity=1.0, momentum=momentum)
        same(train(workers, all_move, PROBLEM), momentum_sgd(workers.size, momentum))


@taking_turns(1, 2, 3, 4, each=[replace(SKETCHED, momentum=0.0), replace(SENSED, momentum=0.0)])
def test_replicas_are_equal_and_what_is_not_applied_is_kept(workers, case):
    """What was applied and what is left add up to all gradients; SensedSGD knows it by its measurements alone."""
    training = Training(workers, case, PROBLEM)
    (unit,) = training.engine.units
    missing = [torch.zeros(buffer.numel(), dtype=torch.float64) for buffer in unit.large.zeros()]
    with small_buckets(workers):
        while training.steps < STEPS:
            step, values = training.steps, [p.detach().numpy().copy() for p in training.parameters]
            gradient = flat(
                PROBLEM.mean_gradient(workers.size, step, i, x) for i, x in enumerate(values) if x.size >= 7
            )
            training.step()
            rows = everyone(workers, training)
            assert (rows == rows[0]).all()
            rates = [PROBLEM.rates[step][group] for group in PROBLEM.group_of]
            applied = flat(
                (old - p.detach().numpy()) / rate
                for old, p, rate in zip(values, training.parameters, rates, strict=True)
                if old.size >= 7
            )
            missing[0] += torch.as_tensor(gradient - applied)
            residual = unit.shared_state()["residual"]
            if isinstance(case, SketchedSGD):
                left, expected = torch.cat([part.flatten() for part in residual]), missing[0]
            else:
                left, expected = residual[0], case.sensing().measure(missing[0])
            torch.testing.assert_close(left, expected, rtol=0, atol=1e-10)
    assert missing[0].abs().max() > 1e-2


@taking_turns(2, 3, 4, each=[SKETCHED, SENSED])
def test_bytes_are_as_predicted(workers, case):
    big = replace(PROBLEM, groups=(((30, 20), (5,)), ((1000,),)), rates=PROBLEM.rates[:6])
    training, n, d, small = Training(workers, case, big, dtype=torch.float32), workers.size, 1600, 5
    before = workers.traffic.copy()
    training.trajectory()
    used = workers.traffic - before
    if isinstance(case, SketchedSGD):
        summed = [3 * 320, 2 * 160, small]
        expected = sum(2 * (n - 1) * 4 * length // n for length in summed)
    else:
        blocks, kept = -(-50 // n), 4  # of 50 blocks, each worker's share; in each, 16 measurements and 4 elements
        answer = blocks * kept * 4 + index_bytes(32 * blocks, blocks * kept)
        expected = (n - 1) * (blocks * 16 * 4 + answer) + 2 * (n - 1) * 4 * small // n
    assert case.kept(d) == (160 if isinstance(case, SketchedSGD) else 4)
    header, flags = 10 + 1, 3 + 3  # numbers in a header, with one optimizer; of our own, with three parameters
    assert used.headers == 2 * 6
    assert used.sent == 6 * (expected + (n - 1) * 8 * (header + flags) - (n - 1) * 8)
    assert used.received == used.sent


@taking_turns(2, 3, each=[SKETCHED, SENSED])
def test_a_resumed_run_is_bit_for_bit_the_same(workers, case):
    with small_buckets(workers):
        goes_on_bit_exactly(partial(Training, workers, case, PROBLEM), at=9)


@taking_turns(3, each=[SKETCHED, SENSED])
def test_another_number_of_workers_keeps_residual_and_momentum(workers, case):
    training = Training(workers, case, PROBLEM)
    for _ in range(9):
        training.step()
    shared = deepcopy(training.engine.shared_state())
    alone = Training(Workers(), case, PROBLEM)
    alone.engine.load_shared_state(shared)
    again = alone.engine.shared_state()
    assert again["units"][0]["steps"] == 9
    for name in ("residual", "momentum", "small_momentum"):
        for was, now in zip(shared["units"][0][name], again["units"][0][name], strict=True):
            torch.testing.assert_close(now, was, rtol=0, atol=0)
            assert name == "small_momentum" or was.abs().max() > 0


@taking_turns(3)
def test_another_sensing_matrix_measures_the_residual_anew(workers):
    training = Training(workers, SENSED, PROBLEM)
    for _ in range(9):
        training.step()
    shared, other = training.engine.shared_state(), replace(SENSED, measurements=0.8, block=16)
    new = Training(workers, other, PROBLEM)
    new.engine.load_shared_state(shared)
    (residual,), (old,) = (e.shared_state()["units"][0]["residual"] for e in (new.engine, training.engine))
    length = training.engine.units[0].large.numel
    expected = other.sensing().measure(SENSED.sensing().adjoint(old, length))
    torch.testing.assert_close(residual, expected, rtol=0, atol=1e-12)
    smaller = Training(workers, replace(SENSED, uncompressed_below=0), PROBLEM)
    with pytest.raises(ValueError, match="same uncompressed_below"):
        smaller.engine.load_shared_state(shared)


def backward(training, gradients):
    """Give the parameters these gradients, None for none, and let the engine exchange them."""
    for parameter, gradient in zip(training.parameters, gradients, strict=True):
        parameter.grad = None if gradient is None else torch.full_like(parameter, gradient)
    training.engine.after_backward()


@taking_turns(3, each=[SKETCHED, SENSED])
def test_unused_parameters(workers, case):
    """Used by one worker only it is a gradient of 0 for the others; used by nobody it keeps None and its residual."""
    training = Training(workers, case, PROBLEM)
    for _ in range(5):
        training.step()
    (unit,) = training.engine.units
    sizes = [p.numel() for p in training.parameters]
    unused, once = sizes.index(51), sizes.index(40)
    kept = unit.shared_state()["residual"]
    before = training.parameters[unused].detach().clone()
    gradients = [1.0] * len(sizes)
    gradients[unused] = None
    if workers.rank:
        gradients[once] = None
    backward(training, gradients)
    assert training.parameters[unused].grad is None
    used = training.parameters[once].grad
    assert used is not None
    rows = np.array(workers.gather(used.tolist()))
    assert (rows == rows[0]).all()
    training.optimizer.step()
    training.engine.after_step()
    assert torch.equal(training.parameters[unused].detach(), before)
    if case is SKETCHED:
        position = [id(p) for p in unit.layout.parameters].index(id(training.parameters[unused]))
        large = [id(p) for p in unit.large.parameters].index(id(training.parameters[unused]))
        assert position >= large
        assert torch.equal(unit.shared_state()["residual"][large], kept[large])
        assert kept[large].any()


@taking_turns(2, 3, each=[SKETCHED, SENSED])
def test_who_has_no_inputs_helps_and_keeps_everything(workers, case):
    """The last worker waits to end; what the others agree on is what they would agree on without it."""
    training = Training(workers, case, PROBLEM)
    (unit,) = training.engine.units
    alone = workers.rank == workers.size - 1
    before = deepcopy(unit.local_state())
    if alone:
        training.engine.finish()
        for name in ("momentum", "residual") if case is SKETCHED else ():
            for was, now in zip(before[name], unit.local_state()[name], strict=True):
                assert torch.equal(was, now)
    else:
        for _ in range(6):
            training.step()
        training.engine.finish()
    listing = (SketchedListing if case is SKETCHED else SensedListing)(case, workers.size - 1)
    np.testing.assert_allclose(training.values(), listing.trajectory()[5], rtol=0, atol=1e-10)


@taking_turns(2, each=[SKETCHED, SENSED])
def test_infinite_gradients_leave_no_trace(workers, case):
    """One worker's gradient overflows; with a scaler all skip the step, without one all say who it was."""
    training, twin = Training(workers, case, PROBLEM), Training(workers, case, PROBLEM)
    for _ in range(5):
        training.step()
        twin.step()
    for value in (float("nan"), float("inf")):
        for parameter in training.parameters:
            parameter.grad = torch.ones_like(parameter)
        if workers.rank:
            training.parameters[2].grad[0] = value
        training.engine.after_backward(loss_scale=1024.0)
        assert all(not p.grad.isfinite().any() for p in training.parameters if p.numel())
        training.optimizer.zero_grad()
        training.engine.after_step()
    for parameter in training.parameters:
        parameter.grad = torch.full_like(parameter, float("nan") if workers.rank else 1.0)
    with pytest.raises(SyncError, match=r"on rank 1, gradients are NaN"):
        training.engine.after_backward()
    training.optimizer.zero_grad()
    training.engine.after_step()
    assert np.array_equal(training.trajectory(), twin.trajectory())


@taking_turns(2, each=[SKETCHED, SENSED])
def test_a_scale_that_changes_makes_no_difference(workers, case):
    """Powers of two: bit for bit."""
    plain, scaled = Training(workers, case, PROBLEM), Training(workers, case, PROBLEM)
    after_backward = scaled.engine.after_backward

    def scale_and_back():
        factor = 2.0 ** (10 + scaled.steps % 5)
        for parameter in scaled.parameters:
            parameter.grad *= factor
        after_backward(loss_scale=factor)
        for parameter in scaled.parameters:
            parameter.grad /= factor

    scaled.engine.after_backward = scale_and_back
    assert np.array_equal(scaled.trajectory(), plain.trajectory())


@taking_turns(2, each=[SKETCHED, SENSED])
def test_a_gradient_is_exchanged_once(workers, case):
    """Those left over from the last step are no news; adding to exchanged ones is refused on all workers."""
    training = Training(workers, case, PROBLEM)
    training.step()
    (unit,) = training.engine.units
    backward(training, [1.0] * len(training.parameters))
    first = [p.grad.clone() for p in training.parameters]
    training.engine.after_backward()  # another optimizer's loss
    torch.nn.utils.clip_grad_norm_(training.parameters, 0.1)
    training.optimizer.step()
    training.engine.after_step()
    training.engine.after_backward()
    assert unit.steps == 2
    assert any(g.any() for g in first)
    training.optimizer.zero_grad(set_to_none=False)
    for parameter in training.parameters:
        parameter.grad += 1
    training.engine.after_backward()
    assert unit.steps == 3
    if workers.rank:
        training.parameters[2].grad += 1
    with pytest.raises(SyncError, match="on rank 1, gradients were added"):
        training.engine.after_backward()


@taking_turns(2, 3, each=[SKETCHED, SENSED])
def test_a_parameter_that_joins_takes_nothing_from_the_others(workers, case):
    training = Training(workers, replace(case, momentum=0.0), PROBLEM)
    for _ in range(4):
        training.step()
    (unit,) = training.engine.units
    old, length = unit.shared_state()["residual"], unit.large.numel
    joined = torch.nn.Parameter(torch.arange(20.0, dtype=torch.float64))
    training.optimizer.param_groups[1]["params"].append(joined)
    training.engine.before_step()
    assert unit.large.numel == length + 20
    new = unit.shared_state()["residual"]
    if isinstance(case, SketchedSGD):
        for now, was in zip(new, [*old, torch.zeros(20, dtype=torch.float64)], strict=True):
            torch.testing.assert_close(now, was, rtol=0, atol=1e-14)
    else:
        sensing = unit.config.sensing()
        known = torch.cat([sensing.adjoint(old[0], length), torch.zeros(20, dtype=torch.float64)])
        torch.testing.assert_close(new[0], sensing.measure(known), rtol=0, atol=1e-12)
    for parameter in [*training.parameters, joined]:
        parameter.grad = torch.ones_like(parameter)
    training.engine.after_backward()
    if isinstance(case, SensedSGD):
        parts = [p.grad.flatten() for p in unit.large.parameters]
        applied = sensing.measure(torch.cat(parts))
        expected = new[0] + sensing.measure(torch.ones(length + 20, dtype=torch.float64)) - applied
        torch.testing.assert_close(unit.shared_state()["residual"][0], expected, rtol=0, atol=1e-12)
    training.optimizer.step()
    training.engine.after_step()
    rows = everyone(workers, training)
    assert (rows == rows[0]).all()


@taking_turns(3, each=[SKETCHED, SENSED])
def test_tensors_of_any_size_and_type(workers, case):
    for shapes in (((1,),), ((1,), (0,), (1, 1)), ((0,), (33,)), ((2, 3), (5, 0))):
        problem = Problem((shapes,), ((0.1,),) * 4)
        for dtype in (torch.float32, torch.bfloat16):
            training = Training(workers, replace(case, uncompressed_below=0), problem, dtype=dtype)
            rows = training.trajectory()
            assert np.isfinite(rows).all()
            assert (everyone(workers, training) == training.values()).all()
            assert not np.array_equal(rows[0], rows[-1])


@pytest.mark.parametrize("config", [SketchedSGD(), SensedSGD()])
def test_other_optimizers_are_refused(config):
    parameters = [torch.nn.Parameter(torch.ones(3))]
    name = type(config).__name__
    for make in (torch.optim.Adam, partial(PLAIN, momentum=0.9)):
        with pytest.raises(ValueError, match=rf"{name} keeps momentum itself .*Use SGD\(parameters, lr=...\)"):
            config.bind(make(parameters), Workers())
    config.bind(PLAIN(parameters, weight_decay=0.1), Workers())


def test_wrong_arguments_are_refused():
    wrong = {"k": (0, 0.0, 1.5, True, "1"), "rows": (0, 2), "columns": (0, 2.0), "candidates": (0, 1.5)}
    wrong |= {"momentum": (1.0, -0.1), "uncompressed_below": (-1, 0.5)}
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError, match=name):
                SketchedSGD(**{name: value})
    wrong = {"measurements": (0, 1.1), "sparsity": (0, 2), "iterations": (-1,), "momentum": (1.0,), "block": (0, 100)}
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError, match=name):
                SensedSGD(**{name: value})
