"""The table of all presets: that stacked workers train as one model would, what is searched, and what is drawn."""

import math

import pytest
import torch
from torch import nn

from benchmarks import frontier, side_by_side, stacked
from lightning_slowmo import PRESETS, AllReduce, LocalSGD


@pytest.fixture
def small(monkeypatch):
    """A few random images; the first one's label follows from its brightness."""
    generator = torch.Generator().manual_seed(0)
    patches = torch.randint(256, (96, 8, 8, 48), dtype=torch.uint8, generator=generator)
    split = stacked.Split(patches, torch.randint(10, (96,), generator=generator))
    monkeypatch.setattr(stacked, "data", lambda path, held_out: (split, split))
    return split


def test_averaged_gradients_of_stacked_workers_are_one_models_on_all_images(small):
    """The same images in one batch, by one worker; and local steps are something else."""
    seen = {}

    def remember(parameters, rate):
        seen.setdefault("models", []).append(parameters)
        return side_by_side.sgd(parameters, rate)

    ends = []
    for workers, batch, algorithm in ((4, 6, AllReduce()), (1, 24, AllReduce()), (4, 6, LocalSGD(3))):
        seen.clear()
        outcome = stacked.train(stacked.Task("", workers, batch, 6, 2), algorithm, remember, 0.05, 1, False)
        ends.append(torch.cat([value.detach().flatten() for value in seen["models"][0]]))
        assert outcome.accuracy == pytest.approx(stacked.accuracy(seen["models"][0], small))
        gradients = sum(value.numel() for value in stacked.initial(1)) * 4 / 1e6
        syncs = 2 if isinstance(algorithm, LocalSGD) else 6
        assert outcome.mb == pytest.approx(syncs * gradients * 2 * (workers - 1) / workers, rel=0.05)
    assert (ends[0] - ends[1]).abs().max() < 1e-5
    assert (ends[0] - ends[2]).abs().max() > 1e-3


def test_the_network_is_convolutions_of_patches(small):
    values = stacked.initial(0)
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    ours = stacked.logits([value[None] for value in values], stacked._cut(images)[None])[0]
    x = images.float() / 64 - 2
    for layer, size in zip((0, 2, 4), (4, 2, 2), strict=True):
        kernels = values[layer].T.unflatten(1, (size, size, -1)).permute(0, 3, 1, 2)
        x = nn.functional.conv2d(x, kernels, values[layer + 1], stride=size).relu()
    theirs = x.permute(0, 2, 3, 1).flatten(1) @ values[6] + values[7]
    torch.testing.assert_close(ours, theirs)


def test_every_preset_has_a_row():
    rows = {type(algorithm.make(0.1)) for algorithm in side_by_side.ROWS.values()}
    assert rows >= {type(algorithm) for algorithm in PRESETS.values()}
    assert set(PRESETS) - {"allreduce"} <= set(side_by_side.ROWS)


def test_the_search_goes_on_from_a_best_that_is_the_last_on_its_side(tmp_path, monkeypatch):
    scores = {0.02: 1.0, 0.04: 2.0, 0.08: 3.0, 0.16: 4.0, 0.32: math.nan}
    monkeypatch.setattr(side_by_side, "train", lambda task, a, inner, rate, *rest: stacked.Outcome(scores[rate], 1.0))
    runs = side_by_side.Runs(tmp_path / "runs.json", stacked.Task(""))
    assert side_by_side.search(runs, "ddp") == {0.02: 1.0, 0.04: 2.0, 0.08: 3.0, 0.16: 4.0, 0.32: -math.inf}
    assert side_by_side.tuned(runs, "ddp", momenta=False) == (0.16, None)
    monkeypatch.setattr(side_by_side, "train", None)  # what is known is not trained again
    again = side_by_side.Runs(tmp_path / "runs.json", stacked.Task(""))
    assert side_by_side.tuned(again, "ddp", momenta=False) == (0.16, None)


def test_the_front_intervals_and_files(tmp_path):
    known = {}
    for name, values, mb in (("ddp", (50, 51, 52), 40), ("slowmo", (49, 52, 52), 3), ("bmuf", (40, 41, 42), 3)):
        known[f"{name} | rate 0.04 | seed 101 | held out"] = [values[0], mb]
        known |= {f"{name} | rate 0.04 | seed {seed}": [value, mb] for seed, value in enumerate(values, start=1)}
    known["ddp | rate 0.04 | seed 4"] = [None, None]
    known["slowmo | rate 0.02 | seed 101 | held out"] = [99.0, 3]  # has no final runs
    rows = frontier.entries(known, dict.fromkeys(("ddp", "slowmo", "bmuf"), "SGD"))
    assert [(e.name, e.mean) for e in rows] == [("ddp", 51.0), ("slowmo", 51.0), ("bmuf", 41.0)]
    assert [e.name for e in frontier.front(rows)] == ["slowmo"]
    assert frontier.half_interval([1.0, 2.0, 3.0]) == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    gains, _ = frontier.against(rows, rows[0])
    assert gains == "* slowmo (7.5 % of the bytes): +0.00 ± 2.48, 3 seeds"
    frontier.write(known, dict.fromkeys(("ddp", "slowmo", "bmuf"), "SGD"), tmp_path)
    assert (tmp_path / "over_mb.png").read_bytes().startswith(b"\x89PNG")
    assert "| **slowmo** | SGD | 0.04 | 51.00 ± 4.30 | 3 | 7.5 | 3 |" in (tmp_path / "table.md").read_text()
    assert "| 3, and 1 diverged |" in (tmp_path / "table.md").read_text()
