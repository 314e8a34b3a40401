"""Optimizers of every kind under an outer loop: what is reset, maintained, averaged, and saved."""

import copy
import random
import warnings

import pytest
import torch
from torch.nn import Parameter
from torch.optim.lr_scheduler import OneCycleLR

from lightning_slowmo import Engine, LocalSGD, SlowMo, Workers
from lightning_slowmo.algorithms import inner_buffers
from lightning_slowmo.algorithms.base import learning_rates
from lightning_slowmo.algorithms.iterates import Iterates
from lightning_slowmo.algorithms.optimizer_state import holders_of_state, roles, states, tensors
from tests.algorithms.optimizers import (
    ALL,
    MATRICES_ONLY,
    OTHERS,
    TORCHS,
    EightBitMomentum,
    Lion,
    Lookahead,
    MasterWeights,
    MuonBesideAdam,
    ScheduleFreeSGD,
    parameters,
    take_step,
)
from tests.on_workers import taking_turns

EVERY = 3


class Run:
    """An optimizer under SlowMo, towards noisy targets that differ by worker."""

    def __init__(self, name, algorithm, workers=None, dtype=torch.float32):
        self.workers = workers or Workers()
        self.parameters = parameters(name, dtype)
        self.optimizer = ALL[name](self.parameters)
        self.engine = Engine(algorithm, [self.optimizer], self.workers)
        self.steps = 0

    def step(self):
        generator = torch.Generator().manual_seed(100 * self.workers.rank + self.steps)
        targets = [3 + torch.randn(p.shape, generator=generator).to(p.dtype) for p in self.parameters]
        self.engine.before_step()
        take_step(self.optimizer, self.parameters, targets)
        self.engine.after_step()
        self.steps += 1
        return self

    def steps_to(self, steps):
        while self.steps < steps:
            self.step()
        return self

    def values(self):
        return [p.detach().clone() for p in self.parameters]

    def entries(self, *wanted):
        """The tensors in the optimizer's state that have one of these roles, by a name that tells them apart."""
        known = roles(self.optimizer)
        return {
            (index, place, name, number): tensor.clone()
            for index, parameter in enumerate(self.parameters)
            for place, state in states(holders_of_state(self.optimizer), parameter)
            for name, value in state.items()
            if known.of(0, parameter)[place, name].role in wanted
            for number, tensor in enumerate(tensors(value))
        }

    def saved(self):
        saved = self.optimizer.state_dict(), self.engine.shared_state(), self.engine.local_state(), self.values()
        return copy.deepcopy(saved)

    def load(self, saved):
        optimizer, shared, local, values = copy.deepcopy(saved)
        with torch.no_grad():
            for parameter, value in zip(self.parameters, values, strict=True):
                parameter.copy_(value)
        self.optimizer.load_state_dict(optimizer)
        self.engine.load_shared_state(shared)
        self.engine.load_local_state(local)


def equal(these, those):
    return len(these) == len(those) and all(torch.equal(a, b) for a, b in zip(these, those, strict=True))


def far(own):
    return sum(float((p.detach().float() - 3).square().sum()) for p in own)


# Every optimizer ------------------------------------------------------------------------------------------------------


def test_torchs_optimizers_are_all_here():
    named = {name.split()[0] for name in TORCHS}
    assert {"SGD", "Adam", "RMSprop", "Rprop", "ASGD", "Adafactor", "LBFGS", "Muon", "SparseAdam"} <= named
    assert {"SGD fused", "Adam fused", "Adam foreach", "SGD tensor lr"} <= set(TORCHS)


