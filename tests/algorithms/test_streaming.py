"""Averages that overlap with steps and go by fragments: against numpy, their special cases, and in trouble."""

import time
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from lightning_slowmo import BMUF, AllReduce, DiLoCo, Engine, Gossip, LocalSGD, SlowMo, Workers
from lightning_slowmo.averaging import ExactAverager
from lightning_slowmo.bucket_sizes import BucketSizes
from lightning_slowmo.communication import Header, Reason
from lightning_slowmo.compression import QSGD
from lightning_slowmo.parameters import Layout
from tests import harness
from tests.algorithms import reference
from tests.algorithms.test_trajectories import INNER
from tests.algorithms.training import CHANGING as FEW
from tests.algorithms.training import (
    MOMENTUM,
    PLAIN,
    Problem,
    Training,
    differ,
    goes_on_bit_exactly,
    same,
    small_buckets,
    train,
)
from tests.on_workers import taking_turns

SIZES = (1, 2, 3, 4)
EVERY = 6

CHANGING = replace(FEW, groups=(((3, 2), (), (5,)), ((7,), (0,), (2, 1, 3), (4, 4))))
"""Enough parameters for six fragments."""

SETTINGS = [(1, 1), (5, 1), (0, 2), (0, 6), (2, 2), (1, 3)]
"""Overlap and fragments."""

ALGORITHMS = [LocalSGD(EVERY), SlowMo(sync_every=EVERY), BMUF(EVERY, 0.5), DiLoCo(EVERY)]
FAMILIES = [LocalSGD, SlowMo, BMUF, DiLoCo]


def streaming(workers):
    """All algorithms in a few settings; fewer where workers are many."""
    settings = SETTINGS if workers.size == 2 else [(2, 1), (1, 3)]
    return [replace(algorithm, overlap=d, fragments=k) for algorithm in ALGORITHMS for d, k in settings]


# Against the reference ------------------------------------------------------------------------------------------------


@taking_turns(*SIZES, each=SETTINGS)
def test_every_algorithm_follows_the_reference(workers, case):
    overlap, fragments = case
    pairs = [
        (LocalSGD(EVERY), reference.Average()),
        (
            SlowMo(sync_every=EVERY, slow_momentum=0.6, slow_lr=0.8, inner_buffers="maintain"),
            reference.SlowMo(0.6, 0.8),
        ),
        (BMUF(EVERY, 0.6, 0.8, nesterov=True, inner_buffers="maintain"), reference.BMUF(0.6, 0.8, True)),
        (DiLoCo(EVERY), reference.DiLoCo()),
    ]
    for algorithm, outer in pairs:
        expected = reference.trajectory(
            CHANGING, workers.size, EVERY, outer, partial(reference.SGD, 0.9), "maintain", overlap, fragments
        )
        with small_buckets(workers, 64, 32, 3):
            ours = train(workers, replace(algorithm, overlap=overlap, fragments=fragments), CHANGING, MOMENTUM)
        same(ours, expected[workers.rank])


@taking_turns(2, 3, each=["reset", "average"])
def test_the_optimizers_buffers_are_treated_when_parameters_are_sent(workers, case):
    for name in ("nesterov", "adam"):
        optimizer, inner = INNER[name]
        for overlap, fragments in SETTINGS:
            slowmo = SlowMo(sync_every=EVERY, slow_momentum=0.6, inner_buffers=case)
            expected = reference.trajectory(
                CHANGING, workers.size, EVERY, reference.SlowMo(0.6), inner, case, overlap, fragments
            )
            ours = train(workers, replace(slowmo, overlap=overlap, fragments=fragments), CHANGING, optimizer)
            same(ours, expected[workers.rank])


@taking_turns(2)
def test_the_learning_rate_of_an_outer_step_is_that_of_the_send(workers):
    """The rate falls to a tenth while the average is in flight, which must not touch the momentum's units."""
    rates = tuple((0.1, 0.05) if step % EVERY in (5, 0) else (0.01, 0.02) for step in range(24))
    for fragments in (1, 2):
        problem = replace(CHANGING, rates=rates)
        expected = reference.trajectory(
            problem, workers.size, EVERY, reference.SlowMo(0.6), overlap=2, fragments=fragments
        )
        slowmo = SlowMo(sync_every=EVERY, slow_momentum=0.6, overlap=2, fragments=fragments)
        same(train(workers, slowmo, problem), expected[workers.rank])


