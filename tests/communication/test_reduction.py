"""Reductions in which some workers have no share."""

import pytest
import torch

from lightning_slowmo.communication import Header, Meeting, Reason, SyncError
from lightning_slowmo.communication.reduction import operation_name, reduce_present
from tests.on_workers import taking_turns

CPU = torch.device("cpu")


def meeting_of(workers, absent):
    reasons = [Reason.EPOCH_END if rank in absent else Reason.REDUCE for rank in range(workers.size)]
    return Meeting([Header(reason, pending=(0,)) for reason in reasons])


@taking_turns(2, 3, 5)
def test_the_result_is_that_of_the_workers_that_have_a_share(workers):
    shares = [torch.tensor([[1.5, -2.0], [rank, rank**2]]) for rank in range(workers.size)]
    present = [rank for rank in range(workers.size) if rank != 1]
    expected = {"mean": torch.mean, "sum": torch.sum, "max": torch.amax, "min": torch.amin}
    for name, function in expected.items():
        own = None if workers.rank == 1 else shares[workers.rank]
        result = reduce_present(own, name, meeting_of(workers, {1}), workers, CPU)
        if own is None:
            assert result is None
        else:
            torch.testing.assert_close(result, function(torch.stack([shares[rank] for rank in present]), 0))


@taking_turns(2, 3)
def test_numbers_integers_and_nothing_can_be_reduced(workers):
    for share in (torch.tensor(2.5), torch.tensor([3, 4]), torch.zeros(0, 3)):
        own = None if workers.rank == workers.size - 1 else share
        result = reduce_present(own, "max", meeting_of(workers, {workers.size - 1}), workers, CPU)
        assert result is None if own is None else (torch.equal(result, share) and result.dtype == share.dtype)


@taking_turns(3)
def test_what_does_not_go_together_is_one_error_on_all(workers):
    own = None if workers.rank == 2 else torch.zeros(1 + workers.rank)
    with pytest.raises(SyncError, match="different tensors at the same time"):
        reduce_present(own, "sum", meeting_of(workers, {2}), workers, CPU)
    own = None if workers.rank == 2 else torch.zeros(1)
    with pytest.raises(SyncError, match="that others do not have"):
        reduce_present(own, "premul_sum", meeting_of(workers, {2}), workers, CPU)


def test_operations_have_names_however_they_are_given():
    assert operation_name("MEAN") == "mean"
    assert operation_name(torch.distributed.ReduceOp.MAX) == "max"
    assert operation_name(None) == "none"
