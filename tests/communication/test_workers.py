"""Workers: weighted sums, what they cost, and errors that name who did not come and why."""

import os
import signal
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from lightning_slowmo import SyncError, Workers
from lightning_slowmo.communication import nccl
from lightning_slowmo.communication.bulletin import all_at_once
from lightning_slowmo.communication.in_process import in_process, together
from lightning_slowmo.communication.pipeline import complete, start
from tests.harness import run
from tests.on_workers import on_workers


@on_workers(1, 2, 3)
def test_a_sum_is_the_sum_on_every_worker(workers):
    flat = torch.arange(5.0) + workers.rank
    sum = start(workers.sum(flat))
    n = workers.size
    assert sum.wait() == n
    assert flat.tolist() == [n * i + n * (n - 1) / 2 for i in range(5)]
    assert sum.wait() == n  # nothing is sent twice
    assert workers.traffic.collectives == (n > 1)


@on_workers(2, 3)
def test_workers_weigh_as_much_as_they_are_given(workers):
    weights = [2.0, 6.0, 4.0][: workers.size]
    flat = torch.full((4,), 1.0 + workers.rank, dtype=torch.float64)
    mean = flat.div_(complete(workers.sum(flat, weights)))
    expected = torch.tensor([(2 + 12) / 8, (2 + 12 + 12) / 12][workers.size - 2], dtype=torch.float64)
    torch.testing.assert_close(mean, expected.expand(4))


@on_workers(2, 3)
def test_a_worker_of_weight_zero_gets_the_mean_and_poisons_nobody(workers):
    values = torch.full((3,), 5.0) if workers.rank else torch.tensor([float("nan"), float("inf"), -float("inf")])
    weight = complete(workers.sum(values, [0.0] + [3.0] * (workers.size - 1)))
    assert (values / weight).tolist() == [5.0] * 3


@on_workers(2, 3, 4)
def test_a_sum_sends_and_receives_what_a_ring_does(workers):
    for dtype, size in ((torch.float32, 4), (torch.float64, 8)):
        before = workers.traffic.copy()
        complete(workers.sum(torch.zeros(1200, dtype=dtype)))
        used = workers.traffic - before
        assert used.sent == used.received == 2 * (workers.size - 1) * 1200 * size // workers.size
        assert (used.collectives, used.headers) == (1, 0)


@on_workers(2, 3)
def test_headers_are_gathered_exactly_and_counted(workers):
    before = workers.traffic.copy()
    rows = workers.gather([workers.rank, 2**53 - 1, -0.1])
    assert rows == [[rank, 2**53 - 1, -0.1] for rank in range(workers.size)]
    used = workers.traffic - before
    assert used.sent == used.received == (workers.size - 1) * 3 * 8
    assert (used.collectives, used.headers) == (0, 1)


@on_workers(1, 2, 3)
def test_texts_of_any_length_and_alphabet_are_gathered(workers):
    texts = ["γ = αβ", "", "x" * 3000][: workers.size]
    assert workers.gather_text(texts[workers.rank]) == texts
    assert workers.gather_text("") == [""] * workers.size


@on_workers(2, 3)
def test_a_broadcast_costs_its_source_and_its_receivers_once(workers):
    before = workers.traffic.copy()
    tensor = torch.full((10,), float(workers.rank))
    workers.broadcast(tensor, source=1)
    used = workers.traffic - before
    assert tensor.tolist() == [1.0] * 10
    assert (used.sent, used.received) == ((40, 0) if workers.rank == 1 else (0, 40))


def test_a_worker_alone_needs_no_process_group():
    workers = Workers()
    flat = torch.arange(3.0)
    assert (workers.alone, workers.rank, workers.size) == (True, 0, 1)
    assert complete(workers.sum(flat, [4.0])) == 1
    assert flat.tolist() == [0, 1, 2]
    assert workers.gather([1.5]) == [[1.5]]
    workers.broadcast(flat)
    workers.report_failure("nobody listens")
    assert vars(workers.traffic) == {"sent": 0, "received": 0, "collectives": 0, "headers": 0}


def absent(rank: int) -> str:
    workers = Workers.from_world(timeout=timedelta(seconds=2))
    outcome = "was late"
    if rank != 1:
        start = time.monotonic()
        with pytest.raises(SyncError) as caught:
            workers.gather([1.0], "the meeting before sync")
        assert time.monotonic() - start < 15
        outcome = str(caught.value)
    dist.barrier()  # the late worker ends last, so nobody sees a closed connection instead
    return outcome


def test_whoever_does_not_come_in_time_is_named():
    for rank, message in enumerate(run(3, absent)):
        if rank != 1:
            assert f"rank {rank} could not meet the other workers for the meeting before sync." in message
            assert "Did not come (within 0:00:02): rank 1." in message


def of_sizes(rank: int) -> tuple[int, str]:
    same = Workers.from_world(bucket_cap_mb=25).sizes.bucket_bytes
    try:
        Workers.from_world(bucket_cap_mb=25 if rank else None)
    except ValueError as error:
        return same, str(error)
    return same, "no error"


