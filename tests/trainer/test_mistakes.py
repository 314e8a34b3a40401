"""Wrong calls get the right answer where they are made: when the strategy or the Trainer is constructed."""

import sys
from datetime import timedelta

import lightning as L
import pytest
import pytorch_lightning

import lightning_slowmo.pl
from lightning_slowmo import DiLoCo, Gossip, LocalSGD, SlowMo, SlowMoStrategy, compression
from lightning_slowmo.algorithms.source import source
from lightning_slowmo.presets import PRESETS
from tests.trainer.models import trainer


@pytest.mark.parametrize(
    ("arguments", "named", "answer"),
    [
        ((), {"sync_every": 12}, r"go into its configuration: SlowMoStrategy\(SlowMo\(sync_every=12\)\)\."),
        (("diloco",), {"sync_every": 50}, r"SlowMoStrategy\(DiLoCo\(sync_every=50\)\)"),
        (("slowmo_sgp",), {"slow_momentum": 0.7},
         r"SlowMoStrategy\(SlowMo\(base=Gossip\(\), sync_every=48, slow_momentum=0.7\)\)"),
        ((LocalSGD(4),), {"overlap": 2}, r"SlowMoStrategy\(LocalSGD\(sync_every=4, overlap=2\)\)"),
        ((), {"find_unused_parameters": True},
         r"with workers_per_node, write ddp_kwargs=\{'find_unused_parameters': True\}; otherwise leave it out"),
        ((), {"ddp_comm_hook": None}, "Leave it out"),
        ((), {"sync_timout": 3}, r"Did you mean sync_timeout\? There are: algorithm, sync_timeout, "),
        ((), {"zeal": 3}, "zeal=3. It is not known. There are: algorithm, "),
    ],
)  # fmt: skip
def test_arguments_that_are_not_known(arguments, named, answer):
    for strategy in (SlowMoStrategy, lightning_slowmo.pl.SlowMoStrategy):
        with pytest.raises(TypeError, match=answer) as raised:
            strategy(*arguments, **named)
        assert "Mixin" not in str(raised.value)


def test_the_settings_that_are_suggested_are_right():
    suggested = "SlowMo(base=Gossip(), sync_every=48, slow_momentum=0.7)"
    assert eval(suggested) == SlowMo(Gossip(), sync_every=48, slow_momentum=0.7)


@pytest.mark.parametrize("name", PRESETS)
def test_the_source_of_every_preset_makes_it(name):
    assert eval(source(PRESETS[name]), vars(lightning_slowmo) | vars(compression)) == PRESETS[name]


@pytest.mark.parametrize("value", [60, 60.0, timedelta(minutes=1)])
def test_timeouts_may_be_seconds(value):
    strategy = SlowMoStrategy(sync_timeout=value)
    assert strategy.sync_timeout == timedelta(seconds=60)
    assert SlowMoStrategy(timeout=value).sync_timeout == timedelta(seconds=60)


@pytest.mark.parametrize("value", [0, -1, True, float("nan"), float("inf"), "1 min", timedelta(0)])
@pytest.mark.parametrize("name", ["sync_timeout", "timeout"])
def test_durations_that_are_none_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a number of seconds above 0, or a timedelta, got"):
        SlowMoStrategy(**{name: value})


def test_a_class_instead_of_a_configuration():
    with pytest.raises(ValueError, match=r"not a class: write DiLoCo\(\)"):
        SlowMoStrategy(DiLoCo)


@pytest.mark.parametrize(
    ("wanted", "answer"),
    [
        (SlowMo(sync_every=24), r"strategy=SlowMoStrategy\(SlowMo\(sync_every=24\)\)"),
        (DiLoCo, r"Write strategy=SlowMoStrategy\(DiLoCo\(\)\)"),
        ("slomo", "got 'slomo'. Did you mean 'slowmo'"),
        ("SlowMo_SGB", "Did you mean 'slowmo_sgp'"),
        ("local-sgd_spawn", "Did you mean 'local_sgd_spawn'"),
        ("slowmo_find_unused_parameters_true", "Did you mean 'slowmo'"),
    ],
)
def test_what_a_trainer_takes_for_a_strategy(wanted, answer):
    for package in (L, pytorch_lightning):
        with pytest.raises(ValueError, match=answer):
            package.Trainer(strategy=wanted, accelerator="cpu", devices=1)


def test_a_class_or_another_packages_strategy_for_a_trainer():
    ours, theirs = SlowMoStrategy, lightning_slowmo.pl.SlowMoStrategy
    with pytest.raises(ValueError, match=r"Write strategy=SlowMoStrategy\(\)"):
        trainer(1, ours)
    with pytest.raises(ValueError, match=r"this Trainer, lightning\.pytorch: use lightning_slowmo's"):
        trainer(1, theirs())
    with pytest.raises(ValueError, match=r"this Trainer, pytorch_lightning: use lightning_slowmo\.pl's"):
        pytorch_lightning.Trainer(strategy=ours(), accelerator="cpu", devices=1)


def test_lightnings_own_names_are_left_to_lightning():
    assert trainer(1, "ddp").strategy.__class__.__name__ == "DDPStrategy"
    for wanted in ("ddp_notebok", "zeal", 3):
        with pytest.raises(ValueError, match="You selected an invalid strategy name"):
            trainer(1, wanted)


def test_in_a_notebook_the_name_that_works_there_is_said(monkeypatch):
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with pytest.raises(ValueError, match="use strategy='diloco_notebook'"):
        trainer(2, "diloco")
    with pytest.raises(ValueError, match="use strategy='slowmo_notebook'"):
        trainer(2, "slowmo_spawn")
    with pytest.raises(ValueError, match=r"use SlowMoStrategy\(LocalSGD\(sync_every=7\), start_method='fork'\)"):
        trainer(2, SlowMoStrategy(LocalSGD(7)))
    assert trainer(2, "slowmo_notebook").strategy.start_method == "fork"