@pytest.mark.parametrize("treatment", ["auto", "reset", "maintain", "average"])
@pytest.mark.parametrize("name", TORCHS)
def test_every_optimizer_trains_under_slow_momentum_and_goes_on_bit_for_bit(name, treatment):
    algorithm = SlowMo(sync_every=EVERY, inner_buffers=treatment)
    run = Run(name, algorithm)
    before = far(run.parameters)
    run.steps_to(EVERY + 2)
    saved = run.saved()
    run.steps_to(3 * EVERY + 1)
    assert run.engine.total.count == 3
    assert all(p.isfinite().all() for p in run.parameters)
    assert far(run.parameters) < before
    resumed = Run(name, algorithm)
    resumed.load(saved)
    resumed.steps = EVERY + 2
    resumed.steps_to(3 * EVERY + 1)
    assert equal(run.values(), resumed.values())


@pytest.mark.parametrize("name", OTHERS)
def test_optimizers_of_other_packages_train_under_slow_momentum(name):
    run = Run(name, SlowMo(sync_every=EVERY))
    before = far(run.parameters)
    run.steps_to(3 * EVERY + 1)
    assert all(p.isfinite().all() for p in run.parameters)
    assert far(run.parameters) < before


def flat(tensors):
    return [float(x) for tensor in tensors for x in tensor.double().ravel()]


@taking_turns(2)
def test_parameters_and_their_copies_are_equal_after_a_sync_and_other_buffers_stay(workers):
    for name in ALL:
        run = Run(name, SlowMo(sync_every=EVERY, slow_momentum=0.5, inner_buffers="maintain"), workers)
        run.steps_to(2 * EVERY)
        copies, kept = run.entries("iterate"), run.entries("momentum", "adapts")
        rows = workers.gather(flat(run.values()) + flat(copies.values()))
        assert rows[0] == rows[1], name
        assert copies or kept, name
        if kept:
            norms = workers.gather([sum(map(abs, flat(kept.values())))])
            assert norms[0] != norms[1], name


@taking_turns(2)
def test_averaged_buffers_are_equal_after_a_sync(workers):
    # Not codes; and each worker of LBFGS has as many curvature pairs as it found.
    for name in sorted(ALL.keys() - {"EightBitMomentum", "LBFGS"}):
        run = Run(name, SlowMo(sync_every=EVERY, inner_buffers="average"), workers).steps_to(EVERY)
        own = run.entries("momentum", "adapts")
        rows = workers.gather([sum(map(abs, flat([own[key]]))) for key in sorted(own)])
        assert rows[0] == rows[1], name
        assert any(rows[0]) == bool(own), name


# The paper's choice ---------------------------------------------------------------------------------------------------

MOMENTUM_ALONE = {"SGD", "Muon", "Lion", "SAM", "Lookahead"}
"""Of SAM and Lookahead it is the optimizer that they hold which has the momentum."""


@pytest.mark.parametrize("name", ALL)
def test_auto_resets_momentum_alone_and_maintains_what_adapts_step_sizes(name):
    run = Run(name, LocalSGD(100)).steps_to(4)
    before, copies = run.entries("counter", "momentum", "adapts"), run.entries("iterate")
    inner_buffers.treat("auto", run.optimizer, run.workers)
    after = run.entries("counter", "momentum", "adapts")
    if name.split()[0] in MOMENTUM_ALONE:
        assert before
        assert not any(value.any() for value in after.values())
    else:
        assert after.keys() == before.keys()
        assert all(torch.equal(value, before[key]) for key, value in after.items())
    assert all(torch.equal(value, copies[key]) for key, value in run.entries("iterate").items())
    run.step()
    assert all(p.isfinite().all() for p in run.parameters)


@pytest.mark.parametrize("name", ALL)
def test_the_step_after_a_sync_is_not_longer_than_those_before(name):
    own = parameters(name)
    optimizer = ALL[name](own)
    roles(optimizer)  # before the first step, as the engine does

    def length():
        before = [p.detach().clone() for p in own]
        take_step(optimizer, own, [p + 1 for p in before])  # a gradient of -1 everywhere
        return max(float((p.detach() - b).abs().max()) for p, b in zip(own, before, strict=True))

    usual = max([length() for _ in range(40)][-2:])
    inner_buffers.treat("auto", optimizer, Workers())
    assert max(length(), length()) <= 1.5 * usual


