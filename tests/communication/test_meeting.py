"""Meetings: all workers draw the same conclusion from their headers, or get the same error."""

from dataclasses import replace

import pytest

from lightning_slowmo import SyncError, Workers
from lightning_slowmo.communication import Header, Meeting, Reason, meet, require_equal
from lightning_slowmo.communication.meeting import Level
from tests.on_workers import on_workers

FULL = Header(
    Reason.SAVE,
    optimizer_index=2,
    levels=Level.BASE | Level.OUTER,
    rounds=70000,
    stop=True,
    terminate=True,
    poisoned=True,
    rates=2**32 - 1,
    pending=(4, 0),
)


@pytest.mark.parametrize("header", [Header(Reason.SYNC), FULL, replace(FULL, stop=False, pending=())])
def test_a_header_survives_its_journey(header):
    assert Header.of(header.numbers()) == header


def test_one_wish_is_everybodys():
    quiet = Header(Reason.SYNC, rates=5, pending=(3,))
    meeting = Meeting([quiet, replace(quiet, stop=True, pending=(4,)), replace(quiet, terminate=True, poisoned=True)])
    assert meeting.stop
    assert meeting.terminate
    assert meeting.healthy() == [True, True, False]
    assert meeting.round(Header(Reason.SYNC)).pending == [3, 4, 3]
    assert meeting.same_rates
    nobody = Meeting([quiet, replace(quiet, rates=6)])
    assert (nobody.stop, nobody.terminate, nobody.same_rates) == (False, False, False)
    assert nobody.healthy() == [True, True]


def test_rounds_come_before_what_else_workers_came_for_and_the_first_optimizers_first():
    waiting = Header(Reason.VALIDATION, pending=(1, 1))
    second, first = (replace(waiting, reason=Reason.SYNC, optimizer_index=index, levels=Level.BASE) for index in (1, 0))
    assert Meeting([waiting, waiting]).wanted is None
    assert Meeting([waiting, second]).wanted == second
    meeting = Meeting([second, waiting, first])
    assert meeting.wanted == first
    assert meeting.round(first).present == [False, False, True]
    assert Meeting([first, replace(first, levels=Level.OUTER)]).wanted.levels == Level.BASE | Level.OUTER


def test_a_worker_of_several_processes_is_healthy_if_all_of_them_are():
    headers = [Header(Reason.SYNC, pending=(rank // 2,), poisoned=rank == 3, stop=rank == 0) for rank in range(4)]
    meeting = Meeting(headers, members=[[0, 1], [2, 3]])
    assert meeting.round(Header(Reason.SYNC)).pending == [0, 1]
    assert meeting.healthy() == [True, False]
    assert meeting.stop  # decided by all


@on_workers(1, 2, 3)
def test_all_workers_see_all_headers(workers):
    meeting = meet(Header(Reason.SYNC, pending=(workers.rank,)), workers)
    assert meeting.round(Header(Reason.SYNC)).pending == list(range(workers.size))
    assert workers.traffic.headers == (workers.size > 1)


@on_workers(2, 3)
def test_workers_that_lost_count_of_rounds_are_told_so_on_every_rank(workers):
    with pytest.raises(SyncError, match=r"different numbers of syncs: rank 0 7, rank 1 8"):
        meet(Header(Reason.SYNC, rounds=7 + workers.rank), workers)


@on_workers(2, 3)
def test_reasons_that_exclude_one_another_are_told_on_every_rank(workers):
    reason = Reason.VALIDATION if workers.rank == 0 else Reason.TRAIN_END
    with pytest.raises(SyncError, match=r"different reasons: rank 0 validation, rank 1 train end.*same script"):
        meet(Header(reason), workers)


@on_workers(2, 3)
def test_what_must_be_equal_is_told_with_ranks_and_difference(workers):
    require_equal(workers, "The model", "the same", "Do this.")
    last = workers.size - 1
    text = "a" * 500 + ("b" if workers.rank == last else "c") + "d" * 500
    with pytest.raises(SyncError) as caught:
        require_equal(workers, "The model", text, "Do this.")
    message = str(caught.value)
    assert message.startswith("The model differs between workers: rank 0 has 'aaa")
    assert f"rank {last} has 'aaa" in message
    assert "acd" in message
    assert "abd" in message
    assert message.endswith("Do this.")
    assert len(message) < 600


@on_workers(2)
def test_a_text_that_is_the_beginning_of_another_differs_too(workers):
    with pytest.raises(SyncError, match=r"'ab'.*'abc'"):
        require_equal(workers, "It", "abc" if workers.rank else "ab", "")


def test_a_worker_alone_agrees_with_itself():
    require_equal(Workers(), "It", "text", "")
    assert meet(Header(Reason.TRAIN_END), Workers()).wanted is None


def test_a_worker_that_waits_at_the_end_lets_the_others_go_first():
    def at(*reasons, stop=False):
        return Meeting([Header(reason, stop=stop, pending=(0,)) for reason in reasons])

    epoch = at(Reason.EPOCH_END, Reason.EPOCH_START)
    assert (epoch.must_meet_again(Reason.EPOCH_END), epoch.must_meet_again(Reason.EPOCH_START)) == (True, False)
    # Nobody validates before the worker that waits has come to validate, too.
    validation = at(Reason.EPOCH_END, Reason.VALIDATION)
    assert validation.must_meet_again(Reason.EPOCH_END)
    assert validation.must_meet_again(Reason.VALIDATION)
    assert not at(Reason.VALIDATION, Reason.VALIDATION).must_meet_again(Reason.VALIDATION)
    # Training that has ended by a wish to stop waits for those who hear of it late, but not for a mistake.
    assert at(Reason.TRAIN_END, Reason.EPOCH_START, stop=True).leading == {Reason.EPOCH_START}
    assert at(Reason.TRAIN_END, Reason.EPOCH_START).leading == {Reason.TRAIN_END, Reason.EPOCH_START}
    # Metrics of a step are reduced with the help of those who have no step.
    assert at(Reason.REDUCE, Reason.EPOCH_END, Reason.VALIDATION).wanted.reason is Reason.REDUCE
    assert at(Reason.REDUCE, Reason.REDUCE).wanted is None
    assert at(Reason.REDUCE, Reason.SAVE).wanted is None
    assert at(Reason.REDUCE, Reason.SYNC, Reason.EPOCH_END).wanted.reason is Reason.SYNC
