"""The tables of all presets: that stacked workers train as one model would, what is searched, and what is drawn."""

import math
from dataclasses import dataclass

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from benchmarks import frontier, rows, side_by_side
from benchmarks.problems import Images, Measure, Text, images
from benchmarks.stacked import Outcome, Training, train
from lightning_slowmo import PRESETS, AllReduce, LocalSGD
from recipes.text.gpt import GPT

ACCURACY = Images.measure
BITS = Text.measure


@dataclass(frozen=True)
class FewImages(Images):
    """Random ones, the same for training and rating."""

    path: str = ""

    def data(self, held_out):
        generator = torch.Generator().manual_seed(0)
        patches = torch.randint(256, (96, 8, 8, 48), dtype=torch.uint8, generator=generator)
        split = (patches, torch.randint(10, (96,), generator=generator))
        return split, split


@pytest.fixture
def text(tmp_path):
    """Of a text of 2,000 characters, its last tenth all ``b`` and ``c``."""
    (tmp_path / "some.txt").write_text("a bad cab. " * 164 + "bc" * 98, encoding="utf-8")
    return Text(str(tmp_path / "some.txt"), length=8, layers=2, width=8, heads=2)


@pytest.mark.parametrize(("kind", "rate"), [("images", 0.05), ("text", 1.0)])
def test_averaged_gradients_of_stacked_workers_are_one_models_on_all_examples(kind, rate, text):
    """The same examples in one batch, by one worker; and local steps are something else."""
    problem = FewImages() if kind == "images" else text
    seen = []

    def remember(parameters, rate):
        seen.append(parameters)
        return rows.sgd(parameters, rate)

    ends = []
    for workers, batch, algorithm in ((4, 6, AllReduce()), (1, 24, AllReduce()), (4, 6, LocalSGD(3))):
        seen.clear()
        outcome = train(problem, Training(workers, batch, 6, 2), algorithm, remember, rate, 1, False)
        ends.append(torch.cat([value.detach().flatten() for value in seen[0]]))
        with torch.no_grad():
            assert outcome.rating == pytest.approx(problem.rating(seen[0], problem.data(False)[1]))
        gradients = sum(value.numel() for value in problem.initial(1)) * 4 / 1e6
        syncs = 2 if isinstance(algorithm, LocalSGD) else 6
        assert outcome.mb == pytest.approx(syncs * gradients * 2 * (workers - 1) / workers, rel=0.1)
    assert (ends[0] - ends[1]).abs().max() < 1e-5
    assert (ends[0] - ends[2]).abs().max() > 1e-4


def test_fused_optimizers_get_gradients_that_lie_as_parameters_do(text):
    """They go through memory as it lies, and vmap makes gradients of other strides."""

    def train_with(fused):
        def inner(parameters, rate):
            seen.append(parameters)
            return [torch.optim.AdamW(parameters, rate, eps=1e-3, fused=fused)]

        seen = []
        train(text, Training(2, 4, 4, 1), LocalSGD(2), inner, 0.01, 1, False)
        return torch.cat([value.detach().flatten() for value in seen[0]])

    torch.testing.assert_close(train_with(fused=True), train_with(fused=False), atol=1e-5, rtol=0)


def test_the_stacked_loss_and_gradients_are_those_of_each_model(text):
    """Of the GPT as it is: no vmap, and the attention that torch takes by itself."""
    models = [GPT(len(set("a bad cab.")), 8, 2, 8, 2).double() for _ in range(3)]
    for seed, model in enumerate(models):
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), text.initial(seed), strict=True):
                parameter.copy_(value)
    stacked = [torch.stack(values).detach().requires_grad_() for values in zip(*map(_values, models), strict=True)]
    pieces = text.data(held_out=True)[0][0][:15].view(3, 5, -1)
    loss = text.loss(stacked, (pieces,))
    gradients = torch.autograd.grad(loss, stacked)
    own = []
    for rank, model in enumerate(models):
        logits = model(pieces[rank, :, :-1])
        own.append(nn.functional.cross_entropy(logits.flatten(0, 1), pieces[rank, :, 1:].flatten()))
        for ours, theirs in zip(gradients, torch.autograd.grad(own[-1], _values(model)), strict=True):
            torch.testing.assert_close(ours[rank], theirs, atol=1e-10, rtol=1e-10)
        with torch.no_grad():
            bits = text.rating(_values(model), (pieces[rank],))
        assert bits == pytest.approx(own[-1].item() / math.log(2), rel=1e-10)
    assert loss.item() == pytest.approx(sum(each.item() for each in own), rel=1e-10)
    hidden = [name for place, (name, _) in enumerate(models[0].named_parameters()) if place in text.hidden]
    assert len(hidden) == 2 * 4
    assert all(name.startswith("blocks.") and name.endswith(".weight") for name in hidden)