# Special cases --------------------------------------------------------------------------------------------------------


@taking_turns(*SIZES)
def test_on_the_same_data_overlap_and_fragments_of_local_sgd_change_nothing(workers):
    shared = replace(CHANGING, shared=True)
    alone = train(Workers(), LocalSGD(EVERY), shared, MOMENTUM)
    for overlap, fragments in SETTINGS:
        same(train(workers, LocalSGD(EVERY, overlap, fragments), shared, MOMENTUM), alone)
        plain = SlowMo(None, EVERY, 0.0, 1.0, "maintain", overlap=overlap, fragments=fragments)
        same(train(workers, plain, shared, MOMENTUM), alone)


@taking_turns(2, 3, 4)
def test_slowmo_without_slow_momentum_is_local_sgd_and_both_part_from_what_waits(workers):
    for overlap, fragments in SETTINGS:
        local = train(workers, LocalSGD(EVERY, overlap, fragments), CHANGING, MOMENTUM)
        plain = SlowMo(None, EVERY, 0.0, 1.0, "maintain", overlap=overlap, fragments=fragments)
        same(train(workers, plain, CHANGING, MOMENTUM), local)
        differ(train(workers, LocalSGD(EVERY), CHANGING, MOMENTUM), local)


@taking_turns(*SIZES)
def test_a_fragment_for_each_step_with_a_constant_gradient_ends_a_period_as_one_fragment_does(workers):
    """Fragments of equal gradients at all steps only shift in time: at a constant rate, all progress is the same."""

    class Constant(Problem):
        def gradient(self, worker, step, index, x):
            return np.full_like(x, 1.0 + worker + index)

    problem = Constant((((4,), (4,)), ((4,),)), ((0.1, 0.1),) * 24)
    whole, parts = (train(workers, LocalSGD(3, 0, fragments), problem) for fragments in (1, 3))
    expected = problem.initial()
    for index, start in enumerate(expected):
        where = slice(4 * index, 4 * index + 4)
        mean = start - 0.1 * 24 * (1 + index + (workers.size - 1) / 2)
        same(whole[-1][where], mean)
        own = 0.1 * (2 - index) * (workers.rank - (workers.size - 1) / 2)  # local steps since its fragment's turn
        same(parts[-1][where], mean - own)


@taking_turns(2, 3, 4)
def test_corrections_leave_the_mean_of_local_sgd_where_it_was(workers):
    for overlap, fragments in SETTINGS:
        training = Training(workers, LocalSGD(EVERY, overlap, fragments), CHANGING)
        start = training.values()
        for row in training_means(workers, training, start):
            same(*row)


def training_means(workers, training, before):
    """At each step: the mean of the workers, and where the mean of their gradients takes it."""
    mean = before
    for step, rates in enumerate(training.problem.rates):
        moves = []
        for index, parameter in enumerate(training.parameters):
            x = parameter.detach().numpy().copy()
            gradient = training.problem.gradient(workers.rank, step, index, x)
            moves.append(np.ravel(rates[training.problem.group_of[index]] * gradient))
        training.step()
        mean = mean - np.mean(workers.gather(np.concatenate(moves).tolist()), axis=0)
        yield np.mean(workers.gather(training.values().tolist()), axis=0), mean


@taking_turns(2, 3, 4)
def test_without_steps_the_mean_is_taken_in_to_the_last_bit_when_it_is_its_turn(workers):
    for algorithm in (LocalSGD(4, overlap=2), SlowMo(sync_every=4, slow_momentum=0.0, overlap=2)):
        resting = replace(CHANGING, rates=((0.0, 0.0),) * 24)
        training = Training(workers, algorithm, resting)
        for parameter in training.parameters:
            parameter.data.add_(1.0 + workers.rank)
        own = training.values()
        for _ in range(5):
            training.step()
            np.testing.assert_array_equal(training.values(), own)
        training.step()
        rows = workers.gather(training.values().tolist())
        assert all(row == rows[0] for row in rows)
        same(training.values(), own - workers.rank + (workers.size - 1) / 2)


