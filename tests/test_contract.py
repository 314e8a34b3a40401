"""What every algorithm owes its users, whatever it does: one set of tests over all presets and their variants."""

import io
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from lightning_slowmo import (
    BMUF,
    PRESETS,
    QPRSGD,
    QSR,
    AllReduce,
    APMSqueeze,
    DiLoCo,
    Engine,
    Gossip,
    LocalSGD,
    PostLocal,
    Ramp,
    SensedSGD,
    SketchedSGD,
    SlowMo,
    SparseLoCo,
    SQuARM,
    Stages,
    Threshold,
    Workers,
)
from lightning_slowmo.communication import Reason
from lightning_slowmo.communication.in_process import in_process, together
from lightning_slowmo.compression import QSGD, ChunkedTopK, Sign, SignTopK, TopK
from tests.algorithms.training import (
    CHANGING,
    MOMENTUM,
    PLAIN,
    Training,
    goes_on_bit_exactly,
    random_problem,
    small_buckets,
)
from tests.on_workers import TIMEOUT, on_workers, taking_turns

VARIANTS = {
    "local_sgd, overlapped": LocalSGD(6, overlap=2),
    "local_sgd in fragments": LocalSGD(6, fragments=3),
    "slowmo, overlapped in fragments": SlowMo(sync_every=6, overlap=1, fragments=2),
    "slowmo, compressed": SlowMo(sync_every=4, compressor=TopK(0.2)),
    "slowmo, compressed between": SlowMo(LocalSGD(2), sync_every=4, compressor=QSGD(4)),
    "slowmo without averaging": SlowMo(LocalSGD(2), sync_every=4, average=False),
    "slowmo over allreduce": SlowMo(AllReduce(), sync_every=4),
    "slowmo over qprsgd": SlowMo(QPRSGD(2), sync_every=4),
    "bmuf, warming up": BMUF(4, warmup_steps=8, block_momentum=0.5, nesterov=True),
    "diloco, compressed": DiLoCo(4, compressor=Sign("l2")),
    "diloco with Adam outside": DiLoCo(4, outer_optimizer=torch.optim.Adam),
    "squarm with a trigger": SQuARM("ring", 2, QSGD(3, contractive=True), 0.3, Threshold(60.0, 10.0, every=2)),
    "local_sgd, post-local": LocalSGD(PostLocal(6, 4), fragments=2),
    "slowmo, post-local": SlowMo(sync_every=PostLocal(6, 4)),
    "slowmo_sgp, post-local": SlowMo(Gossip(), sync_every=PostLocal(7, 4)),
    "squarm, post-local": SQuARM("ring", PostLocal(5, 2), SignTopK(k=2)),
    "slowmo with QSR": SlowMo(sync_every=QSR(2, 0.2, warmup_steps=4), overlap=1),
    "slowmo_sgp with QSR": SlowMo(Gossip(), sync_every=QSR(2, 0.2)),
    "bmuf in stages": BMUF(Stages({0: 1, 5: 3}), warmup_steps=4, block_momentum=0.5),
    "qprsgd_gossip in stages": QPRSGD(Stages({0: 1, 5: 3}), transport="gossip"),
    "diloco with a ramp": DiLoCo(4, outer_momentum=Ramp({0: 0.0, 8: 0.9, 16: 0.4}), fragments=2),
    "slowmo_sgp with a ramp": SlowMo(Gossip(), sync_every=4, slow_momentum=Ramp({0: 0.0, 12: 0.8})),
    "sparse_loco of few": SparseLoCo(4, 0.8, 0.9, ChunkedTopK(k=2, chunk=4)),
    "qprsgd with feedback": QPRSGD(3, Sign("l1"), "two_shot", error_feedback=True),
}

TAKES_ADAM = {"apmsqueeze", "des_loc"}
TAKES_PLAIN_SGD = {"sketched_sgd", "sensed_sgd"}


def configured(name):
    """A preset or variant, with a period that ends several times in these short runs."""
    if name in VARIANTS:
        return VARIANTS[name]
    small = {
        "apmsqueeze": APMSqueeze(6),
        "sketched_sgd": SketchedSGD(k=4, columns=8, uncompressed_below=5),
        "sensed_sgd": SensedSGD(measurements=0.5, sparsity=0.2, block=8, uncompressed_below=5),
    }
    algorithm = small.get(name, PRESETS[name])
    period = {"sync_every": 4} if getattr(algorithm, "sync_every", 1) > 4 else {}
    if isinstance(algorithm, SlowMo) and isinstance(algorithm.base, LocalSGD):
        period["base"] = None  # follows sync_every
    if isinstance(algorithm, SQuARM):
        period["compressor"] = SignTopK(k=2)
    return replace(algorithm, **period)


def optimizer_for(name):
    if name in TAKES_ADAM:
        return torch.optim.Adam
    return PLAIN if name in TAKES_PLAIN_SGD else MOMENTUM


ALL = [*PRESETS, *VARIANTS]


def training(workers, name, problem=CHANGING, dtype=torch.float64, start=None):
    return Training(workers, configured(name), problem, optimizer_for(name), dtype, start)


