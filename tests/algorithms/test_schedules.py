"""Schedules of ``sync_every``: what they are, and that training under them is that of their constant parts."""

import math
import pickle
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from lightning_slowmo import (
    BMUF,
    QPRSGD,
    QSR,
    AllReduce,
    DiLoCo,
    Engine,
    Gossip,
    LocalSGD,
    PostLocal,
    SlowMo,
    SQuARM,
    Stages,
)
from lightning_slowmo.algorithms.clock import start_epoch
from lightning_slowmo.algorithms.schedules import NEVER
from lightning_slowmo.compression import QSGD
from tests.algorithms import reference
from tests.algorithms.training import CHANGING, MOMENTUM, Problem, Training, differ, goes_on_bit_exactly, same, train
from tests.on_workers import taking_turns

KINDS = (LocalSGD, SlowMo, BMUF, DiLoCo, QPRSGD, SQuARM)

# Values ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [PostLocal(2000), QSR(), QSR(2, 0.2, 10, 3), Stages({0: 1, 1000: 4, 5000: 12})])
@pytest.mark.parametrize("kind", KINDS)
def test_schedules_are_values_of_every_configuration_with_a_period(kind, schedule):
    algorithm = kind(sync_every=schedule)
    twin = pickle.loads(pickle.dumps(algorithm))
    assert (twin, hash(twin), repr(twin)) == (algorithm, hash(algorithm), repr(algorithm))
    assert twin.sync_every == schedule
    assert eval(repr(schedule), {"PostLocal": PostLocal, "QSR": QSR, "Stages": Stages}) == schedule
    assert replace(algorithm, sync_every=replace(schedule)) == algorithm
    assert kind(sync_every=schedule) != kind(sync_every=12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PostLocal(-1), "start must be an integer of at least 0, got -1"),
        (lambda: PostLocal(10, 0), "every must be an integer of at least 1, got 0"),
        (lambda: QSR(base=0), "base must be an integer of at least 1, got 0"),
        (lambda: QSR(coefficient=math.inf), "coefficient must be a finite number of at least 0, got inf"),
        (lambda: QSR(warmup_steps=1.5), "warmup_steps must be an integer"),
        (lambda: QSR(warmup_every=0), "warmup_every must be an integer"),
        (lambda: Stages({}), "stages must begin at 0"),
        (lambda: Stages({1: 4}), "stages must begin at 0"),
        (lambda: Stages({0: 4, -1: 2}), "a beginning must be an integer of at least 0"),
        (lambda: Stages({0: 1, 10: 0}), "sync_every of the stage that begins at 10 must be an integer of at least 1"),
        (lambda: Stages(12), "stages must be a mapping"),
        (lambda: Stages({0: 1}, by="batch"), "by must be 'step' or 'epoch', got 'batch'"),
        (lambda: LocalSGD("12"), "sync_every must be an integer of at least 1, or a schedule"),
        (lambda: LocalSGD(QSR(4), fragments=2), "fragments must be 1 with sync_every=QSR"),
        (lambda: DiLoCo(Stages({0: 2, 9: 8}), overlap=2), "overlap must be less than the 2 steps"),
        (lambda: SlowMo(sync_every=PostLocal(9, 6), fragments=4), "fragments must divide sync_every, which is 6"),
        (lambda: SlowMo(LocalSGD(QSR(4)), sync_every=12), "base must have an integer as sync_every"),
        (lambda: SlowMo(QPRSGD(PostLocal(4)), sync_every=PostLocal(4)), "base must have an integer as sync_every"),
    ],
)
def test_bad_schedules_are_refused_with_what_is_allowed(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_stages_cannot_be_changed():
    stages = Stages({5: 4, 0: 1})
    assert list(stages.stages.items()) == [(0, 1), (5, 4)]
    with pytest.raises(TypeError):
        stages.stages[0] = 2


def cosine(steps, peak, warm_up=0):
    return [
        peak * (step + 1) / warm_up
        if step < warm_up
        else peak * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))
        for step in range(steps)
    ]


