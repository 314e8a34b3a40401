"""Gossip in a Trainer: validated and saved is all mass, that in flight included, and looking at it changes nothing."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_slowmo import Algorithm, Gossip, SlowMo, SlowMoStrategy
from lightning_slowmo.presets import PRESETS
from tests.harness import run_trainers
from tests.trainer.models import Regression, data, numbers, trainer

SIZE = 3
IRREGULAR = [[0.5, 0, 0.5], [0.25, 0.5, 0], [0.25, 0.5, 0.5]]
"""Column-stochastic and directed; worker 0 sends to both others, who send to one each."""

SITUATIONS = {
    "sgp": PRESETS["sgp"],
    "dpsgd": PRESETS["dpsgd"],
    "irregular, two late": Gossip(IRREGULAR, overlap=2),
    "slowmo over osgp": SlowMo(Gossip(overlap=1), sync_every=3),
    "no average": SlowMo(Gossip(IRREGULAR, overlap=1), sync_every=3, average=False),
}


class Watched(Regression):
    """Remembers the models with which training goes on and which are validated."""

    def on_train_start(self) -> None:
        self.start, self.validated = numbers(self), []

    def on_validation_epoch_start(self) -> None:
        self.validated.append(numbers(self))


def fit(rank: int, size: int, algorithm: Algorithm, resume: str | None = None, **arguments: Any) -> tuple:
    module = Watched(momentum=0.9)
    strategy = SlowMoStrategy(algorithm)
    arguments = {"enable_checkpointing": "callbacks" in arguments, "max_epochs": 1} | arguments
    fitting = trainer(size, strategy, **arguments)
    batches = data(rank)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitting.fit(module, batches, batches if "val_check_interval" in arguments else None, ckpt_path=resume)
    said = " ".join(str(warning.message) for warning in caught)
    return numbers(module), module.start, module.validated, said, strategy.engine.units[0]


def train(rank: int, folder: str) -> dict[str, dict[str, Any]]:
    found = {}
    for name, algorithm in SITUATIONS.items():
        own = f"{folder}/{name}"
        plain, *_ = fit(rank, SIZE, algorithm, max_epochs=2)
        callback = ModelCheckpoint(own, "{step}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True)
        watched, _, validated, *_ = fit(rank, SIZE, algorithm, max_epochs=2, val_check_interval=3, callbacks=callback)
        resumed, _, _, said, unit = fit(rank, SIZE, algorithm, f"{own}/step=8.ckpt", max_epochs=2)
        phase = getattr(unit, "base", unit).step
        found[name] = {"plain": plain, "watched": watched, "validated": validated, "resumed": resumed, "phase": phase}
        assert "starts anew" not in said
    return found


def go_on(rank: int, folder: str) -> dict[str, tuple]:
    return {
        name: fit(rank, 2, algorithm, f"{folder}/{name}/step=8.ckpt", max_epochs=2)[:4]
        for name, algorithm in (("sgp", SITUATIONS["sgp"]), ("slowmo over osgp", SITUATIONS["slowmo over osgp"]))
    }


def mean_of_mass(folder: Path) -> np.ndarray:
    """Σx / Σw from the files of all ranks, messages in flight included."""
    mass, weight = np.zeros(1), 0.0
    for rank in range(SIZE):
        local = torch.load(next(folder.glob(f"*/rank{rank:05d}.pt")), weights_only=True)["local"]
        state = local["units"][0]
        state = state.get("base", state)
        keeps = [state["numerators"] or local["parameters"][0]]
        weight += state["weights"][rank] + sum(late["weights"][rank] for late in state["in_flight"])
        keeps += [late["numerators"] for late in state["in_flight"]]
        mass = mass + sum(torch.cat([t.double().flatten() for t in tensors]).numpy() for tensors in keeps)
    assert weight == pytest.approx(SIZE, abs=1e-12)
    return mass / weight


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("gossip")
    return folder, run_trainers(SIZE, train, str(folder), limit=120)


@pytest.mark.processes
def test_training_is_bit_identical_with_validation_and_after_a_resume(trained: tuple[Path, list[dict]]) -> None:
    for name in SITUATIONS:
        results = [found[name] for found in trained[1]]
        for result in results:
            assert result["watched"] == result["plain"], name
            assert result["resumed"] == result["plain"], name
            assert result["plain"] == results[0]["plain"], name  # all ranks end with the consensus
            assert result["phase"] == 17  # sixteen steps and the end
            assert len(result["validated"]) == 4
            assert result["validated"] == results[0]["validated"], name


@pytest.mark.processes
def test_checkpoints_hold_the_mean_of_all_mass(trained: tuple[Path, list[dict]]) -> None:
    folder, _ = trained
    for name in SITUATIONS:
        state = torch.load(folder / name / "step=8.ckpt", weights_only=True)["state_dict"]
        saved = torch.cat([tensor.double().flatten() for tensor in state.values()]).numpy()
        expected = mean_of_mass(folder / name / "step=8.ckpt.slowmo")
        np.testing.assert_allclose(saved, expected, rtol=0, atol=1e-6, err_msg=name)
        local = torch.load(next((folder / name / "step=8.ckpt.slowmo").glob("*/rank00001.pt")), weights_only=True)
        own = torch.cat([t.double().flatten() for t in local["local"]["parameters"][0]]).numpy()
        assert abs(own - saved).max() > 1e-4  # the workers differ, so that was not their common model


@pytest.mark.processes
def test_another_number_of_workers_goes_on_from_the_consensus(trained: tuple[Path, list[dict]]) -> None:
    folder, _ = trained
    results = run_trainers(2, go_on, str(folder))
    for name in ("sgp", "slowmo over osgp"):
        state = torch.load(folder / name / "step=8.ckpt", weights_only=True)["state_dict"]
        consensus = [tensor.double().flatten().tolist() for tensor in state.values()]
        for found in results:
            end, start, _, _ = found[name]
            assert start == consensus
            assert end == results[0][name][0]
            assert end != start
        assert "was saved by 3 workers and is continued by 2" in results[0][name][3]


def train_unevenly(rank: int) -> list[tuple]:
    """Rank 1 has half as many batches as the others."""
    found = []
    for name in ("osgp", "slowmo_dpsgd"):
        module = Regression()
        batches = data(rank, examples=16 if rank == 1 else 32)
        fitting = trainer(SIZE, name, max_epochs=2)
        fitting.fit(module, batches)
        found.append((numbers(module), fitting.global_step, fitting.strategy.report.count))
    return found


@pytest.mark.processes
def test_a_worker_whose_inputs_end_goes_on_mixing() -> None:
    by_rank = run_trainers(SIZE, train_unevenly)
    for index in range(2):
        assert [found[index][1] for found in by_rank] == [16, 8, 16]
        assert [found[index][2] for found in by_rank] == [16, 16, 16]
        assert all(found[index][0] == by_rank[0][index][0] for found in by_rank)