def test_groups_of_one_optimizer_are_decided_by_themselves():
    matrix, vector = parameters("ScheduleFreeSGD")[:2]
    optimizer = MuonBesideAdam([{"params": [matrix], "matrices": True}, {"params": [vector]}])
    for _ in range(3):
        take_step(optimizer, [matrix, vector], [torch.zeros_like(matrix), torch.zeros_like(vector)])
    inner_buffers.treat("auto", optimizer, Workers())
    assert not optimizer.state[matrix]
    assert optimizer.state[vector]["step"] == 3
    joined = Parameter(torch.ones(3, 3))
    optimizer.add_param_group({"params": [joined], "matrices": True})
    take_step(optimizer, [matrix, vector, joined], [torch.zeros_like(p) for p in (matrix, vector, joined)])
    inner_buffers.treat("auto", optimizer, Workers(), but={id(matrix)})
    assert optimizer.state[matrix]
    assert not optimizer.state[joined]


def test_quantized_buffers_are_not_averaged():
    run = Run("EightBitMomentum", SlowMo(sync_every=EVERY, inner_buffers="average")).steps_to(EVERY - 1)
    with pytest.raises(ValueError, match="cannot average 'codes' of EightBitMomentum, which is quantized"):
        run.step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.complex64])
def test_roles_do_not_depend_on_the_dtype(dtype):
    expected = {"SGD": {"momentum"}, "Adam": {"counter", "momentum", "adapts"}, "ScheduleFreeSGD": {"iterate"}}
    for name, found in expected.items():
        own = parameters(name, dtype)
        for parameter in own:
            assert {entry.role for entry in roles(ALL[name](own)).of(0, parameter).values()} == found, name


def test_a_rate_that_is_zero_when_training_begins_hides_nothing():
    optimizer = torch.optim.Rprop(parameters("Rprop"), lr=0.0)
    assert roles(optimizer).of(0, optimizer.param_groups[0]["params"][0])[0, "step_size"].role == "adapts"


def test_an_optimizer_made_for_graphs_of_a_gpu_is_tried_on_the_cpu_too():
    own = parameters("Adam")
    plain, capturable = (torch.optim.Adam(own, capturable=capturable) for capturable in (False, True))
    assert roles(plain).of(0, own[0]) == roles(capturable).of(0, own[0])
    assert roles(capturable).any("momentum")
    assert capturable.param_groups[0]["capturable"]


def test_a_state_built_in_the_constructor_is_reset_in_place():
    own = parameters("Lookahead")
    optimizer = Lookahead(own)
    roles(optimizer)  # before the first step, as the engine does
    for _ in range(3):
        take_step(optimizer, own, [torch.zeros_like(p) for p in own])
    slow = [optimizer.state[parameter]["slow"].clone() for parameter in own]
    inner_buffers.reset(optimizer)
    assert equal(slow, [optimizer.state[parameter]["slow"] for parameter in own])
    for parameter in own:
        assert not optimizer.fast.state[parameter]["momentum_buffer"].any()


class SumsInConstructor(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})
        for p in self.param_groups[0]["params"]:
            self.state[p]["sum"] = torch.full_like(p, 0.5)

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            p.addcdiv_(p.grad, self.state[p]["sum"].add_(p.grad.square()).sqrt(), value=-0.1)


def test_step_sizes_whose_first_value_is_not_known_are_not_reset():
    own = parameters("SGD")
    optimizer = SumsInConstructor(own)
    with pytest.raises(ValueError, match="builds 'sum' in its constructor, so it cannot be reset"):
        inner_buffers.reset(optimizer)
    inner_buffers.treat("auto", optimizer, Workers())
    assert all((optimizer.state[p]["sum"] == 0.5).all() for p in own)


# The trial ------------------------------------------------------------------------------------------------------------


