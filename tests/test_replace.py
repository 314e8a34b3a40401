"""Slow state follows its parameters from one set of optimizers to another."""

import pytest
import torch

from lightning_slowmo import BMUF, APMSqueeze, Engine, SlowMo, Workers
from lightning_slowmo.replace import carry_over


def parameters(*sizes):
    return [torch.nn.Parameter(torch.full((size,), float(index))) for index, size in enumerate(sizes)]


def sgd(*groups):
    return torch.optim.SGD([{"params": group} for group in groups], lr=0.1)


def train(engine, optimizers, steps):
    for step in range(steps):
        for index, optimizer in enumerate(optimizers):
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = torch.full_like(p, 1.0 + step + p.numel())
            optimizer.step()
            engine.after_step(index)


def slow(engine, name):
    """What each unit keeps for each parameter, by the parameter's identity."""
    return {
        id(p): value.clone()
        for unit in engine.units
        for p, value in zip(unit.layout.parameters, unit.layout.per_parameter(getattr(unit, name)), strict=True)
    }


def test_anchor_and_momentum_follow_parameters_to_other_optimizers_in_another_order():
    a, b, c, d, new = parameters(2, 3, 2, 5, 3)
    before = [sgd([a, b]), sgd([c, d])]
    old = Engine(SlowMo(sync_every=2), before, Workers())
    train(old, before, 2)
    anchors, momenta = slow(old, "anchor"), slow(old, "momentum")
    assert all(value.abs().max() > 0 for value in momenta.values())
    after = [sgd([d, new, a]), sgd([b])]  # c is gone
    fresh = Engine(SlowMo(sync_every=2), after, Workers())
    carry_over(old, fresh)
    for kept in (a, b, d):
        assert torch.equal(slow(fresh, "anchor")[id(kept)], anchors[id(kept)])
        assert torch.equal(slow(fresh, "momentum")[id(kept)], momenta[id(kept)])
    assert torch.equal(slow(fresh, "anchor")[id(new)], new)
    assert not slow(fresh, "momentum")[id(new)].any()
    assert set(slow(fresh, "anchor")) == {id(p) for p in (a, b, d, new)}
    assert (fresh.rounds, fresh.total, fresh.on_sync) == (old.rounds, old.total, old.on_sync)


def test_training_goes_on_as_if_the_optimizers_had_not_been_replaced():
    models = []
    for replaced in (False, True):
        values = parameters(2, 3, 4)
        optimizers = [sgd(values)]
        engine = Engine(BMUF(sync_every=2, block_momentum=0.5), optimizers, Workers())
        train(engine, optimizers, 4)
        if replaced:
            optimizers = [sgd(values[::-1])]
            other = Engine(BMUF(sync_every=2, block_momentum=0.5), optimizers, Workers())
            carry_over(engine, other)
            engine = other
        train(engine, optimizers, 4)
        models.append(values)
    assert all(torch.equal(x, y) for x, y in zip(*models, strict=True))


def test_numbers_of_parameters_follow_them_and_numbers_of_the_algorithm_go_on():
    a, b, new = parameters(2, 3, 4)
    before = [torch.optim.Adam([a, b], lr=0.1)]
    old = Engine(APMSqueeze(warmup_steps=2), before, Workers())
    for _ in range(4):
        a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
        old.after_backward()
        before[0].step()
        old.after_step()
    fresh = Engine(APMSqueeze(warmup_steps=2), [torch.optim.Adam([new, b], lr=0.1)], Workers())
    carry_over(old, fresh)
    (was,), (state,) = old.shared_state()["units"], fresh.shared_state()["units"]
    assert state["frozen"] is was["frozen"] is True
    assert state["steps"] == [0.0, was["steps"][1]]
    assert was["steps"][1] > 0


def test_state_of_parameter_groups_is_not_guessed():
    a, b = parameters(2, 3)
    old = Engine(SlowMo(sync_every=2), [sgd([a, b])], Workers())
    fresh = Engine(SlowMo(sync_every=2), [sgd([a], [b])], Workers())
    with pytest.raises(ValueError, match=r"slow\.momentum_rates of \[1\] values does not fit the new ones, of \[2\]"):
        carry_over(old, fresh)
