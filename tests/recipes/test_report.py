"""The report on real runs, short ones on digits, and on folders in which there are none."""

import csv
import json
import re
import shutil
import statistics
import struct
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from recipes.record import Record
from recipes.report import summary
from recipes.report.__main__ import main
from recipes.report.plots import INK, curve, sweeps
from recipes.report.runs import find, group
from tests.recipes.small_runs import run_all

COMMON = ["trainer.max_epochs=2", "trainer.limit_train_batches=12"]
FIXED = {"ddp": [1, 2], "local_sgd": [1, 2], "sgp": [1, 2], "slowmo_sgp": [1, 2]}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """What four strategies left, and a sweep of two numbers of a fifth."""
    folder = tmp_path_factory.mktemp("outputs")
    runs = {folder / f"{name}_{seed}": [f"strategy={name}", f"seed={seed}"] for name in FIXED for seed in FIXED[name]}
    for every in (6, 12):
        for momentum in (0.2, 0.6):
            choice = [f"strategy.algorithm.sync_every={every}", f"strategy.algorithm.slow_momentum={momentum}"]
            for seed in (1, 2):
                runs[folder / f"slowmo_{every}_{momentum}_{seed}"] = ["strategy=slowmo", *choice, f"seed={seed}"]
    run_all({where: [*overrides, *COMMON] for where, overrides in runs.items()})
    return folder


@pytest.fixture
def problem(outputs):
    (problem,), _ = group(find([outputs])[0])
    return problem


def named(problem, name):
    (found,) = [each for each in problem.groups if problem.name(each) == name]
    return found


@pytest.mark.processes
def test_runs_that_differ_in_the_seed_alone_are_one_row(outputs, problem):
    names = [problem.name(each) for each in problem.groups]
    swept = [f"slowmo, sync_every={every}, slow_momentum={beta}" for every in (6, 12) for beta in (0.2, 0.6)]
    assert names == ["ddp", "local_sgd", *swept, "sgp", "slowmo_sgp"]
    assert all(each.seeds == [1, 2] for each in problem.groups)
    assert problem.common == tuple(sorted(COMMON))
    values = [Record.read(outputs / f"sgp_{seed}").value for seed in (1, 2)]
    sgp = named(problem, "sgp")
    assert sgp.mean == pytest.approx(sum(values) / 2)
    assert sgp.spread == pytest.approx(abs(values[0] - values[1]) / 2**0.5)


@pytest.mark.processes
def test_the_table_says_what_the_records_say(outputs, tmp_path, capsys):
    main([str(outputs), "--out", str(tmp_path), "--title", "Digits"])
    printed = capsys.readouterr().out
    text = (tmp_path / "table.md").read_text()
    assert text.startswith(printed.partition("\n\nWritten to")[0])
    records = [Record.read(outputs / f"ddp_{seed}") for seed in (1, 2)]
    cells = [cell.strip() for cell in re.search(r"^\| ddp \|(.*)\|$", text, re.MULTILINE)[1].split("|")]
    values = [record.value for record in records]
    assert cells[0] == f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
    assert float(cells[1]) == pytest.approx(records[0].mb_sent, abs=6e-5)
    assert cells[3:] == ["24", "2", "2"]
    assert "python -m recipes.train --multirun strategy=ddp trainer.max_epochs=2" in text
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert float(rows["ddp"]["mean"]) == pytest.approx(statistics.mean(values))
    assert (rows["slowmo_sgp"]["sync_every"], rows["slowmo_sgp"]["paper"]) == ("48", "")