def saved(run):
    """What a checkpoint of a run holds, through a file and without unpickling anything but tensors."""
    file = io.BytesIO()
    torch.save([run.engine.shared_state(), run.engine.local_state(), run.optimizer.state_dict()], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def everywhere(workers, numbers):
    """Whether numbers are the same on all workers, to the last bit."""
    rows = workers.gather([float(number) for number in numbers])
    return all(row == rows[0] for row in rows)


# Workers of one process and of many -----------------------------------------------------------------------------------


@on_workers(2, each=ALL)
def test_two_workers_of_one_process_do_as_two_processes_to_the_last_bit(workers, case):
    with small_buckets(workers):
        own = training(workers, case).trajectory()

    def inside(one_of_two):
        with small_buckets(one_of_two):
            return training(one_of_two, case).trajectory()

    np.testing.assert_array_equal(together(in_process(2, TIMEOUT), inside)[workers.rank], own)


# Resuming -------------------------------------------------------------------------------------------------------------


@taking_turns(3, each=ALL)
def test_a_run_goes_on_bit_exactly_from_saved_state(workers, case):
    with small_buckets(workers):
        problem = replace(random_problem(7), rates=CHANGING.rates)
        goes_on_bit_exactly(lambda: training(workers, case, problem), at=10)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("before", "after"), [(3, 2), (1, 3)])
def test_another_number_of_workers_goes_on_from_the_consensus_with_the_shared_state(name, before, after):
    def save(workers):
        run = training(workers, name)
        for _ in range(9):
            run.step()
        run.engine.finish()
        return run.values(), saved(run)

    start, (shared, *_) = together(in_process(before, TIMEOUT), save)[0]

    def go_on(workers):
        run = training(workers, name, start=start)
        run.engine.load_shared_state(shared)
        run.steps = 9
        rows = run.trajectory()
        run.engine.finish()
        assert everywhere(workers, run.values())
        return rows

    for rows in together(in_process(after, TIMEOUT), go_on):
        assert np.isfinite(rows).all()
        assert np.abs(rows[-1] - start).max() > 1e-3


@pytest.mark.parametrize("name", ALL)
def test_workers_that_stay_go_on_as_they_would_from_a_checkpoint(name):
    """Engine.rebind from 3 workers to 2 is what two fresh workers make of the state that the three saved."""
    three, two = in_process(3, TIMEOUT), in_process(2, TIMEOUT)

    def leave_one(workers):
        run = training(workers, name)
        for _ in range(9):
            run.step()
        run.engine.rebind(two[workers.rank] if workers.rank < 2 else Workers())
        run.workers, start, state = run.engine.workers, run.values(), saved(run)
        return start, state, (run.trajectory() if workers.rank < 2 else None)

    rebound = together(three, leave_one)

    def resume(workers):
        start, (shared, _, inner), _ = rebound[workers.rank]
        run = training(workers, name, start=start)
        run.optimizer.load_state_dict(inner)
        run.engine.load_shared_state(shared)
        run.steps = 9
        return run.trajectory()

    for (_, _, rows), expected in zip(rebound[:2], together(in_process(2, TIMEOUT), resume), strict=True):
        np.testing.assert_array_equal(rows, expected)


@pytest.mark.parametrize("name", ALL)
def test_a_worker_that_joins_gets_model_and_state(name):
    def join(workers):
        run = training(Workers(), name)
        if workers.rank == 0:
            for _ in range(9):
                run.step()
        run.engine.rebind(workers)
        run.workers, run.steps = workers, 9
        assert everywhere(workers, run.values())
        rows = run.trajectory()
        run.engine.finish()
        assert everywhere(workers, run.values())
        return rows

    assert all(np.isfinite(rows).all() for rows in together(in_process(2, TIMEOUT), join))


# Uneven inputs --------------------------------------------------------------------------------------------------------


@taking_turns(2, 3, each=ALL)
def test_workers_with_fewer_steps_wait_and_all_end_with_one_model(workers, case):
    run = training(workers, case)
    run.engine.meet(Reason.EPOCH_START)
    for _ in range((19, 8, 0)[workers.rank]):
        run.step()
    with run.engine.consensus():
        assert everywhere(workers, run.values())
    run.engine.finish()
    assert everywhere(workers, run.values())
    assert np.isfinite(run.values()).all()


# Parameters that join -------------------------------------------------------------------------------------------------


@taking_turns(2, each=ALL)
def test_parameters_that_are_added_or_unfrozen_join_without_a_call(workers, case):
    first, frozen, late = (Parameter(torch.full((size,), 1.0, dtype=torch.float64)) for size in (6, 3, 4))
    frozen.requires_grad_(False)
    make = optimizer_for(case)
    optimizer = make([first, frozen], lr=0.1) if make is torch.optim.Adam else make([first, frozen])
    algorithm = configured(case)
    if getattr(algorithm, "fragments", 1) > 1:
        algorithm = replace(algorithm, fragments=1)
    engine = Engine(algorithm, [optimizer], workers)

    def step():
        for parameter in (first, frozen, late):
            parameter.grad = torch.full_like(parameter, 1.0 + workers.rank) if parameter.requires_grad else None
        engine.after_backward()
        optimizer.step()
        engine.after_step()

    step(), step(), step()
    assert frozen.tolist() == [1.0] * 3
    frozen.requires_grad_(True)
    optimizer.add_param_group({"params": [late], "lr": 0.2})
    for _ in range(8):
        step()
    engine.finish()
    for parameter in (first, frozen, late):
        assert everywhere(workers, parameter.tolist())
        assert parameter.max() < 1 or case in ("apmsqueeze", "sketched_sgd", "sensed_sgd")
    assert engine.units[0].layout.covers([[first, frozen], [late]])


# Other dtypes ---------------------------------------------------------------------------------------------------------


@taking_turns(2, each=list(product(ALL, (torch.float32, torch.bfloat16))))
def test_other_dtypes_train_and_end_equal(workers, case):
    name, dtype = case
    run = training(workers, name, dtype=dtype)
    run.trajectory()
    run.engine.finish()
    assert everywhere(workers, run.values())
    assert np.isfinite(run.values()).all()
    assert all(parameter.dtype == dtype for parameter in run.parameters)
