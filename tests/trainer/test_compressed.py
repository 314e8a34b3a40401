"""Compressed algorithms in a Trainer: they train, agree, and resume bit for bit."""

import warnings
from functools import partial

import lightning as L
import pytest
import torch

from lightning_slowmo import (
    QPRSGD,
    APMSqueeze,
    DiLoCo,
    Engine,
    Gossip,
    SensedSGD,
    SketchedSGD,
    SlowMo,
    SlowMoStrategy,
    SQuARM,
    Threshold,
    Workers,
)
from lightning_slowmo.compression import QSGD, Sign, SignTopK, TopK
from tests.harness import run_trainers
from tests.trainer.models import Regression, all_finite, data, numbers, trainer

ALGORITHMS = {
    "qprsgd": QPRSGD(3, QSGD(3, norm="max", bucket=64)),
    "qprsgd_gossip": QPRSGD(3, QSGD(3, norm="max", bucket=64), "gossip"),
    "slowmo": SlowMo(sync_every=3, compressor=TopK(0.2)),
    "squarm": SQuARM("ring", 2, Sign(), 0.3, Threshold(0.5)),
    "apmsqueeze": APMSqueeze(5),
    "sketched": SketchedSGD(k=3, columns=4, uncompressed_below=5),
    "sensed": SensedSGD(0.5, 0.1, uncompressed_below=5),
}
OPTIMIZERS = {"apmsqueeze": {"adam": True}, "sketched": {"momentum": 0.0}, "sensed": {"momentum": 0.0}}


def interrupted_and_not(rank, size, folder):
    """Four epochs at once, and two and two; the checkpoint lies in the middle of a period."""
    models = {}
    for name, algorithm in ALGORITHMS.items():
        path = f"{folder}/{name}.ckpt"
        optimizer = {"momentum": 0.9} | OPTIMIZERS.get(name, {})
        whole, first, second = (Regression(lr=0.02, **optimizer) for _ in range(3))
        trainer(size, SlowMoStrategy(algorithm), max_epochs=4).fit(whole, data(rank))
        half = trainer(size, SlowMoStrategy(algorithm), max_epochs=4, max_steps=16, callbacks=[SaveAt(path)])
        half.fit(first, data(rank))
        trainer(size, SlowMoStrategy(algorithm), max_epochs=4).fit(second, data(rank), ckpt_path=path)
        models[name] = numbers(whole), numbers(second)
    return models


class SaveAt(L.Callback):
    """Saves at the end of an epoch, and remembers the residual of the mean then."""

    def __init__(self, path, epoch=1):
        self.path, self.epoch, self.residual = path, epoch, None

    def on_train_epoch_end(self, trainer, module):
        if trainer.current_epoch == self.epoch:
            self.residual = residual(trainer)
            trainer.save_checkpoint(self.path)


@pytest.mark.processes
def test_every_compressed_algorithm_trains_agrees_and_resumes_bit_for_bit(tmp_path):
    first, second = run_trainers(2, interrupted_and_not, 2, str(tmp_path))
    assert first == second
    for name, (whole, resumed) in first.items():
        assert all_finite(whole), name
        assert whole == resumed, name


# Other numbers of workers ---------------------------------------------------------------------------------------------

ELSEWHERE = {
    "qprsgd": QPRSGD(3, Sign("l1"), "two_shot", error_feedback=True),
    "qprsgd_gossip": QPRSGD(3, QSGD(3, norm="max", bucket=64), "gossip"),
    "slowmo": SlowMo(sync_every=3, compressor=TopK(0.2)),
    "squarm": SQuARM("complete", 2, SignTopK(0.2), trigger=Threshold(0.5)),
    "choco": SQuARM("ring", 1, Sign("l1")),
    "apmsqueeze": APMSqueeze(5),
    "apmsqueeze in the warm-up": APMSqueeze(11),
}
WITH_RESIDUALS = {"qprsgd", "slowmo", "apmsqueeze"}


def optimizer_of(name):
    return {"adam": True, "lr": 0.01} if "apmsqueeze" in name else {"momentum": 0.5, "lr": 0.01}


def residual(fitting):
    """The residual of the mean, which all workers must ask for together; zeros where nothing is left out."""
    (unit,) = fitting.strategy.engine.units
    feedback = getattr(unit.averager, "feedback", getattr(unit, "feedback", None))
    return [part.tolist() for part in feedback.total()] if feedback is not None else None


class Onwards(Regression):
    """Remembers the model, and the residual of the mean, with which training goes on."""

    def on_train_start(self):
        self.start = numbers(self), residual(self.trainer)


def save_elsewhere(rank, size, folder):
    residuals = {}
    for name, algorithm in ELSEWHERE.items():
        saving = SaveAt(f"{folder}/{name}.ckpt", epoch=0)
        fitting = trainer(size, SlowMoStrategy(algorithm), max_epochs=1, callbacks=[saving])
        fitting.fit(Regression(**optimizer_of(name)), data(rank))
        residuals[name] = saving.residual
    return residuals