@pytest.mark.processes
def test_the_plots_are_pictures_and_their_points_are_logged_numbers(outputs, problem, tmp_path):
    main([str(outputs), "--out", str(tmp_path)])
    names = ["over_mb", "over_seconds", "over_steps", "slow_momentum", "sync_every"]
    assert sorted(path.stem for path in tmp_path.glob("*.png")) == names
    for name in names:
        content = (tmp_path / f"{name}.png").read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        assert min(struct.unpack(">II", content[16:24])) > 400
    slowmo = named(problem, "slowmo, sync_every=6, slow_momentum=0.6")
    by_step, by_mb = (curve(slowmo, "val/accuracy", axis) for axis in ("steps", "mb"))
    assert [x for x, _, _ in by_step] == [12, 24]
    logged = []
    for seed in (1, 2):
        with (outputs / f"slowmo_6_0.6_{seed}" / "csv" / "metrics.csv").open(newline="") as file:
            logged.append([(float(row["progress/mb_sent"]), float(row["val/accuracy"]))
                           for row in csv.DictReader(file) if row["val/accuracy"]])  # fmt: skip
    for point, (_, mean, band), runs in zip(by_mb, by_step, zip(*logged, strict=True), strict=True):
        assert point[0] == pytest.approx(statistics.mean(mb for mb, _ in runs))
        assert point[1] == mean == pytest.approx(statistics.mean(value for _, value in runs))
        assert band == pytest.approx(statistics.stdev(value for _, value in runs))


@pytest.mark.processes
def test_sweeps_are_lines_over_one_number_with_the_other_one_fixed(problem):
    over_tau, over_beta = sweeps(problem, "sync_every"), sweeps(problem, "slow_momentum")
    assert {name: [each.record.sync_every for each in line] for name, line in over_tau.items()} == {
        "slowmo, β = 0.2": [6, 12],
        "slowmo, β = 0.6": [6, 12],
    }
    assert {name: [each.record.slow_momentum for each in line] for name, line in over_beta.items()} == {
        "slowmo, τ = 6": [0.2, 0.6],
        "slowmo, τ = 12": [0.2, 0.6],
    }


class Resources(HTMLParser):
    """Collects what a browser would fetch, and the names of all elements."""

    def __init__(self):
        super().__init__()
        self.fetched, self.tags = [], set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "srcset", "data", "poster"):
                self.fetched.append(value)


@pytest.mark.processes
def test_the_page_needs_nothing_but_itself(outputs, tmp_path):
    main([str(outputs), "--out", str(tmp_path), "--title", "A <title>"])
    page = (tmp_path / "index.html").read_text()
    parser = Resources()
    parser.feed(page)
    assert all(reference.startswith("#") for reference in parser.fetched)
    assert not parser.tags & {"script", "link", "img", "iframe", "object"}
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert page.count("<svg") == 5
    assert INK not in page
    assert "currentColor" in page
    assert "prefers-color-scheme: dark" in page
    assert "A &lt;title&gt;" in page
    assert str(outputs) not in page


@pytest.mark.processes
def test_unfinished_and_broken_runs_are_named_and_left_out(outputs, tmp_path, capsys):
    mixed = tmp_path / "mixed"
    shutil.copytree(outputs / "ddp_1", mixed / "good")
    for name in ("stopped", "no_number", "no_json", "other_json", "cut_csv"):
        shutil.copytree(outputs / "ddp_2", mixed / name)
    (mixed / "stopped" / "result.json").unlink()
    values = json.loads((mixed / "no_number" / "result.json").read_text())
    (mixed / "no_number" / "result.json").write_text(json.dumps(values | {"value": None}))
    (mixed / "no_json" / "result.json").write_text('{"experiment": "cut sho')
    (mixed / "other_json" / "result.json").write_text('{"accuracy": 93}')
    (mixed / "cut_csv" / "csv" / "metrics.csv").write_text("epoch,step,val/loss\n0,9,0.5\n0,nineteen,0.4\n")
    main([str(mixed), "--out", str(tmp_path / "report")])
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert len(lines) == 5
    for name in ("no_number cannot be read: value is None", "no_json cannot be read",
                 "other_json cannot be read", "cut_csv cannot be read: csv/metrics.csv is damaged"):  # fmt: skip
        assert sum(f"mixed/{name}" in line for line in lines) == 1, name
    assert re.fullmatch(r"Not finished, or failed: 1 \(.*mixed/stopped\)\.", lines[0])
    assert re.search(r"\| ddp \| [\d.]+ \|.*\| 1 \|", said.out)


