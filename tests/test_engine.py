"""The engine on workers of this process: what is averaged and when, consensus, uneven inputs, state, and its bill."""

import pickle

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from lightning_slowmo import BMUF, AllReduce, DiLoCo, Engine, LocalSGD, SlowMo, SyncError, Workers
from lightning_slowmo.communication import Header, Reason
from lightning_slowmo.communication.broadcast import broadcast_tensors
from tests.algorithms.training import CHANGING, Training, random_problem, same, small_buckets
from tests.on_workers import taking_turns


class Loop:
    """A plain PyTorch loop on a small network with BatchNorm, other data on each worker."""

    def __init__(self, workers, algorithm, **options):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2)).double()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.engine = Engine(algorithm, [self.optimizer], workers, module=self.model, **options)
        self.data = torch.Generator().manual_seed(workers.rank)

    def step(self, count=1):
        for _ in range(count):
            x = torch.randn(8, 4, dtype=torch.float64, generator=self.data)
            self.optimizer.zero_grad()
            self.model(x).square().mean().backward()
            self.engine.after_backward()
            self.engine.before_step()
            self.optimizer.step()
            self.engine.after_step()

    def values(self):
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def everywhere(workers, tensors) -> bool:
    """Whether tensors are the same on all workers, to the last bit."""
    rows = workers.gather(torch.cat([tensor.detach().double().flatten() for tensor in tensors]).tolist())
    return all(row == rows[0] for row in rows)


# Consensus ------------------------------------------------------------------------------------------------------------


@taking_turns(1, 2, 3)
def test_the_consensus_is_the_mean_and_leaving_it_restores_every_bit(workers):
    loop = Loop(workers, SlowMo(sync_every=4))
    loop.step(6)
    own = loop.values()
    rows = {key: torch.tensor(workers.gather(value.flatten().tolist())) for key, value in own.items()}
    with loop.engine.consensus():
        assert loop.engine.in_consensus
        for key, value in loop.values().items():
            expected = rows[key].mean(0) if value.is_floating_point() else rows[key][0]
            torch.testing.assert_close(value.flatten().double(), expected.double())
        assert everywhere(workers, loop.model.state_dict().values())
    assert not loop.engine.in_consensus
    assert equal(own, loop.values())
    assert (workers.size == 1) == everywhere(workers, loop.model.parameters())


@taking_turns(2)
def test_a_consensus_inside_a_consensus_changes_nothing_and_stays_until_the_outer_ends(workers):
    loop = Loop(workers, LocalSGD(4))
    loop.step(3)
    own = loop.values()
    with loop.engine.consensus():
        mean, meetings = loop.values(), workers.traffic.headers
        with loop.engine.consensus(Reason.SAVE):
            assert equal(mean, loop.values())
        assert loop.engine.in_consensus
        assert equal(mean, loop.values())
        assert workers.traffic.headers == meetings
    assert equal(own, loop.values())
    loop.engine.leave_consensus()
    assert equal(own, loop.values())


@taking_turns(2)
def test_training_is_bit_identical_with_and_without_visits_to_the_consensus(workers):
    for algorithm in (LocalSGD(4), SlowMo(sync_every=4), BMUF(4), DiLoCo(4)):
        visiting, straight = Loop(workers, algorithm), Loop(workers, algorithm)
        for _ in range(5):
            visiting.step(2)
            with visiting.engine.consensus():
                pass
        straight.step(10)
        assert equal(visiting.values(), straight.values())


@taking_turns(3)
def test_finishing_leaves_the_same_model_on_all_workers_in_the_middle_of_a_period(workers):
    loop = Loop(workers, SlowMo(sync_every=4))
    loop.step(6)
    assert not everywhere(workers, loop.model.parameters())
    loop.engine.finish()
    assert everywhere(workers, loop.model.state_dict().values())


@taking_turns(2)
def test_batchnorm_statistics_are_averaged_and_its_counters_come_from_rank_0(workers):
    loop = Loop(workers, LocalSGD(100))
    loop.step(3 + workers.rank)
    means = workers.gather(loop.model[1].running_mean.tolist())
    assert means[0] != means[1]
    with loop.engine.consensus():
        torch.testing.assert_close(loop.model[1].running_mean, torch.tensor(means, dtype=torch.float64).mean(0))
        assert loop.model[1].num_batches_tracked == 3
    assert loop.model[1].num_batches_tracked == 3 + workers.rank


# Inputs of different length -------------------------------------------------------------------------------------------


STREAMING = [LocalSGD(4, overlap=3), SlowMo(sync_every=4, overlap=1, fragments=2), DiLoCo(6, overlap=1, fragments=3)]


@taking_turns(2, 3, each=[SlowMo(sync_every=4), LocalSGD(5), BMUF(3), DiLoCo(7), AllReduce(), *STREAMING])
def test_workers_with_fewer_batches_wait_at_the_end_of_the_epoch_and_nobody_hangs(workers, case):
    loop = Loop(workers, case)
    for _ in range(2):
        loop.engine.meet(Reason.EPOCH_START)
        loop.step((23, 11, 0)[workers.rank])
        with loop.engine.consensus():
            assert everywhere(workers, loop.model.state_dict().values())
    loop.engine.finish()
    assert everywhere(workers, loop.model.state_dict().values())
    assert all(tensor.isfinite().all() for tensor in loop.model.parameters())


