"""The harness itself: results come back, failures are told, and nothing outlives its limit."""

import time

import pytest
import torch
import torch.distributed as dist

from tests.harness import WorkerFailed, run


def total(rank: int, offset: float) -> float:
    value = torch.tensor([rank + offset])
    dist.all_reduce(value)
    return value.item()


def fail_on_one(rank: int) -> str:
    dist.barrier()  # so that the others have found their connections before this one closes them
    if rank == 1:
        raise ValueError("on purpose")
    return "fine"


def hang_on_one(rank: int) -> None:
    if rank == 1:
        time.sleep(600)


@pytest.mark.parametrize("size", [1, 3])
def test_results_come_back_by_rank(size: int) -> None:
    assert run(size, total, 0.5) == [sum(range(size)) + size * 0.5] * size


def test_a_failure_is_told_with_its_rank() -> None:
    with pytest.raises(WorkerFailed, match=r"rank 1\nValueError: on purpose"):
        run(2, fail_on_one)


def test_a_process_that_does_not_end_fails_the_test_with_its_stack() -> None:
    with pytest.raises(WorkerFailed, match=r"Still alive after 5 s(.|\n)*hang_on_one"):
        run(2, hang_on_one, limit=5)