@pytest.mark.processes
def test_of_two_runs_with_the_same_seed_the_later_counts(outputs, tmp_path):
    for name in ("first", "second"):
        shutil.copytree(outputs / "ddp_1", tmp_path / name)
    record = replace(Record.read(tmp_path / "second"), value=12.5)
    record.write(tmp_path / "second")
    problems, remarks = group(find([tmp_path])[0])
    assert [each.values for each in problems[0].groups] == [[12.5]]
    assert len(remarks) == 1
    assert "first is left out" in remarks[0]


def verdicts(outputs, tmp_path, values, paper=None, mode="max"):
    """What is said when SGP without and with SlowMo came to other values than in truth."""
    for name, pair in values.items():
        for seed, value in zip((1, 2), pair, strict=True):
            stands_for = paper and {
                "title": "SlowMo",
                "arxiv": "1",
                "table": "Table 1",
                "row": name,
                "value": paper[name],
            }
            record = Record.read(outputs / f"{name}_{seed}")
            replace(record, value=value, mode=mode, paper=stands_for).write(tmp_path / f"{name}_{seed}")
    (problem,), _ = group(find([tmp_path])[0])
    return [*summary.slowmo_lines(problem), *summary.order_lines(problem)]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("slow", "mode", "expected"),
    [
        ((93.0, 93.2), "max", "more than the larger spread (0.28): better with SlowMo."),
        ((93.0, 93.2), "min", "more than the larger spread (0.28): worse with SlowMo."),
        ((91.0, 91.2), "max", "more than the larger spread (0.28): worse with SlowMo."),
        ((92.0, 92.8), "max", "within the larger spread (0.57): no difference to be seen."),
        ((float("nan"), 92.8), "max", "no spread to hold that against."),
    ],
)
def test_a_difference_counts_if_it_exceeds_the_spread(outputs, tmp_path, slow, mode, expected):
    (line,) = verdicts(outputs, tmp_path, {"sgp": (92.0, 92.4), "slowmo_sgp": slow}, mode=mode)
    assert line.startswith("slowmo_sgp against sgp: ")
    assert line.endswith(expected)


@pytest.mark.processes
def test_the_papers_figures_stand_beside_ours(outputs, tmp_path):
    paper = {"ddp": 92.66, "sgp": 93.90, "slowmo_sgp": 94.32}
    values = {"ddp": (92.0, 92.4), "sgp": (91.0, 91.2), "slowmo_sgp": (93.0, 93.2)}
    pair, order = verdicts(outputs, tmp_path, values, paper)
    assert pair.endswith("better with SlowMo. The paper has +0.42.")
    assert "3 orderings of two of these rows, 2 are seen here" in order
    assert "1 are the other way round" in order
    (problem,), _ = group(find([tmp_path])[0])
    assert summary.head(problem)[2] == "paper"
    assert [row[2] for row in summary.rows(problem)] == ["92.66", "93.90", "94.32"]


@pytest.mark.processes
def test_the_curves_follow_another_metric(outputs, tmp_path):
    main([str(outputs), "--out", str(tmp_path), "--metric", "val/loss"])
    assert 'aria-label="val/loss over optimizer steps"' in (tmp_path / "index.html").read_text()
    with pytest.raises(SystemExit, match=r"No run logged 'val/lost'\. They logged: .*val/loss"):
        main([str(outputs), "--out", str(tmp_path), "--metric", "val/lost"])


def test_where_there_is_nothing_that_is_said(tmp_path):
    with pytest.raises(SystemExit, match="No finished run in"):
        main([str(tmp_path)])
    with pytest.raises(SystemExit, match="There is no folder"):
        main([str(tmp_path / "elsewhere")])
