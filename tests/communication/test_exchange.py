"""Messages between single workers: no order of them can hang, and one who does not come is named."""

from __future__ import annotations

import time
from datetime import timedelta

import numpy as np
import pytest
import torch

from lightning_slowmo import SyncError, Workers
from lightning_slowmo.communication.pipeline import complete, start
from tests.harness import run

SIZES = (1, 5, 70_000)
"""Elements of a message; the last is more than a socket takes in at once."""


def random_graphs(workers: int, count: int) -> np.ndarray:
    """Who sends to whom in each of several steps, also to many and to nobody."""
    links = np.random.default_rng(workers).random((count, workers, workers)) < np.linspace(0, 1, count)[:, None, None]
    links[:, np.arange(workers), np.arange(workers)] = False
    return links


def exchange_on_random_graphs(rank: int, graphs: np.ndarray) -> list[tuple]:
    workers = Workers.from_world()
    found = []
    for links in graphs:
        before = workers.traffic.copy()
        receivers, senders = np.flatnonzero(links[rank]).tolist(), np.flatnonzero(links[:, rank]).tolist()
        # Several at once, waited for in another order than they were posted.
        messages = [torch.full((size,), float(100 * size + rank), dtype=torch.float64) for size in SIZES]
        under_way = [start(workers.send_and_receive(message, receivers, senders)) for message in messages]
        came = [under_way[i].wait() for i in (2, 0, 1)]
        again = under_way[0].wait()
        used = workers.traffic - before
        values = [[set(message.tolist()) for message in by_sender] for by_sender in came]
        found.append((values, again is came[1], used.sent, used.received, used.collectives))
    return found


@pytest.mark.processes
@pytest.mark.parametrize("workers", [1, 2, 3, 5, 8])
def test_what_comes_is_what_each_sender_sent(workers: int) -> None:
    graphs = random_graphs(workers, 6)
    by_rank = run(workers, exchange_on_random_graphs, graphs)
    for rank in range(workers):
        for links, (values, same, sent, received, collectives) in zip(graphs, by_rank[rank], strict=True):
            senders = np.flatnonzero(links[:, rank])
            for size, value in zip((SIZES[2], SIZES[0], SIZES[1]), values, strict=True):
                assert value == [{100 * size + peer} for peer in senders]
            assert same
            assert sent == links[rank].sum() * sum(SIZES) * 8
            assert received == len(senders) * sum(SIZES) * 8
            assert collectives == 0


def one_does_not_come(rank: int) -> str:
    workers = Workers.from_world(timedelta(seconds=1))
    if rank == 2:
        time.sleep(4)
        return ""
    message = torch.zeros(3)
    try:  # 0 and 1 exchange with each other, and both with 2
        complete(workers.send_and_receive(message, [1 - rank, 2], [1 - rank, 2]))
    except SyncError as error:
        return str(error)
    return "nothing happened"


def one_fails(rank: int) -> str:
    workers = Workers.from_world(timedelta(seconds=10))
    if rank == 2:
        workers.report_failure("ValueError: on purpose")
        return ""
    try:
        complete(workers.send_and_receive(torch.zeros(3), [], [2]))
    except SyncError as error:
        return str(error)
    return "nothing happened"


@pytest.mark.processes
def test_a_peer_that_does_not_come_is_named_and_nobody_else() -> None:
    for rank, text in enumerate(run(3, one_does_not_come)[:2]):
        assert f"rank {rank} could not meet the other workers for an exchange with its peers" in text
        assert text.split("Did not come (within 0:00:01): ")[1].startswith("rank 2. ")


@pytest.mark.processes
def test_a_peer_that_failed_says_why() -> None:
    for text in run(3, one_fails)[:2]:
        assert "rank 2 failed: ValueError: on purpose" in text


@pytest.mark.processes
def test_messages_of_unequal_sizes_arrive_in_their_order() -> None:
    for text in run(2, send_sizes):
        assert text in ("[[1.0, 1.0], [2.0, 2.0, 2.0]]", "[[2.0, 2.0], [1.0, 1.0, 1.0]]")


def send_sizes(rank: int) -> str:
    workers, other = Workers.from_world(), 1 - rank
    mine, theirs = ([2, 3], [3, 2]) if rank else ([3, 2], [2, 3])
    under_way = [
        start(workers.send_and_receive(torch.full((own,), float(turn)), [other], [other], [size]))
        for turn, (own, size) in enumerate(zip(mine, theirs, strict=True), 1)
    ]
    came = [transfer.wait()[0].tolist() for transfer in under_way]
    return str(sorted(came, key=len))


def test_a_worker_alone_sends_to_nobody() -> None:
    assert complete(Workers().send_and_receive(torch.ones(2), [], [])) == []
