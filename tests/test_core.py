"""The core of a strategy in plain loops: no Trainer, no Lightning, no DistributedDataParallel."""

import pickle
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from lightning_slowmo import BMUF, LocalSGD, SlowMo, SyncError
from lightning_slowmo.communication import Reason
from lightning_slowmo.core import StrategyCore
from tests.harness import run

CPU = torch.device("cpu")


def model(seed=0, width=3):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.BatchNorm1d(width), torch.nn.Linear(width, 1))


def bits(module):
    return [tensor.clone() for tensor in module.state_dict().values()]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


class Script:
    """What a user's script does with the core, on one rank."""

    def __init__(self, rank, algorithm):
        self.rank, self.steps = rank, 0
        self.module = model(seed=rank)  # different on purpose
        self.core = StrategyCore(algorithm)
        self.core.make_groups(0, rank, CPU)
        self.core.start_equal(self.module)
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=0.05, momentum=0.9)
        self.core.make_engine([self.optimizer], self.module)
        self.core.training = True

    def train(self, steps):
        for _ in range(steps):
            generator = torch.Generator().manual_seed(10 * self.steps + self.rank)
            inputs = torch.randn(8, 4, generator=generator)
            loss = (self.module(inputs) - inputs.sum(1, keepdim=True)).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.core.running.after_step()
            self.steps += 1
        return self

    def save(self, path):
        with self.core.consensus(Reason.SAVE):
            weights = {name: value.clone() for name, value in self.module.state_dict().items()}
        checkpoint = {"weights": weights, "step": self.steps, "optimizer": self.optimizer.state_dict()}

        def write():
            if self.rank == 0:
                torch.save(checkpoint, path)

        self.core.save(checkpoint, path, write, ["optimizer"])
        return weights

    def resume(self, path):
        checkpoint = torch.load(path, weights_only=True)
        restored = self.core.load(checkpoint, path)
        assert restored.warning is None
        self.module.load_state_dict(checkpoint["weights"])
        self.optimizer.load_state_dict(restored.entries["optimizer"])
        self.core.restore(restored)
        self.steps = checkpoint["step"]
        return self


def save_and_resume(rank, algorithm, path):
    script = Script(rank, algorithm).train(4)  # in the middle of a period
    own = bits(script.module)
    weights = script.save(path)
    assert same(own, bits(script.module))
    script.train(5)
    again = Script(rank, algorithm).resume(path)
    assert same(own, bits(again.module))
    again.train(5)
    script.core.running.finish()
    again.core.running.finish()
    return own, list(weights.values()), bits(script.module), bits(again.module), script.core.report.count


@pytest.mark.processes
@pytest.mark.parametrize("algorithm", [SlowMo(sync_every=3), BMUF(sync_every=3), LocalSGD(3)], ids=lambda a: a.kind)
def test_a_plain_loop_saves_the_consensus_and_resumes_bit_exactly(tmp_path, algorithm):
    first, second = run(2, save_and_resume, algorithm, str(tmp_path / "model.ckpt"))
    assert not same(first[0], second[0])  # else there is nothing to agree on
    assert same(first[1], second[1])
    assert torch.allclose(first[1][0], (first[0][0] + second[0][0]) / 2, atol=1e-7)
    for results in (first, second):
        assert same(results[2], results[3])
        assert results[4] == 3
    assert same(first[2], second[2])


def start_from_different_models(rank):
    equal = StrategyCore()
    equal.make_groups(0, rank, CPU)
    groups = equal.workers
    equal.make_groups(0, rank, CPU)
    module = model(seed=rank)
    equal.start_equal(module)
    with pytest.raises(SyncError, match=r"The model differs between workers: .* Build the same model on every rank"):
        equal.start_equal(model(width=3 + rank))
    return equal.workers is groups, bits(module)


@pytest.mark.processes
def test_all_processes_start_from_rank_0_s_model_or_learn_that_theirs_differs():
    first, second = run(2, start_from_different_models)
    assert first[0]
    assert second[0]
    assert same(first[1], second[1])
    assert same(first[1], bits(model(seed=0)))