def step_decay(steps, peak):
    return [peak * 0.5 ** (4 * step // steps) for step in range(steps)]


def rule(rates, base, alpha, warm_up=0, warm_up_every=1):
    """QSR's periods by the paper's equation: H = max(base, floor((alpha / eta)²)) at the start of each."""
    lengths, step = [], 0
    while step < len(rates):
        h = warm_up_every if step < warm_up else max(base, math.floor((alpha / rates[step]) ** 2))
        lengths.append(h)
        step += h
    return lengths


def test_qsr_is_the_papers_equation():
    for rates in (cosine(400, 0.008), step_decay(400, 0.008)):
        *whole, last = QSR(4, 0.0175).periods(rates)  # the run may end in the middle of the last one
        *expected, longest = rule(rates, 4, 0.0175)
        assert whole == expected
        assert last == 400 - sum(whole) <= longest
        assert QSR(4, 0.0175).periods(rates)[0] == 4  # at the paper's peak rate (0.0175 / 0.008)² is 4.8
    assert QSR(3, 0.0).periods([0.1] * 9) == [3, 3, 3]  # no coefficient: a constant period
    assert QSR(2, 0.2).period(0, 0.1) == 4
    assert QSR(2, 0.2).period(0, 0.05) == 4 * QSR(2, 0.2).period(0, 0.1)  # half the rate: four times the period
    assert QSR(2, 0.2).period(0, 0.0) == NEVER
    assert QSR(2, 0.0).period(0, 0.0) == 2
    assert QSR(2, 0.2, warmup_steps=10).period(9, 1e-9) == 2
    assert QSR(2, 0.2, warmup_steps=10, warmup_every=5).period(9, 1e-9) == 5
    assert QSR(2, 0.2, warmup_steps=10).period(10, 0.05) == 16


# Local steps after averaged gradients ---------------------------------------------------------------------------------

POST_LOCAL = {
    "local_sgd": lambda every: LocalSGD(every),
    "local_sgd, overlapped in fragments": lambda every: LocalSGD(every, overlap=1, fragments=2),
    "slowmo": lambda every: SlowMo(sync_every=every),
    "slowmo over gossip": lambda every: SlowMo(Gossip(), sync_every=every),
    "bmuf": lambda every: BMUF(every, block_momentum=0.5),
    "diloco": lambda every: DiLoCo(every),
    "qprsgd": lambda every: QPRSGD(every),
    "squarm": lambda every: SQuARM("ring", every, QSGD(3, contractive=True)),
}
START = 9


@taking_turns(1, 2, 3, each=list(POST_LOCAL))
def test_post_local_is_allreduce_to_the_bit_and_then_the_algorithm_from_there(workers, case):
    make = POST_LOCAL[case]
    ours = train(workers, make(PostLocal(START, 4)), CHANGING, MOMENTUM)
    parts = Training(workers, AllReduce(), CHANGING, MOMENTUM)
    rows = []
    while parts.steps < len(CHANGING.rates):
        if parts.steps == START:
            parts.engine = Engine(make(4), [parts.optimizer], workers)
        parts.step()
        rows.append(parts.values())
    np.testing.assert_array_equal(ours, np.stack(rows))
    if workers.size > 1:
        differ(ours, train(workers, AllReduce(), CHANGING, MOMENTUM))
        differ(ours, train(workers, make(4), CHANGING, MOMENTUM))


@taking_turns(2)
def test_post_local_from_the_start_and_never(workers):
    np.testing.assert_array_equal(
        train(workers, SlowMo(sync_every=PostLocal(0, 4)), CHANGING), train(workers, SlowMo(sync_every=4), CHANGING)
    )
    np.testing.assert_array_equal(
        train(workers, DiLoCo(PostLocal(10**6, 4)), CHANGING), train(workers, AllReduce(), CHANGING)
    )


@taking_turns(2)
def test_what_does_not_fit_after_the_first_phase_is_refused_before_it(workers):
    with pytest.raises(ValueError, match="fragments must be at most the number of trained parameters"):
        train(workers, LocalSGD(PostLocal(1000, 16), fragments=16), CHANGING)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1)
    with pytest.raises(ValueError, match="no slow state to shard"):
        Engine(LocalSGD(PostLocal(1000, 4)), [optimizer], workers, shard_slow_state=True)


@taking_turns(2)
def test_slow_state_is_sharded_once_there_is_some(workers):
    def run(algorithm):
        training = Training(workers, AllReduce(), CHANGING)
        training.engine = Engine(algorithm, [training.optimizer], workers, shard_slow_state=True)
        return training.trajectory()

    same(run(SlowMo(sync_every=PostLocal(7, 4))), train(workers, SlowMo(sync_every=PostLocal(7, 4)), CHANGING))


# Stages and QSR -------------------------------------------------------------------------------------------------------

OUTER = {
    "local_sgd": (lambda every: LocalSGD(every), reference.Average, "maintain"),
    "slowmo": (lambda every: SlowMo(sync_every=every, slow_momentum=0.6), partial(reference.SlowMo, 0.6), "reset"),
    "bmuf": (lambda every: BMUF(every, 0.5), partial(reference.BMUF, 0.5), "reset"),
    "diloco": (lambda every: DiLoCo(every), reference.DiLoCo, "maintain"),
}


@taking_turns(2, 3, each=list(OUTER))
def test_stages_are_their_constant_parts_to_the_bit(workers, case):
    make, _, _ = OUTER[case]
    ours = train(workers, make(Stages({0: 1, 5: 3, 14: 5})), CHANGING, MOMENTUM)
    parts = Training(workers, make(1), CHANGING, MOMENTUM)
    rows = []
    while parts.steps < len(CHANGING.rates):
        if parts.steps in (5, 14):  # the same slow state goes on at another period
            state = parts.engine.shared_state()
            parts.engine = Engine(make({5: 3, 14: 5}[parts.steps]), [parts.optimizer], workers)
            parts.engine.load_shared_state(state)
        parts.step()
        rows.append(parts.values())
    np.testing.assert_array_equal(ours, np.stack(rows))
    differ(ours, train(workers, make(3), CHANGING, MOMENTUM))


STEPS = 40
SCHEDULED = {
    "cosine": Problem((((3, 2), ()), ((7,),)), tuple((r, r / 2) for r in cosine(STEPS, 0.1, warm_up=6)), seed=3),
    "steps": Problem((((3, 2), ()), ((7,),)), tuple((r, r / 2) for r in step_decay(STEPS, 0.1)), seed=4),
}
"""Of two groups, the larger rate counts."""


def qsr_lengths(problem):
    warm_up = 6 if problem is SCHEDULED["cosine"] else 0
    return QSR(2, 0.16, warm_up), rule([rates[0] for rates in problem.rates], 2, 0.16, warm_up, 2)


@taking_turns(1, 2, 3, each=[(a, b) for a in OUTER for b in SCHEDULED])
def test_qsr_follows_the_reference_at_the_papers_periods(workers, case):
    name, rates = case
    problem, (make, outer, buffers) = SCHEDULED[rates], OUTER[name]
    schedule, lengths = qsr_lengths(problem)
    assert len(set(lengths)) > 2
    ours = train(workers, make(schedule), problem, MOMENTUM)
    inner = partial(reference.SGD, 0.9)
    paper = reference.trajectory(problem, workers.size, lengths, outer(), inner, buffers)
    same(ours, paper[workers.rank])


@taking_turns(2, each=["gossip inside", "averages between", "gossip of differences", "overlapped"])
def test_qsr_keeps_its_periods_where_it_has_a_clock_of_its_own(workers, case):
    schedule, lengths = qsr_lengths(SCHEDULED["cosine"])
    algorithm = {
        "gossip inside": SlowMo(Gossip(), sync_every=schedule),
        "averages between": SlowMo(LocalSGD(1), sync_every=schedule),
        "gossip of differences": QPRSGD(schedule, transport="gossip"),
        "overlapped": LocalSGD(schedule, overlap=1),
    }[case]
    run = Training(workers, algorithm, SCHEDULED["cosine"], MOMENTUM)
    unit = run.engine.units[0]
    seen = []
    while run.steps < STEPS:
        run.step()
        since = unit.steps if case in ("gossip inside", "averages between") else unit.pending
        if since == 0:
            seen.append(run.steps - sum(seen))
    assert seen == lengths[: len(seen)]
    assert len(seen) >= len(lengths) - 1


@taking_turns(2, each=[(rates, at) for rates in SCHEDULED for at in (3, 11, 23, 30)])
def test_qsr_goes_on_in_the_middle_of_a_period_to_the_bit(workers, case):
    rates, at = case
    problem = SCHEDULED[rates]
    schedule, _ = qsr_lengths(problem)
    for make, _, _ in OUTER.values():
        goes_on_bit_exactly(lambda make=make: Training(workers, make(schedule), problem, MOMENTUM), at)


@taking_turns(2)
def test_workers_whose_rates_differ_decide_alike_from_the_next_sync_on(workers):
    """Worker 1's own scheduler has halved its rate: alone it would wait four times as long."""
    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    engine = Engine(LocalSGD(QSR(1, 0.2)), [optimizer], workers)
    steps = []
    for step in range(60):
        if step == 4:  # a period of (0.2 / 0.1)² steps has ended
            optimizer.param_groups[0]["lr"] = 0.1 if workers.rank == 0 else 0.05
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        if engine.after_step() is not None:
            steps.append([header.pending[0] for header in engine.last_meeting.headers])
    engine.finish()
    assert steps[0] == [4, 4]
    assert steps[1] == [4, 16]  # nobody could know; worker 0 has waited
    assert steps[2:6] == [[7, 7]] * 4  # (0.2 / 0.075)²


@taking_turns(2)
def test_uneven_inputs_leave_all_workers_in_the_same_stage(workers):
    run = Training(workers, LocalSGD(Stages({0: 2, 6: 4})), CHANGING)
    for _ in range(8 if workers.rank == 0 else 3):
        run.step()
    run.engine.finish()
    assert [row[0] for row in workers.gather([run.engine.shared_state()["units"][0]["clock"]["taken"]])] == [8, 8]


@taking_turns(2)
def test_stages_by_epoch_follow_what_they_are_told(workers):
    run = Training(workers, LocalSGD(Stages({0: 1, 1: 2, 3: 4}, by="epoch")), CHANGING)
    with pytest.raises(ValueError, match="goes by epochs"):
        run.engine.units[0].after_step()
    run = Training(workers, LocalSGD(Stages({0: 1, 1: 2, 3: 4}, by="epoch")), CHANGING)
    ends = []
    for epoch in range(6):
        start_epoch(run.engine.units, epoch)
        for _ in range(4):
            before = run.engine.total.count
            run.step()
            if run.engine.total.count > before:
                ends.append(run.steps)
    assert ends == [1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24]
