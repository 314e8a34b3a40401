"""Optimizers that are replaced in the middle of a fit: growing models, training in stages."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_slowmo import BMUF, DiLoCo, SlowMo, SlowMoStrategy
from lightning_slowmo.presets import PRESETS
from tests.harness import run_trainers
from tests.trainer.models import TAKE_ADAM, Regression, data, distance, numbers, trainer

GROW_AT = 1
"""The epoch at whose start the model grows; of 8 batches each, so in the middle of a period of 3 steps."""


class Growing(Regression):
    """A third layer comes in later, initialised differently on each rank, and the first layer is frozen then."""

    def __init__(self, grow=True, stop_first=True, **arguments):
        super().__init__(**arguments)
        self.grow, self.stop_first = grow, stop_first
        self.seen = {}

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        kind = torch.optim.Adam if self.hparams.adam else torch.optim.SGD
        return kind(trained, lr=self.hparams.lr)

    def on_train_epoch_start(self):
        if self.current_epoch != GROW_AT or not self.grow:
            return
        strategy = self.trainer.strategy
        strategy.barrier()
        before = momenta(self)
        own = numbers(self)
        if self.stop_first:
            self.net[0].requires_grad_(False)
        torch.manual_seed(100 + self.global_rank)
        extra = torch.nn.Linear(1, 1)
        start = [p.detach().clone() for p in extra.parameters()]
        self.net.append(extra)
        strategy.setup_optimizers(self.trainer)
        joined = [p.detach().clone() for p in extra.parameters()]
        self.seen = {
            "own": own,
            "grown": numbers(self),
            "start": [p.tolist() for p in start],
            "joined": [p.tolist() for p in joined],
            "before": before,
            "after": momenta(self),
            "syncs": strategy.report.count,
        }


def momenta(module):
    """Slow momentum by the parameter's name, for algorithms that have it."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found = {}
    for unit in module.trainer.strategy.engine.units:
        if hasattr(unit, "momentum") and hasattr(unit, "anchor"):
            parts = zip(unit.layout.parameters, unit.layout.per_parameter(unit.momentum), strict=True)
            found |= {names[id(parameter)]: value.clone() for parameter, value in parts}
    return found


def grow(rank, size, algorithm):
    module = Growing()
    fitting = trainer(size, SlowMoStrategy(algorithm), max_epochs=3)
    fitting.fit(module, data(rank), data(9))
    return module.seen, numbers(module), fitting.global_step, fitting.strategy.report.count


def grow_each(rank, size):
    return [grow(rank, size, a) for a in (SlowMo(sync_every=3), BMUF(sync_every=3), DiLoCo(sync_every=3, overlap=1))]


@pytest.mark.processes
@pytest.mark.parametrize("size", [2, 3])
def test_what_stays_keeps_its_slow_state_and_what_joins_starts_equal(size):
    for ranks in zip(*run_trainers(size, grow_each, size, limit=120), strict=True):
        seen = [rank[0] for rank in ranks]
        assert all(rank[1] == ranks[0][1] for rank in ranks)
        assert all(rank[2] == 24 for rank in ranks)
        assert seen[0]["own"] != seen[1]["own"]  # in the middle of a period
        for own in seen:
            assert own["grown"] == seen[0]["grown"]
            assert own["joined"] == seen[0]["start"]
            assert set(own["after"]) == {"net.2.weight", "net.2.bias", "net.3.weight", "net.3.bias"}
            for name in ("net.2.weight", "net.2.bias"):
                assert own["before"][name].abs().max() > 0
                assert torch.equal(own["before"][name], own["after"][name])
            assert not own["after"]["net.3.weight"].any()
        assert seen[1]["start"] != seen[0]["start"]
        mean = [
            [sum(column) / size for column in zip(*values, strict=True)]
            for values in zip(*(own["own"] for own in seen), strict=True)
        ]
        assert distance(seen[0]["grown"][: len(mean)], mean) < 1e-6
        assert all(rank[3] > own["syncs"] >= 2 for rank, own in zip(ranks, seen, strict=True))


ONE_OF_EACH = [*{algorithm.kind: name for name, algorithm in PRESETS.items()}.values(), "slowmo_osgp"]
"""Presets that keep different kinds of state."""


def grow_under_each(rank):
    results = {}
    for name in ONE_OF_EACH:
        algorithm = PRESETS[name]
        module = Growing(adam=name in TAKE_ADAM, lr=0.01)
        fitting = trainer(2, SlowMoStrategy(algorithm), max_epochs=2)
        fitting.fit(module, data(rank), data(9))
        results[name] = numbers(module), module.seen["joined"]
    return results