@pytest.mark.processes
def test_messages_are_of_one_size_on_all_workers():
    for size, error in run(2, of_sizes):
        assert size == 25 * 2**20
        assert error == "bucket_cap_mb must be equal on all workers, got [None, 25.0]."


def failing(rank: int) -> str:
    workers = Workers.from_world(timeout=timedelta(seconds=2))
    if rank == 1:
        workers.report_failure("OutOfMemoryError: on purpose")
        dist.barrier()
        return ""
    with pytest.raises(SyncError) as caught:
        complete(workers.sum(torch.zeros(3)))
    dist.barrier()
    return str(caught.value)


def test_whoever_failed_is_named_with_its_reason():
    message = run(2, failing)[0]
    assert "rank 1 failed: OutOfMemoryError: on purpose" in message
    assert "the sum of the parameters" in message


class EndsAsPatienceDoes:
    """Work that ends just after a look at it has been given up: what a busy machine makes of any."""

    ended = False

    def is_completed(self) -> bool:
        return self.ended

    def wait(self, timeout: timedelta) -> None:
        if not self.ended:
            self.ended = True
            raise RuntimeError("Operation timed out!")


class EndsInFailure(EndsAsPatienceDoes):
    """The same, but it has failed."""

    def wait(self, timeout: timedelta) -> None:
        super().wait(timeout)
        raise RuntimeError("Connection closed by peer")


@on_workers(2)
def test_headers_that_come_as_patience_ends_have_come(workers):
    workers.transport._wait_and_look(EndsAsPatienceDoes(), "a test", time.monotonic())
    if workers.rank == 0:  # whoever has failed need not be asked twice
        with pytest.raises(SyncError, match="Connection closed by peer"):
            workers.transport._wait_and_look(EndsInFailure(), "a test", time.monotonic())


def killed(rank: int) -> str:
    workers = Workers.from_world(timeout=timedelta(seconds=10))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(SyncError) as caught:
        complete(workers.sum(torch.zeros(3)))
    return str(caught.value)


def test_whoever_was_killed_is_named_in_a_plain_loop_too():
    message = run(2, killed, expect_failure=True)[0]
    assert "Ended without a word, or lost its connection: rank 1." in message


def living_on(rank: int, operation: str) -> tuple[str, float, float, int]:
    workers = Workers.from_world(timeout=timedelta(seconds=30))
    aborted: list[str] = []
    workers.transport.failures.abort.append(lambda: aborted.append("as if by NCCL"))
    workers.listen(True)
    workers.gather([0.0])
    if rank == 1:
        workers.report_failure("ValueError: on purpose")
        time.sleep(4)  # it has caught its exception, and lives on
        return "", 0.0, 0.0, 0
    start, text = time.monotonic(), "no error"
    try:
        with workers.naming("a test"):
            if operation == "a collective of others":
                dist.all_reduce(torch.zeros(1))
            elif operation == "a message":
                complete(workers.send_and_receive(torch.zeros(1), [], [1]))
            else:
                complete(workers.sum(torch.zeros(1)))
    except SyncError as error:
        text = str(error)
    raised = time.monotonic()
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # the harness destroys one more
    return text, raised - start, time.monotonic() - raised, len(aborted)


@pytest.mark.parametrize("operation", ["a sum", "a message", "a collective of others"])
def test_a_failed_worker_that_lives_on_ends_every_wait_within_two_seconds(operation):
    message, seconds, to_destroy, aborts = run(2, living_on, operation)[0]
    assert "rank 1 failed: ValueError: on purpose" in message
    assert seconds < 2 + 1  # the rest is for a busy machine
    assert to_destroy < 2  # nothing that was begun keeps the process
    assert aborts == (operation != "a collective of others")  # which strategies report, and abort then


def test_groups_are_closed_together_and_one_that_does_not_close_is_left_behind():
    meeting, never, met = threading.Barrier(2), threading.Event(), []
    start = time.monotonic()
    all_at_once([never.wait, lambda: met.append(meeting.wait(5)), lambda: met.append(meeting.wait(5))], 0.5)
    assert 0.5 <= time.monotonic() - start < 3
    assert sorted(met) == [0, 1]  # one after the other, the first would wait for the second for ever
    never.set()


def test_the_users_own_settings_of_nccl_are_left_alone(monkeypatch):
    monkeypatch.setenv("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    monkeypatch.delenv("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", raising=False)
    with nccl.settings(nccl.ENDS_IN_TIME, nccl.NAMES_FIRST):
        assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
        assert os.environ["TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC"] == "250"
        assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC" not in os.environ


def test_in_one_process_too_a_failure_is_known_in_every_part_of_the_workers():
    heard = []

    def fail_in_a_part(workers: Workers) -> None:
        part = workers.split([[0, 1], [2, 3]])
        if workers.rank == 1:
            raise ValueError("on purpose")
        try:
            part.gather([0.0])
        except SyncError as error:
            heard.append(str(error))

    with pytest.raises(ValueError, match="on purpose"):
        together(in_process(4, timedelta(seconds=5)), fail_in_a_part)
    assert heard == ["rank 0 could not meet the other workers for a header. rank 1 failed: ValueError: on purpose"]
