"""Configurations: values that are checked, compared, pickled and printed."""

import math
import pickle
from dataclasses import FrozenInstanceError
from functools import partial

import pytest
import torch

import lightning_slowmo
from lightning_slowmo import BMUF, PRESETS, AllReduce, DiLoCo, Engine, Gossip, LocalSGD, SlowMo, Workers
from lightning_slowmo.algorithms import inner_buffers
from lightning_slowmo.algorithms.slow_momentum import BASES

NO_PERIOD = [0, -1, 1.5, 2.0, True, "12", None]
NO_MOMENTUM = [-0.1, 1, 1.0, math.nan, math.inf, "0.5", True]
NO_RATE = [-0.1, -math.inf, math.inf, math.nan, "1", True, None]

BAD = [
    *[(kind, "sync_every", value) for kind in (LocalSGD, SlowMo, BMUF, DiLoCo) for value in NO_PERIOD],
    *[(SlowMo, "slow_momentum", value) for value in [*NO_MOMENTUM, None]],
    *[(BMUF, "block_momentum", value) for value in NO_MOMENTUM],
    *[(DiLoCo, "outer_momentum", value) for value in [*NO_MOMENTUM, None]],
    *[(SlowMo, "slow_lr", value) for value in NO_RATE],
    *[(BMUF, "block_lr", value) for value in NO_RATE],
    *[(DiLoCo, "outer_lr", value) for value in NO_RATE],
    *[(BMUF, "warmup_steps", value) for value in (-1, 0.5, True)],
    *[(kind, "inner_buffers", value) for kind in (SlowMo, BMUF) for value in ("keep", "", None)],
    (DiLoCo, "outer_optimizer", 0.1),
]

GOOD = [
    LocalSGD(),
    LocalSGD(1),
    SlowMo(),
    SlowMo(LocalSGD(3), sync_every=12, slow_momentum=0, slow_lr=0, inner_buffers="average", average=False),
    SlowMo(AllReduce()),
    BMUF(block_momentum=0.9, nesterov=True, warmup_steps=500),
    DiLoCo(),
    AllReduce(),
]


@pytest.mark.parametrize(("kind", "field", "value"), BAD, ids=lambda part: getattr(part, "__name__", str(part)))
def test_bad_values_are_refused_by_name_and_value(kind, field, value):
    with pytest.raises(ValueError, match=rf"^{field} must .*got {value!r}"):
        kind(**{field: value})


@pytest.mark.parametrize("algorithm", GOOD, ids=repr)
def test_configurations_are_values(algorithm):
    twin = pickle.loads(pickle.dumps(algorithm))
    assert twin == algorithm
    assert hash(twin) == hash(algorithm)
    assert repr(twin) == repr(algorithm)  # what the workers compare
    assert [other for other in GOOD if other == algorithm] == [algorithm]


@pytest.mark.parametrize("base", [SlowMo(), SlowMo(Gossip(), sync_every=4), DiLoCo(), BMUF(), SlowMo, DiLoCo], ids=repr)
def test_an_outer_loop_is_no_base(base):
    kind = base if isinstance(base, type) else type(base)
    with pytest.raises(ValueError, match=rf"base must not be an outer loop itself, got {kind.__name__}: .* alone"):
        SlowMo(base)


@pytest.mark.parametrize("name", sorted(BASES))
def test_a_name_as_base_is_refused_with_what_to_write_instead(name):
    with pytest.raises(ValueError, match=f"^base must be a configuration, .* got '{name}'") as refused:
        SlowMo(base=name)
    advised = str(refused.value).split("write base=")[1].removesuffix(".")
    assert eval(advised, vars(lightning_slowmo)) == PRESETS[name]
    SlowMo(base=PRESETS[name])  # which is accepted


@pytest.mark.parametrize("kind", [Gossip, LocalSGD, AllReduce])
def test_a_class_as_base_is_refused(kind):
    with pytest.raises(ValueError, match=rf"not a class: write base={kind.__name__}\(\), got {kind.__name__}\.$"):
        SlowMo(base=kind)


@pytest.mark.parametrize("base", ["slowmo_sgp", "spg", 12, True, torch.optim.SGD])
def test_other_things_as_base_are_refused(base):
    with pytest.raises(ValueError, match=r"^base must be a configuration"):
        SlowMo(base=base)


def test_configurations_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        SlowMo().sync_every = 3
    with pytest.raises(FrozenInstanceError):
        LocalSGD().sync_every = 3


def test_slowmos_default_base_has_its_own_period():
    assert SlowMo(sync_every=48).base == LocalSGD(48)
    assert SlowMo(sync_every=48) == SlowMo(LocalSGD(48), sync_every=48)
    assert SlowMo(sync_every=48) != SlowMo(LocalSGD(12), sync_every=48)


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.5),
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
        torch.optim.Adam,
        partial(torch.optim.Adagrad, lr=0.1, lr_decay=0.1, initial_accumulator_value=0.5),
        torch.optim.RMSprop,
    ],
)
def test_a_reset_optimizer_steps_like_a_fresh_one(optimizer):
    used, fresh = (torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    optimizers = optimizer([used]), optimizer([fresh])
    for step in range(5):
        used.grad = torch.full_like(used, 1.0 + step)
        optimizers[0].step()
    before = used.detach().clone()
    inner_buffers.reset(optimizers[0])
    assert torch.equal(used, before)
    with torch.no_grad():
        used.fill_(1.0)
    for step in range(3):
        used.grad, fresh.grad = (torch.full_like(used, 2.0 - step) for _ in range(2))
        for each in optimizers:
            each.step()
        assert torch.equal(used, fresh)


@pytest.mark.parametrize(
    "parameters",
    [
        [torch.nn.Parameter(torch.ones(3), requires_grad=False)],
        [torch.nn.Parameter(torch.ones(0))],
    ],
    ids=["frozen", "empty"],
)
def test_an_optimizer_with_nothing_to_train_is_refused(parameters):
    with pytest.raises(ValueError, match="nothing to train"):
        Engine(SlowMo(), [torch.optim.SGD(parameters, lr=0.1)], Workers())


def test_an_engine_without_optimizers_is_refused():
    with pytest.raises(ValueError, match="nothing to train"):
        Engine(SlowMo(), [], Workers())


@pytest.mark.parametrize("value", ["ignore", "", None])
def test_an_unknown_treatment_of_nan_is_refused(value):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1)
    with pytest.raises(ValueError, match="on_nonfinite must be 'raise' or 'skip'"):
        Engine(SlowMo(), [optimizer], Workers(), on_nonfinite=value)