def test_a_trial_leaves_no_trace():
    own = parameters("SGD")
    optimizer = torch.optim.SGD(own, lr=0.1, momentum=0.9)
    scheduler = OneCycleLR(optimizer, 0.1, total_steps=10)  # puts its own function in the place of step
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    before, groups = [p.detach().clone() for p in own], copy.deepcopy(optimizer.state_dict())
    numbers = torch.get_rng_state(), random.getstate()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not roles(optimizer).failure
        scheduler.last_epoch = 0
    assert not called
    assert not optimizer.state
    assert optimizer.state_dict() == groups
    assert equal(before, own)
    assert all(p.grad is None for p in own)
    assert torch.equal(numbers[0], torch.get_rng_state())
    assert numbers[1] == random.getstate()


class Stubborn(torch.optim.SGD):
    def step(self, closure=None):
        if len(self.param_groups[0]["params"][0]) != 4:
            raise RuntimeError("made for four rows")
        super().step(closure)


def test_an_optimizer_that_cannot_be_tried_is_maintained_with_a_warning():
    own = parameters("SGD")
    optimizer = Stubborn(own, lr=0.1, momentum=0.9)
    with pytest.warns(UserWarning, match="Stubborn keeps in its state is not known.*made for four rows.*maintains"):
        engine = Engine(SlowMo(sync_every=1), [optimizer], Workers())
    take_step(optimizer, own, [torch.zeros_like(p) for p in own])
    engine.after_step()
    assert all(optimizer.state[p]["momentum_buffer"].any() for p in own)


# Learning rates -------------------------------------------------------------------------------------------------------


def test_a_rate_may_be_none_a_tensor_or_absent():
    own = parameters("SGD")
    optimizer = torch.optim.SGD([{"params": [p]} for p in own], lr=0.1)
    for group, rate in zip(optimizer.param_groups, (None, torch.tensor([0.25]), 0.5), strict=True):
        group["lr"] = rate
    SlowMo().bind(optimizer, Workers())
    assert learning_rates(optimizer) == [1.0, 0.25, 0.5]
    del optimizer.param_groups[2]["lr"]
    assert learning_rates(optimizer) == [1.0, 0.25, 1.0]


# Copies of the parameters ---------------------------------------------------------------------------------------------


@taking_turns(2)
def test_local_averaging_makes_the_copy_the_mean_of_the_copies(workers):
    run = Run("ScheduleFreeSGD", LocalSGD(EVERY), workers).steps_to(EVERY - 1)
    alone = Run("ScheduleFreeSGD", LocalSGD(100), Workers())
    alone.workers = workers  # its targets, without its syncs
    alone.steps_to(EVERY)
    run.step()
    rows = torch.tensor(workers.gather(flat(alone.entries("iterate").values())))
    torch.testing.assert_close(torch.tensor(flat(run.entries("iterate").values())), rows.mean(0), rtol=1e-5, atol=1e-5)
    assert not torch.equal(rows[0], rows[1])


@taking_turns(2)
def test_a_slow_update_moves_the_copies_with_the_parameters(workers):
    plain = Run("ScheduleFreeSGD", LocalSGD(EVERY), workers).steps_to(EVERY)
    slow = Run("ScheduleFreeSGD", SlowMo(sync_every=EVERY, slow_momentum=0.0, slow_lr=0.5), workers).steps_to(EVERY)
    for (key, z), shifted in zip(plain.entries("iterate").items(), slow.entries("iterate").values(), strict=True):
        y, moved = plain.parameters[key[0]].detach(), slow.parameters[key[0]].detach()
        assert (moved - y).abs().max() > 1e-2
        torch.testing.assert_close(shifted - z, moved - y)


@taking_turns(2)
def test_master_weights_do_not_undo_a_sync(workers):
    run = Run("MasterWeights", LocalSGD(EVERY), workers, torch.bfloat16).steps_to(EVERY)
    rows = workers.gather(flat(run.entries("iterate").values()))
    assert rows[0] == rows[1]
    assert any(master.dtype is torch.float32 for master in run.entries("iterate").values())
    run.optimizer.param_groups[0]["lr"] = 0.0
    run.step()  # writes the master weights into the parameters
    rows = workers.gather(flat(run.values()))
    assert rows[0] == rows[1]