def meet_and_hold_the_consensus(rank):
    script = Script(rank, LocalSGD(100)).train(2)
    own, core = bits(script.module), script.core
    with core.consensus():
        core.meet(Reason.BROADCAST)
        held = bits(script.module)
    assert same(own, bits(script.module))
    core.meet(Reason.BARRIER)
    core.training = False
    if rank == 0:
        core.meet(Reason.BARRIER)  # outside training nobody is waited for
    with core.consensus():
        assert same(own, bits(script.module))
    return own, held


@pytest.mark.processes
def test_the_consensus_is_held_in_its_context_alone():
    first, second = run(2, meet_and_hold_the_consensus)
    assert not same(first[0], second[0])
    assert same(first[1], second[1])


def meet_for_different_reasons_in_the_consensus(rank):
    core = Script(rank, LocalSGD(100)).train(2).core
    core.enter_consensus(Reason.CONSENSUS)
    busy = core.meet if rank == 0 else core.leave_consensus
    with pytest.raises(SyncError) as raised:
        busy(Reason.BROADCAST if rank == 0 else Reason.CONSENSUS)
    return str(raised.value)


@pytest.mark.processes
def test_one_that_still_communicates_inside_the_consensus_while_others_leave_is_named():
    for text in run(2, meet_for_different_reasons_in_the_consensus):
        assert "The workers came together for different reasons: rank 0 broadcast, rank 1 consensus" in text


def two_levels(rank):
    core = StrategyCore(SlowMo(sync_every=2), workers_per_node=2)
    assert core.node_group is None
    core.make_groups(rank // 2, rank % 2, CPU)
    return dist.get_process_group_ranks(core.node_group), core.workers.rank, core.workers.size, core.everyone.size


@pytest.mark.processes
def test_nodes_share_gradients_and_places_of_nodes_exchange_parameters():
    assert run(4, two_levels) == [([0, 1], 0, 2, 4), ([0, 1], 0, 2, 4), ([2, 3], 1, 2, 4), ([2, 3], 1, 2, 4)]


def fail_on_rank_0(rank):
    script = Script(rank, LocalSGD(4))
    if rank == 0:
        script.core.report_failure(ValueError("the disk is full"))
        assert not script.core.training
        return None
    with pytest.raises(SyncError) as raised:
        script.train(4)
    return str(raised.value)


@pytest.mark.processes
def test_the_others_learn_why_a_worker_failed():
    assert "rank 0 failed: ValueError: the disk is full" in run(2, fail_on_rank_0)[1]


def pickle_while_connected(rank):
    core = Script(rank, SlowMo(sync_every=3)).core
    copy = pickle.loads(pickle.dumps(core))
    return copy.engine, copy.workers.size, copy.training, core.engine is not None, core.workers.size, copy.algorithm


@pytest.mark.processes
def test_options_are_pickled_and_connections_are_not():
    for result in run(2, pickle_while_connected):
        assert result == (None, 1, False, True, 2, SlowMo(sync_every=3))
    core = StrategyCore("bmuf", timedelta(seconds=3), "skip", 2, True, "cpu")
    assert vars(pickle.loads(pickle.dumps(core))) | {"workers": 0, "everyone": 0} == vars(core) | {
        "workers": 0,
        "everyone": 0,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": "slomo"}, "slomo"),
        ({"algorithm": SlowMo}, "algorithm must be a configuration, not a class: write SlowMo"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite must be 'raise' or 'skip', got 'ignore'"),
        ({"algorithm": 3}, "algorithm must be the name of a preset"),
        ({"workers_per_node": 0}, "workers_per_node must be"),
    ],
)
def test_invalid_options_are_refused_before_anything_starts(options, message):
    with pytest.raises(ValueError, match=message):
        StrategyCore(**options)


def test_without_an_engine_the_error_says_what_is_missing():
    core = StrategyCore()
    assert core.report is None
    core.meet(Reason.BARRIER)  # nobody is waited for
    with pytest.raises(RuntimeError, match="no engine before the model and its optimizers are set up"):
        core.restore(type("R", (), {"shared": {}, "local": None})())