@taking_turns(2)
def test_a_worker_weighs_as_many_steps_as_it_took(workers):
    parameter = Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    engine = Engine(LocalSGD(100), [optimizer], workers)
    for _ in range((3, 1)[workers.rank]):  # rank 0 goes to 3 in three steps, rank 1 to 10 in one
        parameter.grad = torch.full_like(parameter, (-1.0, -10.0)[workers.rank])
        optimizer.step()
        engine.after_step()
    with engine.consensus():
        assert parameter.item() == pytest.approx((3 * 3 + 1 * 10) / 4)


# Peers' bugs ----------------------------------------------------------------------------------------------------------


@taking_turns(2)
def test_with_two_optimizers_and_an_even_period_both_are_averaged(workers):
    """One counter for all optimizers, as Lightning's averager has it, never averages the second."""
    for period in (2, 3, 4):
        nets = [Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(2)]
        optimizers = [torch.optim.SGD([net], lr=0.1) for net in nets]
        engine = Engine(LocalSGD(period), optimizers, workers)
        averaged = [0, 0]
        for _ in range(12):
            for index, (net, optimizer) in enumerate(zip(nets, optimizers, strict=True)):
                net.grad = torch.full_like(net, workers.rank + index + 1.0)
                optimizer.step()
                report = engine.after_step(index)
                averaged[index] += report is not None
                assert everywhere(workers, [net]) == (report is not None)
        assert averaged == [12 // period] * 2


@taking_turns(2)
def test_parameters_without_gradients_are_averaged_all_the_same(workers):
    """PyTorch's averager skips what zero_grad() has set to None."""
    parameter = Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    engine = Engine(LocalSGD(1), [optimizer], workers)
    parameter.data.fill_(workers.rank)
    optimizer.zero_grad()
    assert parameter.grad is None
    engine.after_step()
    assert parameter.tolist() == [0.5] * 3


@taking_turns(2)
def test_the_anchor_is_the_common_start_and_not_the_point_after_the_first_local_step(workers):
    """fairscale takes it too late, and its workers part at the second slow step."""
    parameter = Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    engine = Engine(SlowMo(sync_every=2, slow_momentum=0.5, inner_buffers="maintain"), [optimizer], workers)
    seen = []
    for _ in range(4):
        parameter.grad = torch.full_like(parameter, 0.1 * (1 + workers.rank))  # 0.15 on average
        optimizer.step()
        engine.after_step()
        seen.append(parameter.item())
    assert seen[1] == pytest.approx(1 - 0.3)
    assert seen[3] == pytest.approx(0.7 - (0.5 * 0.3 + 0.3))
    assert everywhere(workers, [parameter])


@taking_turns(2)
def test_the_pseudo_gradient_points_downhill(workers):
    """Trajectories of peers went uphill for months."""
    for algorithm in (SlowMo(sync_every=2), BMUF(2), BMUF(2, nesterov=True), DiLoCo(2)):
        parameter = Parameter(torch.tensor([3.0]))
        optimizer = torch.optim.SGD([parameter], lr=0.005)
        engine = Engine(algorithm, [optimizer], workers)
        for _ in range(16):
            before = parameter.item()
            optimizer.zero_grad()
            parameter.square().sum().backward()
            optimizer.step()
            engine.after_step()
            assert parameter.item() < before


@taking_turns(2)
def test_unequal_initial_models_become_equal_once_they_are_broadcast(workers):
    torch.manual_seed(workers.rank)
    model = nn.Linear(3, 2)
    assert not everywhere(workers, model.parameters())
    broadcast_tensors([parameter.detach() for parameter in model.parameters()], workers)
    engine = Engine(SlowMo(sync_every=1), [torch.optim.SGD(model.parameters(), lr=0.1)], workers)
    assert everywhere(workers, model.parameters())
    assert everywhere(workers, engine.units[0].anchor)


# Parameters that come later -------------------------------------------------------------------------------------------


# State ----------------------------------------------------------------------------------------------------------------


@taking_turns(2)
def test_state_saved_inside_the_consensus_is_the_workers_own(workers):
    loop, again = Loop(workers, SlowMo(sync_every=4)), Loop(workers, SlowMo(sync_every=4))
    loop.step(6)
    own = loop.values()
    with loop.engine.consensus(Reason.SAVE):
        state = loop.engine.local_state()
        again.engine.load_local_state(state)
    assert equal(again.values(), own)


@taking_turns(2)
def test_shared_state_is_equal_on_all_workers(workers):
    training = Training(workers, SlowMo(sync_every=4), CHANGING)
    for _ in range(10):
        training.step()
    slow = training.engine.shared_state()["units"][0]["slow"]
    assert everywhere(workers, [*slow["anchor"], *slow["momentum"]])


def test_state_of_another_model_is_refused():
    def engine(size):
        return Engine(SlowMo(), [torch.optim.SGD([Parameter(torch.zeros(size))], lr=0.1)], Workers())

    with pytest.raises(ValueError, match="anchor does not fit"):
        engine(3).load_shared_state(engine(4).shared_state())


# The bill -------------------------------------------------------------------------------------------------------------


@taking_turns(2, 3, 4)
def test_a_sync_is_one_header_and_one_all_reduce_per_bucket_and_a_step_without_one_is_nothing(workers):
    with small_buckets(workers):
        training = Training(workers, SlowMo(sync_every=4), random_problem(3))
        buckets = training.engine.units[0].layout.buckets
        assert len(buckets) > 3
        n, header = workers.size, 8 * len(Header(Reason.SYNC, pending=(0,)).numbers())
        payload = sum(2 * (n - 1) * bucket.numel * 8 // n for bucket in buckets)
        for step in range(1, 9):
            before = workers.traffic.copy()
            total = training.engine.total
            training.step()
            used = workers.traffic - before
            if step % 4:
                assert used == type(used)()
                assert training.engine.total == total
            else:
                assert (used.headers, used.collectives) == (1, len(buckets))
                assert used.sent == used.received == payload + (n - 1) * header
                assert training.engine.total.bytes_sent - total.bytes_sent == used.sent
        assert training.engine.total.count == 2


@taking_turns(2)
def test_sixty_four_steps_of_period_sixteen_are_four_syncs_and_an_end(workers):
    parameter = Parameter(torch.zeros(10))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    engine = Engine(SlowMo(sync_every=16), [optimizer], workers)
    start = workers.traffic.copy()
    reports = []
    for _ in range(64):
        parameter.grad = torch.ones(10)
        optimizer.step()
        reports.append(engine.after_step())
    engine.finish()
    used = workers.traffic - start
    assert [step for step, report in enumerate(reports, 1) if report] == [16, 32, 48, 64]
    assert (used.headers, used.collectives) == (4 + 1, 4 + 1)


@taking_turns(2)
def test_the_report_tells_drift_relative_to_the_mean(workers):
    parameter = Parameter(torch.zeros(4))
    engine = Engine(LocalSGD(1), [torch.optim.SGD([parameter], lr=0.1)], workers)
    parameter.data.fill_((1.0, 3.0)[workers.rank])
    report = engine.after_step()
    assert report.drift == pytest.approx(0.5)  # 1 from a mean of 2
    assert report.seconds > 0
    assert report.metrics()["sync/drift"] == report.drift
    parameter.data.fill_(2.0)
    assert engine.after_step().drift == 0


@taking_turns(2)
def test_a_wish_to_stop_reaches_everybody_with_the_next_header(workers):
    loop = Loop(workers, LocalSGD(2))
    loop.engine.stop = workers.rank == 1
    loop.step()
    assert loop.engine.stop == (workers.rank == 1)
    loop.step()
    assert loop.engine.stop
    assert not loop.engine.must_terminate


# Workers that do not fit together -------------------------------------------------------------------------------------


@taking_turns(2, 3)
def test_unequal_algorithms_are_refused_on_every_rank(workers):
    parameter = Parameter(torch.zeros(3))
    last = workers.size - 1
    with pytest.raises(SyncError, match=rf"The algorithm differs between workers: rank 0 .*rank {last} .*same arg"):
        Engine(LocalSGD(7 if workers.rank == last else 8), [torch.optim.SGD([parameter], lr=0.1)], workers)


@taking_turns(2)
def test_unequal_models_are_refused_on_every_rank(workers):
    rank = workers.rank
    pairs = [
        [Parameter(torch.zeros(3 + rank))],
        [Parameter(torch.zeros(3), requires_grad=rank == 0)],
        [Parameter(torch.zeros(3, dtype=(torch.float32, torch.float64)[rank]))],
        [Parameter(torch.zeros(3)) for _ in range(1 + rank)],
    ]
    for parameters in pairs:
        with pytest.raises(SyncError, match=r"The model differs between workers: rank 0 .*rank 1"):
            Engine(SlowMo(), [torch.optim.SGD(parameters, lr=0.1)], workers)


@taking_turns(2)
def test_one_workers_nan_is_an_error_on_all_or_is_left_out(workers):
    def nan_on_rank_1(policy):
        parameter = Parameter(torch.full((3,), 2.0))
        engine = Engine(LocalSGD(1), [torch.optim.SGD([parameter], lr=0.1)], workers, on_nonfinite=policy)
        if workers.rank == 1:
            parameter.data[1] = float("nan")
        engine.after_step()
        return parameter.tolist()

    with pytest.raises(SyncError, match="rank 1 are NaN or infinite"):
        nan_on_rank_1("raise")
    assert nan_on_rank_1("skip") == [2.0] * 3


def test_an_engine_alone_needs_no_processes():
    training = Training(Workers(), SlowMo(sync_every=4), CHANGING)
    same(training.trajectory()[-1], training.values())
    assert pickle.loads(pickle.dumps(training.engine.algorithm)) == training.engine.algorithm
    assert training.engine.total.count == len(CHANGING.rates) // 4
    assert training.engine.total.bytes_sent == 0