def test_without_overlap_and_fragments_nothing_is_different():
    optimizer = torch.optim.SGD([Parameter(torch.ones(3))], lr=0.1)
    assert type(LocalSGD(4, 0, 1).bind(optimizer, Workers()).averager) is ExactAverager
    assert type(SlowMo(overlap=0, fragments=1).bind(optimizer, Workers()).averager) is ExactAverager
    assert SlowMo(overlap=0, fragments=1) == SlowMo()


@taking_turns(2)
def test_when_a_message_arrives_does_not_matter(workers):
    algorithm = SlowMo(sync_every=4, overlap=2, fragments=1)
    expected = train(workers, algorithm, CHANGING)
    training, rows = Training(workers, algorithm, CHANGING), []
    for step in range(len(CHANGING.rates)):
        time.sleep(0.02 * ((step + workers.rank) % 3))
        training.step()
        rows.append(training.values())
    np.testing.assert_array_equal(np.stack(rows), expected)


@taking_turns(1, 2)
def test_half_precision_parameters_follow_and_are_equal_once_they_rest(workers):
    parameter = Parameter(torch.ones(50, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([parameter], lr=2.0**-7)
    engine = Engine(SlowMo(sync_every=2, slow_momentum=0.0, overlap=1), [optimizer], workers)
    for _ in range(40):
        parameter.grad = torch.full_like(parameter, 1.0 + workers.rank)
        optimizer.step()
        engine.after_step()
    assert engine.units[0].anchor[0].dtype == torch.float32
    mean = 1 - 40 * 2.0**-7 * (1 + (workers.size - 1) / 2)
    torch.testing.assert_close(parameter.detach().float(), torch.full((50,), mean), atol=2.0**-4, rtol=0)


# Consensus and state --------------------------------------------------------------------------------------------------


@taking_turns(1, 2, 3)
def test_the_consensus_counts_what_is_in_flight_and_takes_nothing_in_early(workers):
    for algorithm in streaming(workers):
        visiting, straight = (Training(workers, algorithm, CHANGING, MOMENTUM) for _ in range(2))
        running = visiting.engine.units[0]
        for _ in CHANGING.rates:
            visiting.step(), straight.step()
            with visiting.engine.consensus():
                model = visiting.values()
                rows = workers.gather(model.tolist())
                assert all(row == rows[0] for row in rows)
            np.testing.assert_array_equal(visiting.values(), straight.values())
            if running.averager.in_flight is None:
                same(model, np.mean(workers.gather(visiting.values().tolist()), axis=0))


@taking_turns(2, 3)
def test_the_consensus_in_flight_is_the_mean_of_the_corrected_workers(workers):
    for kind in (partial(SlowMo, sync_every=4, slow_momentum=0.6), partial(DiLoCo, 4)):
        for steps, fragments in ((4, 1), (5, 1), (4, 2)):
            training = Training(workers, kind(overlap=1 if fragments == 2 else 3, fragments=fragments), CHANGING)
            for _ in range(steps):
                training.step()
            running = training.engine.units[0]
            running.averager.drain()
            flight, corrected = running.averager.in_flight, [p.detach().clone() for p in training.parameters]
            twins = dict(zip(map(id, training.parameters), corrected, strict=True))
            for bucket, sent, new in zip(flight.buckets, flight.sent, flight.new, strict=True):
                at = 0
                for parameter, start, stop in bucket.spans:
                    there = slice(at, at + stop - start)
                    twins[id(parameter)].view(-1)[start:stop] += (new - sent)[there]
                    at += stop - start
            flat = torch.cat([twin.flatten() for twin in corrected]).tolist()
            with training.engine.consensus():
                same(training.values(), np.mean(workers.gather(flat), axis=0))
            assert np.abs(training.values() - flat).max() > 1e-3


@taking_turns(1, 3)
def test_training_goes_on_bit_exactly_from_any_step_of_a_period(workers):
    for algorithm in streaming(workers):
        expected = train(workers, algorithm, CHANGING, MOMENTUM)
        make = partial(Training, workers, algorithm, CHANGING, MOMENTUM)
        before = make()
        for step in range(EVERY + 1, 2 * EVERY + 1):
            goes_on_bit_exactly(make, step, before, expected)


@taking_turns(2, 3)
def test_shared_state_is_equal_on_all_workers_and_has_the_outer_step_of_what_is_in_flight(workers):
    for fragments in (1, 2):
        training = Training(workers, SlowMo(sync_every=4, overlap=1, fragments=fragments), CHANGING)
        for _ in range(8):
            training.step()
        (state,) = training.engine.shared_state()["units"]
        flat = torch.cat([t.flatten() for t in (*state["slow"]["anchor"], *state["slow"]["momentum"])])
        rows = workers.gather(flat.tolist())
        assert all(row == rows[0] for row in rows)
        expected = reference.trajectory(
            CHANGING, workers.size, 4, reference.SlowMo(0.5), overlap=0, fragments=fragments
        )
        assert training.engine.units[0].averager.in_flight is not None
        assert state["base"] == {"fragments": fragments, "fragment": 0, "clock": {"epoch": None, "taken": 8}}
        assert np.isfinite(expected).all()


@taking_turns(2)
def test_state_that_does_not_fit_is_refused(workers):
    def after(steps, algorithm):
        training = Training(workers, algorithm, CHANGING)
        for _ in range(steps):
            training.step()
        return training.engine

    halves, whole, plain = (
        after(5, SlowMo(sync_every=4, overlap=overlap, fragments=fragments))
        for overlap, fragments in ((1, 2), (2, 1), (0, 1))
    )
    for there, here in ((halves, whole), (halves, plain), (plain, halves), (whole, halves)):
        with pytest.raises(ValueError, match=r"saved with fragments=\d.*Resume with the same"):
            here.load_shared_state(there.shared_state())
    plain.load_shared_state(whole.shared_state())
    with pytest.raises(ValueError, match=r"an average was on its way\. Resume with the same overlap"):
        plain.load_local_state(whole.local_state())
    whole.load_shared_state(plain.shared_state())
    whole.load_local_state(plain.local_state())  # overlap can begin later


# Workers that do not do the same --------------------------------------------------------------------------------------


@taking_turns(2)
def test_a_worker_that_waits_takes_in_what_is_in_flight_when_it_goes_on(workers):
    parameter = Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    engine = Engine(LocalSGD(4, overlap=2), [optimizer], workers)

    def steps(count):
        for _ in range(count):
            parameter.grad = torch.full_like(parameter, (-1.0, -10.0)[workers.rank])
            optimizer.step()
            engine.after_step()

    steps((6, 3)[workers.rank])  # rank 1 sends 30 and waits; its weight is 3 of 7
    with engine.consensus():
        mean = (4 * 4 + 3 * 30) / 7
        assert parameter.item() == pytest.approx(mean + 2)
    assert parameter.item() == pytest.approx((mean + 2, 30)[workers.rank])
    steps((0, 1)[workers.rank])
    with engine.consensus():
        assert parameter.item() == pytest.approx((2 * (mean + 2) + mean + 10) / 3)
    steps((0, 1)[workers.rank])
    assert parameter.item() == pytest.approx((mean + 2, mean + 20)[workers.rank])
    engine.finish()
    assert parameter.item() == pytest.approx((2 * (mean + 2) + 2 * (mean + 20)) / 4)


@taking_turns(2)
def test_a_fragment_weighs_the_steps_since_its_own_last_turn(workers):
    parameters = [Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2)]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    engine = Engine(LocalSGD(4, fragments=2), [optimizer], workers)
    for _ in range((4, 1)[workers.rank]):
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, (-1.0, -10.0)[workers.rank])
        optimizer.step()
        engine.after_step()
    engine.meet(Reason.BARRIER)
    first, second = (parameter.item() for parameter in parameters)
    assert second == pytest.approx((4 * 4 + 1 * 10) / 5)  # rank 0 took two steps since the first turn, but four in all
    mean = (2 * 2 + 1 * 10) / 3
    assert first == pytest.approx((mean + 2, mean)[workers.rank])
    with engine.consensus():
        assert parameters[0].item() == pytest.approx(mean + 2)