def _values(model):
    return list(model.parameters())


def test_the_end_of_a_text_is_for_tests_alone(text, tmp_path):
    b, c = (sorted(set("a bad cab.")).index(letter) for letter in "bc")
    parts = {held_out: text.data(held_out) for held_out in (True, False)}
    assert [len(part[0]) for parted in parts.values() for part in parted] == [202, 22, 224, 24]
    assert set(parts[False][1][0][-10:].flatten().tolist()) == {b, c}
    torch.testing.assert_close(parts[False][0][0][:202], parts[True][0][0])  # and what is held out is from its end
    (tmp_path / "short.txt").write_text("too short", encoding="utf-8")
    with pytest.raises(ValueError, match="too short: the part that rates has no 33 characters"):
        Text(str(tmp_path / "short.txt")).data(held_out=False)


def test_the_network_is_convolutions_of_patches():
    values = FewImages().initial(0)
    pixels = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    ours = images.logits([value[None] for value in values], images.cut(pixels)[None])[0]
    x = pixels.float() / 64 - 2
    for layer, size in zip((0, 2, 4), (4, 2, 2), strict=True):
        kernels = values[layer].T.unflatten(1, (size, size, -1)).permute(0, 3, 1, 2)
        x = nn.functional.conv2d(x, kernels, values[layer + 1], stride=size).relu()
    theirs = x.permute(0, 2, 3, 1).flatten(1) @ values[6] + values[7]
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["images", "text"])
def test_every_preset_has_a_row(name):
    table = rows.TABLES[name]
    made = {type(row.make(0.1)) for row in table.rows.values()}
    assert made >= {type(algorithm) for algorithm in PRESETS.values()}
    assert set(PRESETS) - {"allreduce"} <= set(table.rows)


@pytest.mark.parametrize("table", rows.TABLES.values(), ids=rows.TABLES)
def test_every_optimizer_has_a_rate_to_begin_with(table):
    assert {row.inner for row in table.rows.values()} == set(table.rates)


@pytest.mark.parametrize("name", ["text", "momenta"])
def test_no_row_is_there_twice(name):
    made = [(repr(row.make(0.1)), row.inner, row.accumulate) for row in rows.TABLES[name].rows.values()]
    assert len(set(made)) == len(made)


def test_muon_takes_hidden_matrices_alone(text):
    for problem in (FewImages(), text):
        parameters = [nn.Parameter(value) for value in problem.initial(0)]
        muon, adamw = rows.inner_of("Muon", problem)(parameters, 0.02)
        taken = [p for group in muon.param_groups for p in group["params"]]
        assert [id(p) for p in taken] == [id(p) for i, p in enumerate(parameters) if i in problem.hidden]
        assert len(taken) + sum(len(group["params"]) for group in adamw.param_groups) == len(parameters)


