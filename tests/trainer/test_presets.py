"""Every preset trains, under every launcher's name and for every installed Lightning."""

import pytest
from lightning.pytorch.strategies import StrategyRegistry

from lightning_slowmo import SlowMoStrategy
from lightning_slowmo.presets import PRESETS
from tests.harness import run_trainers
from tests.trainer.models import TAKE_ADAM, Regression, all_finite, data, distance, numbers, trainer

SUFFIXES = {"": "popen", "_spawn": "spawn", "_fork": "fork", "_notebook": "fork"}


def train_presets(rank, size):
    models = {}
    for name in PRESETS:
        module = Regression(adam=name in TAKE_ADAM)
        trainer(size, name, max_epochs=4).fit(module, data(rank))
        models[name] = numbers(module)
    return models


@pytest.mark.processes
def test_every_preset_trains_and_ends_with_the_same_bits_on_all_ranks():
    start = numbers(Regression())
    first, second = run_trainers(2, train_presets, 2)
    assert first.keys() == PRESETS.keys()
    for name in PRESETS:
        assert first[name] == second[name], name
        assert all_finite(first[name]), name
        assert distance(first[name], start) > 1e-2, name


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", PRESETS)
def test_every_name_is_registered_for_both_packages(name, suffix):
    import pytorch_lightning

    import lightning_slowmo.pl

    for registry, own in (
        (StrategyRegistry, SlowMoStrategy),
        (pytorch_lightning.strategies.StrategyRegistry, lightning_slowmo.pl.SlowMoStrategy),
    ):
        strategy = registry.get(name + suffix)
        assert type(strategy) is own
        assert strategy.algorithm == PRESETS[name]
        assert strategy._start_method == SUFFIXES[suffix]
