"""Messages between single workers: no order of them can hang, and one who does not come is named."""

from __future__ import annotations

import time
from datetime import timedelta

import numpy as np
import pytest
import torch

from lightning_slowmo import SyncError, Workers
from lightning_slowmo.communication.exchange import Delivery, exchange
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
        receivers = np.flatnonzero(links[rank]).tolist()
        senders = [(peer, 0.5 + peer) for peer in np.flatnonzero(links[:, rank]).tolist()]
        # Several at once, waited for in another order than they were posted.
        messages = [torch.full((size,), float(100 * size + rank), dtype=torch.float64) for size in SIZES]
        deliveries = [exchange(workers, message, receivers, senders) for message in messages]
        totals = [deliveries[i].wait() for i in (2, 0, 1)]
        again = deliveries[0].wait()
        used = workers.traffic - before
        values = [None if total is None else set(total.tolist()) for total in totals]
        found.append((values, again is totals[1], used.sent, used.received, used.collectives))
    return found


@pytest.mark.processes
@pytest.mark.parametrize("workers", [1, 2, 3, 5, 8])
def test_what_comes_is_the_weighted_sum_of_what_was_sent(workers: int) -> None:
    graphs = random_graphs(workers, 6)
    by_rank = run(workers, exchange_on_random_graphs, graphs)
    for rank in range(workers):
        for links, (values, same, sent, received, collectives) in zip(graphs, by_rank[rank], strict=True):
            senders = np.flatnonzero(links[:, rank])
            for size, value in zip((SIZES[2], SIZES[0], SIZES[1]), values, strict=True):
                total = sum((100 * size + peer) * (0.5 + peer) for peer in senders)
                assert value == ({total} if len(senders) else None)
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
        exchange(workers, message, [1 - rank, 2], [(1 - rank, 1.0), (2, 1.0)]).wait()
    except SyncError as error:
        return str(error)
    return "nothing happened"


def one_fails(rank: int) -> str:
    workers = Workers.from_world(timedelta(seconds=10))
    if rank == 2:
        workers.report_failure("ValueError: on purpose")
        return ""
    try:
        exchange(workers, torch.zeros(3), [], [(2, 1.0)]).wait()
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


def test_a_delivery_that_has_come_needs_no_workers() -> None:
    message = torch.ones(2)
    assert Delivery([(message, 0.5), (torch.ones(2), 2.0)]).wait() is message
    assert message.tolist() == [2.5, 2.5]
    assert Delivery([]).wait() is None