@pytest.mark.parametrize("task", ["images", "text"])
def test_the_search_goes_on_from_a_best_that_is_the_last_on_its_side(task, tmp_path, monkeypatch):
    table, better = rows.TABLES[task], (1 if task == "images" else -1)
    centre = table.rates[table.rows["ddp"].inner]
    scores = {factor * centre: better * merit for factor, merit in ((0.5, 1.0), (1, 2.0), (2, 3.0), (4, 4.0))}
    scores[8 * centre] = math.nan
    monkeypatch.setattr(side_by_side, "train", lambda *a: Outcome(scores[a[4]], 1.0))
    made = [tmp_path / "runs.json", table, "", Training()]
    found = side_by_side.search(side_by_side.Runs(*made), "ddp")
    assert found == {rate: better * score for rate, score in scores.items() if score == score} | {8 * centre: -math.inf}
    assert side_by_side.tuned(side_by_side.Runs(*made), "ddp", momenta=False) == (4 * centre, None)
    monkeypatch.setattr(side_by_side, "train", None)  # what is known is not trained again
    assert side_by_side.tuned(side_by_side.Runs(*made), "ddp", momenta=False) == (4 * centre, None)


def runs_of(values):
    """Three final runs and a search for each row."""
    known = {}
    for name, ratings, mb in values:
        known[f"{name} | rate 0.04 | seed 101 | held out"] = [ratings[0], mb]
        known |= {f"{name} | rate 0.04 | seed {seed}": [value, mb] for seed, value in enumerate(ratings, start=1)}
    return known, dict.fromkeys((name for name, _, _ in values), "SGD")


def test_the_front_intervals_and_files(tmp_path):
    known, inner = runs_of([("ddp", (50, 51, 52), 40), ("slowmo", (49, 52, 52), 3), ("bmuf", (40, 41, 42), 3)])
    known["ddp | rate 0.04 | seed 4"] = [None, None]
    known["slowmo | rate 0.02 | seed 101 | held out"] = [99.0, 3]  # has no final runs
    entries = frontier.entries(known, inner, ACCURACY)
    assert [(e.name, e.mean) for e in entries] == [("ddp", 51.0), ("slowmo", 51.0), ("bmuf", 41.0)]
    assert [e.name for e in frontier.front(entries)] == ["slowmo"]
    assert frontier.half_interval([1.0, 2.0, 3.0]) == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    first, _ = frontier.against(entries, entries[0])
    assert first == "* slowmo (7.5 % of the bytes): +0.00 ± 2.48, 3 seeds"
    frontier.write(known, inner, ACCURACY, tmp_path)
    assert (tmp_path / "over_mb.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "table.md").read_text()
    assert "| | inside | rate | test accuracy, % |" in table
    assert "| **slowmo** | SGD | 0.04 | 51.00 ± 4.30 | 3 | 7.5 | 3 |" in table
    assert "| 3, and 1 diverged |" in table


def test_fewer_bits_are_better(tmp_path):
    known, inner = runs_of([("ddp", (3.0, 3.1, 3.2), 40), ("slowmo", (3.2, 3.3, 3.1), 3), ("bmuf", (4.1, 4.0, 4.2), 3)])
    known["ddp | rate 0.08 | seed 101 | held out"] = [None, None]  # diverged: not the best because it has no bits
    known["ddp | rate 0.08 | seed 1"] = [9.0, 40]
    entries = frontier.entries(known, inner, BITS)
    assert [e.name for e in entries] == ["ddp", "slowmo", "bmuf"]
    assert [e.name for e in frontier.front(entries)] == ["slowmo", "ddp"]
    assert frontier.highlights(entries) == ["ddp", "slowmo"]
    frontier.write(known, inner, BITS, tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert "| | inside | rate | test bits per character | MB" in table
    assert "| **slowmo** | SGD | 0.04 | 3.200 ± 0.248 | 3 | 7.5 | 3 |" in table
    assert "seed by seed, lower is better, with at most 10% of its bytes" in table
    assert "* slowmo (7.5 % of the bytes): +0.100 ±" in table
    figure = Figure()
    axes = figure.subplots()
    frontier._rate_upwards(axes, entries)
    assert axes.yaxis_inverted()


def test_a_measures_merit_is_higher_for_what_is_better():
    assert ACCURACY.merit(51.0) > ACCURACY.merit(50.0) > ACCURACY.merit(None)
    assert BITS.merit(2.0) > BITS.merit(3.0) > BITS.merit(None)
    assert Measure("x", 1).merit(-1e9) > -math.inf
