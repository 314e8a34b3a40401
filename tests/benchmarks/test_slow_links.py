"""The benchmark of slow links: what it computes without rights, and a small run of it where namespaces can be made."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tqdm import tqdm

from benchmarks import network
from benchmarks.contenders import LATE, NEVER, ROWS, Setting, period
from benchmarks.network import MTU, Link, Network, Unavailable, build_commands, check, interface_bytes, stale
from benchmarks.slow_links import (
    Bench,
    Job,
    Outcome,
    curve,
    draw,
    expected_steps,
    measure,
    model_shapes,
    steps_for,
    summarize,
    table,
    warmup_of,
    windows,
    write,
)
from lightning_slowmo import PRESETS, Gossip, LocalSGD, SlowMo
from lightning_slowmo.communication import probe
from lightning_slowmo.plan import DDP
from tests.harness import WorkerFailed, run_trainers

# Without rights -------------------------------------------------------------------------------------------------------


def test_the_bucket_holds_a_packet_and_about_a_millisecond():
    assert [Link(rate).burst for rate in (1e7, 1e8, 1e9)] == [MTU + 100, 12_500, 125_000]
    assert all(Link(rate).largest <= Link(rate).burst for rate in (1e7, 1e8, 1e9, 1e11))
    assert (Link(1e8, burst_seconds=0.011).burst, Link(1e8, burst_seconds=0.011).largest) == (137_500, 65_536)
    assert Link(1e8).arguments() == ["tbf", "rate", "100000000bit", "burst", "12500", "limit", "2500000"]


def test_every_host_gets_a_cable_that_is_shaped_at_both_ends():
    lines = [" ".join(command) for command in build_commands("slowlinks-7", 3, Link(1e8))]
    for host in range(3):
        assert f"ip netns add slowlinks-7-{host}" in lines
        shaped = [line for line in lines if line.startswith("tc") and (f"-7-{host} " in line or f"port{host} " in line)]
        assert len(shaped) == 2
        assert all("tbf rate 100000000bit" in line for line in shaped)
    assert len({network.address(host) for host in range(1000)}) == 1000


def test_only_namespaces_of_dead_runs_are_stale():
    names = ["slowlinks-7-0", "slowlinks-7-switch", "slowlinks-8-0", "slowlinks-x-0", "other-7-0", "slowlinks-7"]
    assert stale(names, alive={8}) == ["slowlinks-7-0", "slowlinks-7-switch"]
    assert [" ".join(command) for command in network.cleanup_commands(["slowlinks-7-0"])] == [
        "ip netns delete slowlinks-7-0"
    ]


def test_missing_tools_and_rights_are_named(monkeypatch):
    monkeypatch.setattr(network.shutil, "which", lambda tool: None)
    with pytest.raises(Unavailable, match="ip and tc cannot be found: install iproute2"):
        check()
    monkeypatch.setattr(network.shutil, "which", lambda tool: f"/usr/sbin/{tool}")
    monkeypatch.setattr(network.os, "geteuid", lambda: 1000)
    with pytest.raises(Unavailable, match="need root"):
        check()


@pytest.mark.parametrize("reason", ["Error: Specified qdisc kind is unknown.", "Error: Unknown device type."])
def test_a_missing_kernel_module_is_named(monkeypatch, reason):
    failed = subprocess.CompletedProcess([], 2, "", reason)
    monkeypatch.setattr(network.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(Unavailable, match=r"`tc qdisc` failed: .* The kernel lacks that module \(sch_tbf"):
        network._run(["tc", "qdisc"])


def test_the_interface_is_found_among_others():
    text = (
        "Inter-|   Receive                                                |  Transmit\n"
        " face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets\n"
        "    lo:     100       1    0    0    0     0          0         0      100       1    0    0    0    0    0\n"
        "  eth0:    1234      12    0    0    0     0          0         0     5678      20    0    0    0    0    0\n"
    )
    assert interface_bytes(text) == (5678, 1234)


def test_windows_are_whole_periods_after_the_warm_up():
    marks = [(float(step), 100 * step) for step in range(1, 13)]
    assert windows(marks, warmup=4, period=4) == ([1.0, 1.0], 100.0)
    uneven = [*marks[:8], *((seconds + 4, sent) for seconds, sent in marks[8:])]
    assert windows(uneven, warmup=4, period=4)[0] == [1.0, 2.0]
    with pytest.raises(ValueError, match="no period of 12"):
        windows(marks, warmup=12, period=12)


def test_as_many_steps_as_the_budget_allows():
    assert warmup_of(1) == 4
    assert warmup_of(5) == 5
    assert warmup_of(12) == 12
    assert steps_for(6, 12, 0.1) == 12 + 5 * 12
    assert steps_for(6, 12, 10.0) == 12 + 2 * 12
    assert steps_for(6, 1, 10.0) == 4 + 3


def test_workers_are_averaged_and_periods_are_not():
    quick = Outcome([(0.1 * step, 10 * step) for step in range(1, 9)], [(4, 0.4, 30, 100), (8, 0.8, 60, 100)])
    slow = Outcome([(0.3 * step, 30 * step) for step in range(1, 9)], [(4, 1.2, 50, 100), (8, 2.4, 80, 100)])
    assert measure([quick, slow], 1) == pytest.approx((0.2, 20))
    assert curve([quick, slow]) == [(4, pytest.approx(0.8), 40.0), (8, pytest.approx(1.6), 70.0)]


RESULT = {
    "hosts": 4,
    "rate": 1e8,
    "link": {"bandwidth": 9.9e7, "latency": 2e-4},
    "burst_ms": 1.0,
    "sync_every": 12,
    "runs": 3,
    "seconds": 0,
    "timings": {
        "compute": {"seconds": [0.1, 0.2, 0.1], "bytes": [0, 0, 0]},
        "ddp": {"seconds": [1.1, 1.2, 1.3], "bytes": [12.5e6] * 3},
        "slowmo": {"seconds": [0.2, 0.3, 0.2], "bytes": [1.25e6] * 3},
    },
    "predicted": {"ddp": 1.1, "slowmo": 0.19},
    "failed": {},
    "accuracy": {"slowmo": [(10, 2.0, 30.0), (20, 4.0, 55.5)]},
}


def test_ratios_are_taken_within_a_run():
    rows = {row["strategy"]: row for row in summarize(RESULT)}
    assert rows["slowmo"]["to_compute"] == pytest.approx(2.0)
    assert rows["slowmo"]["to_limit"] == pytest.approx(1.0)
    assert rows["slowmo"]["ddp_to"] == pytest.approx(5.5)
    assert rows["slowmo"]["mb_to_ddp"] == pytest.approx(0.1)
    assert rows["ddp"]["predicted_to"] == pytest.approx(1.1 / 1.2)
    assert rows["slowmo"]["accuracy"] == 55.5
    lines = table(list(rows.values())).splitlines()
    assert lines[-1] == "| `slowmo` | 200 | 2.00 | 1.000 | 5.5 | 1.25 | 0.1000 | 0.95 | 20 | 4 | 55.5 |"
    assert len({line.count("|") for line in lines}) == 1


class Broken(Bench):
    """On which only computing works."""

    def __init__(self) -> None:
        pass

    def train(self, job, expected, bar):
        if job.name != "compute":
            raise WorkerFailed("a worker died")
        return []


def test_a_row_that_fails_is_left_out_and_named(tmp_path):
    result = RESULT | {"timings": dict(RESULT["timings"]), "failed": {}, "predicted": {}, "accuracy": {}}
    with tqdm(disable=True) as bar:
        for _ in range(2):
            assert Broken().attempt(Job("slowmo", Setting(), 4), 1.0, bar, result) is None
        assert Broken().attempt(Job("compute", Setting(), 4), 1.0, bar, result) == []
    text = write(result, tmp_path / "out")
    assert "Failed: slowmo." in text
    assert "| `slowmo` |" not in text
    assert json.loads((tmp_path / "out.json").read_text())["failed"] == {"slowmo": "a worker died"}


def test_columns_that_nobody_has_are_left_out():
    assert "accuracy" not in table(summarize(RESULT | {"accuracy": {}}))


def test_the_picture_is_drawn(tmp_path):
    draw(RESULT, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_every_preset_is_a_row_under_the_common_period():
    assert set(PRESETS) < set(ROWS)
    setting = Setting(sync_every=24, warmup_steps=3)
    rows = {name: make(setting) for name, make in ROWS.items()}
    assert rows["slowmo"].planned == SlowMo(sync_every=24)
    assert rows["diloco"].period == rows["periodic_averaging"].period == rows["compute"].period == 24
    assert rows["compute"].planned == LocalSGD(NEVER)
    assert rows["ddp"].planned == DDP()
    assert rows["apmsqueeze"].planned.warmup_steps == 3
    assert (rows["squarm_sgd"].period, rows["sgp"].period, rows["osgp"].period) == (5, 1, LATE)
    assert period(SlowMo(LocalSGD(4), sync_every=6)) == 12
    assert period(SlowMo(Gossip(), sync_every=48)) == 48


def test_every_row_has_a_prediction():
    expected = expected_steps(list(ROWS), Setting(), 4, 0.1, probe.Link(1e8, 2e-4), {})
    assert set(expected) == set(ROWS)
    assert expected["compute"] == pytest.approx(0.1)
    assert 4 < expected["ddp"] / expected["slowmo"] < 8


def test_the_model_is_as_large_as_the_paper_s():
    import math

    assert sum(map(math.prod, model_shapes())) == pytest.approx(2.2e6, rel=0.01)


# With rights ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rights():
    try:
        check()
    except Unavailable as reason:
        pytest.skip(str(reason))


def ours() -> list[str]:
    """Namespaces of this benchmark that exist."""
    folder = network.NAMESPACES
    return [path.name for path in folder.iterdir() if path.name.startswith(network.PREFIX)] if folder.exists() else []


def alive(names: list[str], process: int) -> list[str]:
    return [name for name in names if name.startswith(f"{network.PREFIX}-{process}-")]


def crash(rank: int, namespaces: list[str]) -> None:
    network.enter(namespaces[rank])
    assert sum(interface_bytes()) >= 0  # there is an eth0
    raise RuntimeError("a crash")


def test_the_network_goes_when_a_worker_crashes_and_takes_leftovers_along(rights):
    gone = subprocess.Popen(["true"])
    gone.wait()
    leftover = f"{network.PREFIX}-{gone.pid}-0"
    subprocess.run(["ip", "netns", "add", leftover], check=True)
    made = Network(2, 1e8)
    with made:
        assert leftover not in ours()
        assert len(alive(ours(), os.getpid())) == 3
    with pytest.raises(WorkerFailed, match="a crash"), made:
        run_trainers(2, crash, [made.name(0), made.name(1)], limit=30)
    assert not alive(ours(), os.getpid())


def command(*options: str, out: Path) -> list[str]:
    small = ["--hosts", "2", "--runs", "1", "--budget", "1", "--sync-every", "4", "--batch", "2", "--test-images", "40"]
    return [sys.executable, "-m", "benchmarks.slow_links", *small, "--out", str(out), *options]


@pytest.mark.faults
@pytest.mark.processes
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_the_network_goes_when_the_benchmark_is_stopped(rights, tmp_path, how):
    process = subprocess.Popen(
        command("--strategies", "slowmo", out=tmp_path / "out"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 200
        while len(alive(ours(), process.pid)) < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(3)  # until workers are on the hosts
        process.send_signal(how)
        assert process.wait(120) != 0
    finally:
        process.kill()
    assert not alive(ours(), process.pid)


@pytest.mark.faults
@pytest.mark.processes
def test_two_hosts_send_what_theory_says(rights, tmp_path):
    out = tmp_path / "out"
    done = subprocess.run(
        command("--strategies", "ddp", "slowmo", "--rate", "1gbit", "--steps", "8", out=out),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {row["strategy"]: row for row in summarize(json.loads(out.with_suffix(".json").read_text()))}
    whole = 4 * 2_208_266 / 1e6  # 2 (n - 1) / n of it for two workers
    assert rows["compute"]["mb"] < 1e-3
    assert rows["ddp"]["mb"] == pytest.approx(whole, rel=0.02)
    assert rows["slowmo"]["mb"] == pytest.approx(whole / 4, rel=0.02)
    assert all(0 <= rows[name]["accuracy"] <= 100 and rows[name]["steps"] == 8 for name in ("ddp", "slowmo"))
    assert rows["slowmo"]["predicted_to"] > 0
    assert out.with_suffix(".md").read_text().count("| `slowmo` |") == 1
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert not alive(ours(), os.getpid())
