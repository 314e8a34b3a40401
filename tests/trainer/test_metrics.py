"""What is logged at each sync, and that the totals are their sum."""

import csv

import pytest
from lightning.pytorch.loggers import CSVLogger

from lightning_slowmo import LocalSGD, SlowMo, SlowMoStrategy
from lightning_slowmo.communication.meeting import Header, Reason
from tests.harness import run_trainers
from tests.trainer.models import Regression, data, trainer

NAMES = ["bytes_sent", "bytes_received", "seconds", "count", "drift", "skipped"]


def train(rank, folder):
    reports = []
    for name, options in (("logged", {}), ("silent", {"log_syncs": False})):
        strategy = SlowMoStrategy(SlowMo(LocalSGD(5), sync_every=10), **options)
        logger = CSVLogger(folder, name, version="")
        fitting = trainer(2, strategy, logger=logger, max_steps=23, max_epochs=-1, log_every_n_steps=1000)
        fitting.fit(Regression(), data(rank))
        reports.append(vars(fitting.strategy.report))
    return reports


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("metrics")
    (report, silent), _ = run_trainers(2, train, str(folder))
    with open(folder / "logged" / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["sync/count"]]
    return folder, rows, report, silent


@pytest.mark.processes
def test_each_sync_logs_all_metrics_at_its_step(logged):
    _, rows, _, _ = logged
    # Loggers count from 0, as for Lightning's own metrics of a step: the fifth step is step 4.
    assert [int(row["step"]) for row in rows] == [4, 9, 14, 19]
    assert [float(row["sync/count"]) for row in rows] == [1, 2, 3, 4]
    for row in rows:
        values = {name: float(row[f"sync/{name}"]) for name in NAMES}
        numel = sum(parameter.numel() for parameter in Regression().parameters())
        header = 8 * len(Header(Reason.SYNC, pending=(0,)).numbers())  # float64, to the one other worker
        assert values["bytes_sent"] == values["bytes_received"] == numel * 4 + header
        assert 0 < values["seconds"] < 10
        assert 0 < values["drift"] < 1
        assert values["skipped"] == 0


@pytest.mark.processes
def test_the_report_after_fit_is_the_sum_of_what_was_logged(logged):
    _, rows, report, _ = logged
    assert report["count"] == len(rows)
    for name in ("bytes_sent", "bytes_received", "skipped", "seconds"):
        assert report[name] == pytest.approx(sum(float(row[f"sync/{name}"]) for row in rows)), name
    assert report["drift"] == pytest.approx(float(rows[-1]["sync/drift"]))


@pytest.mark.processes
def test_log_syncs_false_logs_nothing_and_counts_all_the_same(logged):
    folder, _, report, silent = logged
    assert "sync/" not in "".join(path.read_text() for path in folder.glob("silent/*.csv"))
    assert (silent["count"], silent["bytes_sent"]) == (report["count"], report["bytes_sent"])