@taking_turns(2, each=["reset", "auto", "average"])
def test_copies_are_equal_whatever_the_treatment_of_buffers(workers, treatment):
    run = Run("Lookahead", SlowMo(sync_every=EVERY, inner_buffers=treatment), workers).steps_to(2 * EVERY)
    rows = workers.gather(flat(run.values()) + flat(run.entries("iterate").values()))
    assert rows[0] == rows[1]
    for (index, *_), slow in run.entries("iterate").items():
        assert (slow - run.parameters[index].detach()).abs().max() < 0.5


@taking_turns(2)
def test_complex_copies_meet_too(workers):
    run = Run("ScheduleFreeSGD", LocalSGD(100), workers, torch.complex64).steps_to(EVERY)
    with run.engine.units[0].iterates.following(workers) as average_offsets, torch.no_grad():
        average_offsets([1.0, 1.0])
        for parameter in run.parameters:
            parameter.zero_()
    copies = run.entries("iterate")
    rows = workers.gather(flat(torch.view_as_real(z) for z in copies.values()))
    assert len(copies) == 3
    assert rows[0] == rows[1]
    assert any(rows[0])


@taking_turns(2)
def test_a_worker_that_has_not_stepped_a_parameter_yet_counts_as_its_copy(workers):
    own = parameters("ScheduleFreeSGD")
    optimizer = ScheduleFreeSGD(own)
    iterates = Iterates(optimizer)
    if workers.rank == 0:
        take_step(optimizer, own, [torch.zeros_like(p) for p in own])
    expected = [(z - p.detach()) / 2 for z, p in zip(iterates.tensors(), own, strict=workers.rank == 0)]
    with iterates.following(workers) as average_offsets, torch.no_grad():
        average_offsets([1.0, 1.0])
        for parameter in own:
            parameter.fill_(2.0)
    assert len(iterates.tensors()) == (len(own) if workers.rank == 0 else 0)
    for z, offset in zip(iterates.tensors(), expected, strict=True):
        torch.testing.assert_close(z, 2 + offset)


@taking_turns(2)
def test_a_delayed_average_takes_the_copies_along(workers):
    run = Run("ScheduleFreeSGD", LocalSGD(EVERY, overlap=1), workers).steps_to(EVERY)
    bare = Run("ScheduleFreeSGD", LocalSGD(100), Workers())
    bare.workers = workers
    bare.steps_to(EVERY + 1)
    run.step()  # at its end, what was sent arrives
    for (key, z), there in zip(bare.entries("iterate").items(), run.entries("iterate").values(), strict=True):
        moved = run.parameters[key[0]].detach() - bare.parameters[key[0]].detach()
        assert moved.abs().max() > 1e-3
        torch.testing.assert_close(there - z, moved, rtol=1e-4, atol=1e-5)


@taking_turns(2)
def test_the_end_of_training_makes_the_copies_equal(workers):
    run = Run("ScheduleFreeAdamW", LocalSGD(EVERY), workers).steps_to(EVERY + 1)
    run.engine.finish()
    rows = workers.gather(flat(run.values()) + flat(run.entries("iterate").values()))
    assert rows[0] == rows[1]


def test_an_optimizer_without_copies_has_none():
    for name in ("SGD", "Adam", "Rprop"):
        assert not Iterates(ALL[name](parameters(name)))
    assert str(Iterates(Lookahead(parameters("Lookahead")))) == "3 of 'slow'"
    assert not Iterates(Lion(parameters("Lion")))
    assert not Iterates(EightBitMomentum(parameters("EightBitMomentum")))
    assert Iterates(MasterWeights(parameters("MasterWeights")))


def test_matrices_only_is_what_it_says():
    assert {"Muon", "SparseAdam"} == MATRICES_ONLY
    assert not OTHERS.keys() & TORCHS.keys()