def go_on_elsewhere(rank, size, folder):
    results = {}
    for name, algorithm in ELSEWHERE.items():
        module = Onwards(**optimizer_of(name))
        fitting = trainer(size, SlowMoStrategy(algorithm), max_epochs=6)
        fitting.fit(module, data(rank), ckpt_path=f"{folder}/{name}.ckpt")
        results[name] = *module.start, numbers(module), fitting.global_step
    return results


def loss(model, workers=4):
    """Mean squared error of a model over the data of that many workers."""
    module = Regression()
    pairs = zip(module.state_dict().items(), model, strict=True)
    module.load_state_dict({name: torch.tensor(values).view_as(tensor) for (name, tensor), values in pairs})
    with torch.no_grad():
        return float(torch.stack([module.loss(batch) for rank in range(workers) for batch in data(rank)]).mean())


@pytest.mark.processes
@pytest.mark.parametrize("size", [1, 2])
def test_another_number_of_workers_keeps_model_and_residual_of_the_mean_and_converges(saved_by_three, size):
    folder, saved = saved_by_three
    results = run_trainers(size, go_on_elsewhere, size, str(folder))
    for name in ELSEWHERE:
        weights = torch.load(folder / f"{name}.ckpt", weights_only=True)["state_dict"].values()
        start, left_out, end, steps = results[0][name]
        assert start == [value.double().flatten().tolist() for value in weights], name
        assert steps == 48, name
        assert all(result[name][2] == end for result in results), name
        assert loss(end) < 0.6 * loss(start), (name, loss(start), loss(end))
        if name in WITH_RESIDUALS:
            largest = max(abs(x) for part in saved[name] for x in flat(part))
            assert largest > 1e-4, name
        if left_out is not None:
            for one, other in zip(flat(left_out), flat(saved[name]), strict=True):
                assert one == pytest.approx(other, rel=1e-5, abs=1e-7), name


def flat(values):
    """The numbers in nested lists."""
    return [x for value in values for x in flat(value)] if isinstance(values, list) else [values]


@pytest.fixture(scope="module")
def saved_by_three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compressed")
    first, *others = run_trainers(3, save_elsewhere, 3, str(folder))
    assert all(other == first for other in others)
    return folder, first


# Other settings -------------------------------------------------------------------------------------------------------

SETTINGS = [
    (SlowMo(sync_every=3), SlowMo(sync_every=3, compressor=TopK(0.2))),
    (DiLoCo(3), DiLoCo(3, compressor=Sign("l2"))),
    (QPRSGD(3), QPRSGD(3, transport="gossip")),
    (QPRSGD(3, transport="two_shot"), QPRSGD(3, transport="two_shot", error_feedback=True)),
    (DiLoCo(3), DiLoCo(3, outer_optimizer=partial(torch.optim.SGD, lr=0.5))),
    (SlowMo(Gossip("ring"), 3), SlowMo(Gossip("ring"), 3, average=False)),
]


def save_with_one_resume_with_the_other(rank, folder):
    results = {}
    for index, pair in enumerate(SETTINGS):
        for saves, resumes in (pair, pair[::-1]):
            path = f"{folder}/{index} {saves.kind}.ckpt"
            first = trainer(2, SlowMoStrategy(saves), max_epochs=1, callbacks=[SaveAt(path, epoch=0)])
            first.fit(Regression(), data(rank))
            module = Onwards()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                trainer(2, SlowMoStrategy(resumes), max_epochs=2).fit(module, data(rank), ckpt_path=path)
            said = [str(warning.message) for warning in caught if "was saved by" in str(warning.message)]
            weights = torch.load(path, weights_only=True)["state_dict"].values()
            expected = [value.double().flatten().tolist() for value in weights]
            results[index, saves.kind, resumes.kind] = said, module.start[0] == expected, numbers(module)
    return results


@pytest.mark.processes
def test_a_checkpoint_of_other_settings_begins_anew_from_its_weights_and_says_so(tmp_path):
    first, second = run_trainers(2, save_with_one_resume_with_the_other, str(tmp_path))
    assert len(first) == 2 * len(SETTINGS)
    for (index, saves, resumes), (said, from_weights, end) in first.items():
        assert saves != resumes
        assert len(said) == 1, (saves, resumes, said)
        assert f"was saved by {saves}, not {resumes}: the algorithm starts anew" in said[0]
        assert from_weights, (saves, resumes)
        assert all_finite(end)
        assert end == second[index, saves, resumes][2]


def test_state_of_other_settings_is_refused_by_the_engine():
    for pair in SETTINGS:
        for saves, resumes in (pair, pair[::-1]):
            engines = [
                Engine(algorithm, [torch.optim.SGD(torch.nn.Linear(2, 1).parameters())], Workers())
                for algorithm in (saves, resumes)
            ]
            with pytest.raises(ValueError, match=f"that of {saves.kind}, which does not fit {resumes.kind}"):
                engines[1].load_shared_state(engines[0].shared_state())