@taking_turns(2)
def test_a_poisoned_worker_gets_everything_at_once(workers):
    for overlap, fragments in ((2, 1), (0, 2), (1, 2)):
        parameters = [Parameter(torch.full((3,), 2.0)) for _ in range(2)]
        engine = Engine(
            LocalSGD(4, overlap, fragments), [torch.optim.SGD(parameters, lr=0.1)], workers, on_nonfinite="skip"
        )
        agreed = []
        engine.on_sync = agreed.append
        for step in range(1, 8 // fragments + 1):
            if step == 4 // fragments + 1 and workers.rank == 1:  # an average is in flight
                for parameter in parameters:
                    parameter.data[1] = float("nan")
            engine.after_step()
        assert agreed == [False, True]
        assert [parameter.tolist() for parameter in parameters] == [[2.0] * 3] * 2


def lose_a_message(rank):
    """Rank 1 comes to the meeting, but its part of the sum never leaves."""
    workers = Workers.from_world(timeout=timedelta(seconds=3))
    parameter = Parameter(torch.ones(3))
    engine = Engine(LocalSGD(2, overlap=1), [torch.optim.SGD([parameter], lr=0.1)], workers)
    engine.after_step()
    with mock.patch.object(torch.distributed, "all_reduce") if rank == 1 else nullcontext():
        engine.after_step()
    if rank == 1:
        time.sleep(6)
        return
    engine.after_step()


@pytest.mark.processes
def test_waiting_for_what_does_not_arrive_has_a_limit_and_names_whom_it_waited_for():
    (said, _) = harness.run(2, lose_a_message, expect_failure=True)
    assert said.startswith("SyncError: rank 0 could not meet the other workers for the sum of the parameters.")
    assert "Did not come (within 0:00:03): rank 1." in said


@taking_turns(2, each=FAMILIES)
def test_parameters_that_join_while_an_average_is_in_flight(workers, case):
    for overlap, fragments in ((2, 1), (1, 2)):
        first, other, late = (Parameter(torch.full((size,), 1.0, dtype=torch.float64)) for size in (2, 3, 4))
        optimizer = torch.optim.SGD([first, other], lr=0.1)
        engine = Engine(case(sync_every=4, overlap=overlap, fragments=fragments), [optimizer], workers)

        def steps(count, parameters, engine=engine, optimizer=optimizer):
            for _ in range(count):
                for parameter in parameters:
                    parameter.grad = torch.full_like(parameter, 1.0 + workers.rank)
                engine.before_step()
                optimizer.step()
                engine.after_step()

        steps(4, [first, other])
        optimizer.add_param_group({"params": [late], "lr": 0.2})
        steps(9, [first, other, late])
        assert engine.units[0].layout.covers([[first, other], [late]])
        engine.finish()
        for parameter in (first, other, late):
            rows = workers.gather(parameter.tolist())
            assert rows[0] == rows[1]
            assert parameter.max() < 0.5


def test_momentum_keeps_its_units_when_parameters_come_to_other_fragments():
    parameters = [Parameter(torch.ones(size, dtype=torch.float64)) for size in (2, 3, 4, 9)]
    parameters[3].requires_grad_(False)
    optimizer = torch.optim.SGD(parameters[:2], lr=0.1)
    optimizer.add_param_group({"params": parameters[2:]})
    engine = Engine(SlowMo(sync_every=4, fragments=2), [optimizer], Workers())
    running = engine.units[0]

    def u():
        """The paper's slow momentum of the first three parameters."""
        layout, rates = running.layout, running.momentum_rates
        of = {id(span.parameter): rates[run.fragment][run.group] for run in layout.runs for span in run.spans}
        views = zip(layout.parameters, layout.per_parameter(running.momentum), strict=True)
        return [view / of[id(parameter)] for parameter, view in views][:3]

    for rate in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        engine.before_step()
        optimizer.step()
        engine.after_step()
    before = [value.clone() for value in u()]
    inside = [running.layout.outside(0) & set(map(id, parameters[:3]))]
    parameters[3].requires_grad_(True)
    engine.before_step()
    inside.append(running.layout.outside(0) & set(map(id, parameters[:3])))
    assert inside[0] != inside[1]
    assert all(value.any() for value in before)
    torch.testing.assert_close(u(), before)


@taking_turns(2)
def test_each_of_two_optimizers_has_its_own_average_in_flight(workers):
    def rows(periods):
        parameters = [Parameter(torch.zeros(3, dtype=torch.float64)) for _ in periods]
        optimizers = [torch.optim.SGD([parameter], lr=0.1) for parameter in parameters]
        engine = Engine(LocalSGD(4, overlap=2), optimizers, workers)
        seen = []
        for step in range(1, 25):
            for index, period in enumerate(periods):
                if step % period == 0:
                    parameters[index].grad = torch.full_like(parameters[index], (1.0 + workers.rank) * step)
                    optimizers[index].step()
                    engine.after_step(index)
            seen.append([parameter.tolist() for parameter in parameters])
        return seen

    both, first, second = rows([1, 2]), rows([1]), rows([2])
    assert [row[0] for row in both] == [row[0] for row in first]
    assert [row[1] for row in both] == [row[0] for row in second]


# The bill -------------------------------------------------------------------------------------------------------------


@taking_turns(2, 3, each=[1, 2, 4])
def test_each_sync_sends_one_fragment(workers, case):
    problem = Problem((((40,), (3, 9), (25,), (60,)), ((50,), (7, 7))), ((0.1, 0.1),) * 24)
    with small_buckets(workers):
        training = Training(workers, SlowMo(sync_every=8, overlap=1, fragments=case), problem)
    total = sum(int(np.prod(shape)) for shape in problem.shapes)
    n, header = workers.size, 8 * len(Header(Reason.SYNC, pending=(0,)).numbers())
    sent = []
    for _ in range(16):
        before = training.engine.total.bytes_sent
        training.step()
        sent.append(training.engine.total.bytes_sent - before)
    assert [step for step, amount in enumerate(sent, 1) if amount] == list(range(8 // case, 17, 8 // case))
    payloads = [amount - (n - 1) * header for amount in sent if amount]
    whole = 2 * (n - 1) * 8 * total // n
    assert sum(payloads) == pytest.approx(2 * whole, rel=0.01)
    assert max(payloads) <= whole / case + 2 * (n - 1) * 8 * 60 / n  # no further off than by a parameter
    assert training.engine.total.count == 2 * case


@taking_turns(2)
def test_the_report_has_the_drift_and_the_waiting_of_the_average_that_arrived_meanwhile(workers):
    parameter = Parameter(torch.zeros(4))
    engine = Engine(LocalSGD(2, overlap=1), [torch.optim.SGD([parameter], lr=0.0)], workers)
    parameter.data.fill_((1.0, 3.0)[workers.rank])
    agreed = []
    engine.on_sync = agreed.append
    engine.after_step()
    first = engine.after_step()
    assert first.drift == 0.0
    assert engine.after_step() is None
    assert parameter.tolist() == [2.0] * 4
    waited = engine._waited[0]
    assert waited > 0
    second = engine.after_step()
    assert second.drift == pytest.approx(0.5)  # 1 from a mean of 2
    assert second.seconds > waited
    assert engine.after_step() is None
    assert engine.after_step().drift == 0.0
    assert agreed == [False] * 3


@taking_turns(2)
def test_memory_for_what_is_sent_is_used_again(workers):
    training = Training(workers, LocalSGD(4, overlap=1, fragments=2), CHANGING)
    seen = set()
    for _ in CHANGING.rates:
        training.step()
        flight = training.engine.units[0].averager.in_flight
        seen |= {flat.untyped_storage().data_ptr() for flat in (flight.sent + flight.new if flight else [])}
    buckets = max(len(training.engine.units[0].layout.fragment(index)) for index in range(2))
    assert len(seen) <= 2 * buckets + 2  # a buffer may have grown once


# Layout ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fragments", [1, 2, 3, 5])
def test_fragments_are_balanced_whole_and_alike_layers_are_dealt_in_turn(fragments):
    layers = [torch.zeros(shape) for _ in range(6) for shape in ((30, 30), (30,))]
    layout = Layout([layers], BucketSizes(512, 1024), fragments=fragments)
    parts = [layout.fragment(index) for index in range(fragments)]
    assert sum(map(len, parts)) == len(layout.buckets)
    sizes = [sum(bucket.numel for bucket in part) for part in parts]
    assert sum(sizes) == layout.numel
    assert max(sizes) - min(sizes) <= 900
    for index in range(fragments):
        inside = {id(t) for t in layers} - layout.outside(index)
        assert inside == {id(parameter) for bucket in parts[index] for parameter, _, _ in bucket.spans}
        assert [layer for layer in range(6) if id(layers[2 * layer]) in inside] == list(range(index, 6, fragments))


# Settings that cannot be ----------------------------------------------------------------------------------------------

BAD = [
    *[(kind, {"overlap": value}, "overlap must be an integer") for kind in FAMILIES for value in (-1, 1.0, True, None)],
    *[(kind, {"fragments": value}, "fragments must be an integer") for kind in FAMILIES for value in (0, 2.0, None)],
    *[(kind, {"sync_every": 6, "overlap": 6}, r"overlap must be less than the 6 steps.*got 6") for kind in FAMILIES],
    *[(kind, {"sync_every": 6, "overlap": 3, "fragments": 2}, "less than the 3 steps") for kind in FAMILIES],
    *[(kind, {"sync_every": 6, "fragments": 4}, "fragments must divide sync_every, which is 6") for kind in FAMILIES],
    (SlowMo, {"base": Gossip(), "overlap": 1}, "need average=True, no compressor, and LocalSGD"),
    (SlowMo, {"base": AllReduce(), "fragments": 2}, "need average=True, no compressor, and LocalSGD"),
    (SlowMo, {"base": LocalSGD(3), "fragments": 2}, "LocalSGD with the same sync_every as base"),
    (SlowMo, {"average": False, "overlap": 1}, "need average=True"),
    (SlowMo, {"compressor": QSGD(4), "overlap": 1}, "no compressor"),
    (SlowMo, {"base": LocalSGD(12, 1)}, "belong to SlowMo, not to its base"),
    (DiLoCo, {"compressor": QSGD(4), "fragments": 2}, "do not go with a compressor or an outer_optimizer"),
    (DiLoCo, {"outer_optimizer": torch.optim.Adam, "overlap": 1}, "do not go with a compressor or an outer_optimizer"),
]


@pytest.mark.parametrize(("kind", "arguments", "message"), BAD, ids=str)
def test_what_cannot_be_is_refused(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**arguments)


def test_what_cannot_be_for_this_model_is_refused_before_training():
    optimizer = torch.optim.SGD([Parameter(torch.ones(3)), Parameter(torch.ones(0)), Parameter(torch.ones(2))], lr=0.1)
    for algorithm in (LocalSGD(6, fragments=3), SlowMo(sync_every=6, fragments=3)):
        with pytest.raises(ValueError, match=r"fragments must be at most the number of trained parameters, 2,.*got 3"):
            Engine(algorithm, [optimizer], Workers())
    for algorithm in (SlowMo(overlap=1), BMUF(50, fragments=2), DiLoCo(overlap=3), LocalSGD(overlap=1)):
        with pytest.raises(ValueError, match="shard_slow_state"):
            Engine(algorithm, [optimizer], Workers(), shard_slow_state=True)


@taking_turns(2)
def test_slow_state_may_be_offloaded(workers):
    def end(**placement):
        training = Training(workers, SlowMo(sync_every=4, overlap=1, fragments=2), CHANGING, PLAIN)
        if placement:
            training.engine.units[0].place_slow_state(**placement)
        return training.trajectory()

    np.testing.assert_array_equal(end(shard=False, offload=True), end())