@pytest.mark.processes
def test_every_algorithm_goes_on_with_other_optimizers():
    first, second = run_trainers(2, grow_under_each, limit=180)
    for name in ONE_OF_EACH:
        assert first[name][0] == second[name][0], name
        assert first[name][0][-2] != [x for row in first[name][1][0] for x in row], name  # what joined was trained


def replace_by_the_same(rank):
    """With one parameter group and the same parameters, at a moment when a period ends, nothing changes."""

    class Same(Regression):
        def on_train_epoch_start(self):
            if self.replace and self.current_epoch == 1:
                self.trainer.strategy.setup_optimizers(self.trainer)

    models = []
    for replace in (False, True):
        module = Same()
        module.replace = replace
        strategy = SlowMoStrategy(SlowMo(sync_every=4))
        trainer(2, strategy, max_epochs=3).fit(module, data(rank))
        models.append((numbers(module), strategy.report.count))
    return models


@pytest.mark.processes
def test_optimizers_replaced_by_equal_ones_between_two_periods_change_nothing():
    first, second = run_trainers(2, replace_by_the_same)
    assert first == second
    assert first[0][1] == first[1][1] == 6
    assert distance(first[0][0], first[1][0]) < 1e-6


class Behind(Callback):
    """Replaces the optimizer without the strategy's knowledge."""

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1:
            trainer.optimizers = [torch.optim.SGD(module.parameters(), lr=0.1)]


class Alone(Callback):
    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1 and trainer.global_rank == 0:
            trainer.strategy.setup_optimizers(trainer)


class MoreGroups(Regression):
    def configure_optimizers(self):
        if self.trainer.current_epoch == 0:
            return super().configure_optimizers()
        return torch.optim.SGD([{"params": layer.parameters()} for layer in (self.net[0], self.net[-1])], lr=0.1)

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.trainer.strategy.setup_optimizers(self.trainer)


MISTAKES = {
    "behind": (SlowMo(sync_every=3), Regression, [Behind()], {}, "call trainer.strategy.setup_optimizers(trainer)"),
    "alone": (SlowMo(sync_every=3), Regression, [Alone()], {}, "The workers came together for different reasons"),
    "more groups": (SlowMo(sync_every=3), MoreGroups, [], {}, "Keep the number of parameter groups, or call"),
    "sharded": (SlowMo(sync_every=3), MoreGroups, [], {"shard_slow_state": True}, "go with shard_slow_state=True"),
}


def replace_wrongly(rank):
    told = {}
    for name, (algorithm, kind, callbacks, options, _) in MISTAKES.items():
        fitting = trainer(2, SlowMoStrategy(algorithm, **options), callbacks=callbacks)
        with pytest.raises((RuntimeError, ValueError)) as raised:
            fitting.fit(kind(), data(rank))
        told[name] = str(raised.value)
    return told


@pytest.mark.processes
def test_what_cannot_be_replaced_gives_an_error_on_all_ranks_that_says_what_to_do():
    for told in run_trainers(2, replace_wrongly):
        for name, (*_, text) in MISTAKES.items():
            assert text in told[name], name


def grow_in_nodes(rank):
    module = Growing(stop_first=False)
    strategy = SlowMoStrategy(SlowMo(sync_every=3), workers_per_node=2)
    trainer(4, strategy, max_epochs=3).fit(module, data(rank))
    return numbers(module), module.seen["own"], module.seen["grown"]


@pytest.mark.processes
def test_inside_nodes_the_gradients_of_what_joined_are_averaged_too():
    results = run_trainers(4, grow_in_nodes, limit=120)
    assert all(result[0] == results[0][0] for result in results)
    assert results[0][1] == results[1][1] != results[2][1] == results[3][1]
    assert all(result[2] == results[0][2] for result in results)


def grow_uneven(rank):
    module = Growing()
    fitting = trainer(2, SlowMoStrategy(SlowMo(sync_every=3)), max_epochs=3)
    fitting.fit(module, data(rank, examples=(32, 20)[rank]))
    return numbers(module), fitting.global_step


@pytest.mark.processes
def test_workers_with_fewer_batches_wait_for_the_others_before_they_grow():
    first, second = run_trainers(2, grow_uneven)
    assert first[0] == second[0]
    assert (first[1], second[1]) == (24, 15)
