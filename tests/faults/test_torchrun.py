"""Real processes from the command line: torchrun restarts those that die, and they go on by themselves."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults import digits
from tests.harness import free_port

STEPS = 400
LIMIT = 400.0
ROOT = Path(__file__).parents[2]


def torchrun(folder, *arguments):
    return python(folder, "-m", "torch.distributed.run", *arguments)


def python(folder, *arguments):
    return subprocess.Popen(
        [sys.executable, *arguments, "-m", "tests.faults.digits", str(folder), str(STEPS)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=open(folder / "stderr", "a"),
        start_new_session=True,
    )


def workers_of(agent):
    """The processes that an agent has started."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    return [int(child) for child in children if b"tests.faults.digits" in Path(f"/proc/{child}/cmdline").read_bytes()]


def wait_until(true, agents, deadline):
    while not true():
        assert time.monotonic() < deadline, "too late"
        assert any(agent.poll() is None for agent in agents), "all agents have ended"
        time.sleep(0.05)


def wait_until_gone(pid, deadline):
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split(") ")[1][:1]:
        assert time.monotonic() < deadline, "still alive"
        time.sleep(0.05)


def end(agents):
    """Whatever happens, nothing stays behind."""
    for agent in agents:
        for pid in workers_of(agent) if agent.poll() is None else ():
            os.kill(pid, signal.SIGKILL)
        agent.kill()
        agent.wait()


def check(folder, sizes):
    lives = digits.diary(folder, "start")
    assert [life["size"] for life in lives] == sizes
    steps = [life["step"] for life in lives]
    assert steps == sorted(steps)
    for life in lives[1:]:
        assert life["step"] > 0
        assert life["momentum"][0] > 0
    (ended,) = digits.diary(folder, "end")
    assert ended["step"] == STEPS
    assert ended["loss"] < 0.5
    return steps


@pytest.mark.faults
@pytest.mark.processes
def test_torchrun_restarts_killed_workers_which_resume_by_themselves(tmp_path):
    deadline = time.monotonic() + LIMIT
    agent = torchrun(tmp_path, "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2", "--max-restarts=3")
    try:
        for life in (1, 2):
            wait_until(lambda: len(digits.diary(tmp_path, "start")) == life, [agent], deadline)  # noqa: B023
            saved = (digits.steps_saved(tmp_path) or [0])[-1]
            wait_until(lambda: (digits.steps_saved(tmp_path) or [0])[-1] > saved, [agent], deadline)  # noqa: B023
            os.kill(workers_of(agent)[life % 2], signal.SIGKILL)
        assert agent.wait(max(1.0, deadline - time.monotonic())) == 0, (tmp_path / "stderr").read_text()[-3000:]
    finally:
        end([agent])
    check(tmp_path, [2, 2, 2])


@pytest.mark.faults
@pytest.mark.processes
def test_an_elastic_job_goes_on_with_fewer_nodes_when_one_disappears(tmp_path):
    deadline = time.monotonic() + LIMIT
    port = free_port()
    agents = [
        torchrun(
            tmp_path,
            "--nnodes=1:2",
            "--nproc-per-node=1",
            "--max-restarts=3",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint=127.0.0.1:{port}",
            "--rdzv-id=digits",
            "--rdzv-conf=last_call_timeout=15,keep_alive_interval=1,keep_alive_max_attempt=3",
            "--local-addr=127.0.0.1",
        )
        for _ in range(2)
    ]
    try:
        wait_until(lambda: len(digits.steps_saved(tmp_path)) > 0, agents, deadline)
        lost = agents[1]  # the first one holds the rendezvous
        (worker,) = workers_of(lost)
        lost.kill()
        os.kill(worker, signal.SIGKILL)
        assert agents[0].wait(max(1.0, deadline - time.monotonic())) == 0, (tmp_path / "stderr").read_text()[-3000:]
    finally:
        end(agents)
    check(tmp_path, [2, 1])


@pytest.mark.faults
@pytest.mark.processes
@pytest.mark.parametrize("who", ["the first", "the second"])
def test_sigterm_to_one_process_of_lightnings_own_launcher_ends_both_at_one_sync(tmp_path, who):
    deadline = time.monotonic() + LIMIT
    first = python(tmp_path)
    try:
        wait_until(lambda: len(digits.steps_saved(tmp_path)) > 0, [first], deadline)
        (second,) = workers_of(first)
        os.kill(first.pid if who == "the first" else second, signal.SIGTERM)
        assert first.wait(max(1.0, deadline - time.monotonic())) == 0  # Lightning exits with no code of its own
        wait_until_gone(second, deadline)
    finally:
        end([first])
    one, other = digits.diary(tmp_path, "exception")
    assert one["error"] == other["error"] == "SIGTERMException"
    assert one["step"] == other["step"]
    assert one["step"] % digits.SYNC_EVERY == 0
