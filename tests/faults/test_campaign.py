"""The campaign of drawn faults: what it draws, and that it would see a promise that is not kept."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.faults import campaign
from tests.faults.campaign import FAULTS, Outcome, Scenario, play, promise
from tests.harness import WorkerFailed

MODEL = [[1.0]]
DONE = (MODEL, "", "")
BASE = replace(Scenario.drawn(0, 0), algorithm="SlowMo", size=2, victim=1, per_node=None)
LOST = "SyncError: rank 0 could not meet. Ended without a word, or lost its connection: rank 1."
ABSENT = "SyncError: rank 0 could not meet. Did not come (within 0:00:03): rank 1."
FAILED = "SyncError: rank 1 failed: ValueError: on purpose"
TERMINATED = (None, "SIGTERMException: ", "")


def test_a_scenario_depends_on_seed_and_index_alone_and_all_faults_are_drawn():
    drawn = [Scenario.drawn(1, index) for index in range(200)]
    assert drawn == [Scenario.drawn(1, index) for index in range(200)]
    assert drawn != [Scenario.drawn(2, index) for index in range(200)]
    assert {scenario.fault for scenario in drawn} == set(FAULTS)
    assert {scenario.algorithm for scenario in drawn} == set(campaign.ALGORITHMS)
    assert {scenario.size for scenario in drawn} == {2, 3, 4}
    assert any(scenario.shard for scenario in drawn)
    assert any(scenario.per_node for scenario in drawn)
    assert all(scenario.victim < scenario.size for scenario in drawn)


def acted(first, resumed=(DONE, DONE), saves=True):
    """A stand-in for the runs: how the first and the resumed one end."""

    def run(size, function, scenario, folder, path=None, **limits):
        if path is None and saves:
            torch.save({}, f"{folder}/epoch=0.ckpt")
            beside = Path(f"{folder}/epoch=0.ckpt.slowmo/0")
            beside.mkdir(parents=True)
            (beside / "shared.pt").write_bytes(b"12345678")
        ended = list(first if path is None else resumed)
        if "hang" in ended:
            raise WorkerFailed("still alive")
        return ended

    return run


KEPT = [
    ("kill", ((None, LOST, ""), "died with exit code -9"), (DONE, DONE)),
    ("kill in validation", ((None, LOST, ""), "died with exit code -9"), (DONE, DONE)),
    ("kill at start", ((None, LOST, ""), "died with exit code -9"), None),
    ("freeze", ((None, ABSENT, ""), "died with exit code -9"), (DONE, DONE)),
    ("exception in validation", ((None, FAILED, ""), "ValueError"), (DONE, DONE)),
    ("exception at start", ((None, FAILED, ""), "ValueError"), None),
    ("NaN, skipped", (DONE, DONE), (DONE, DONE)),
    ("exception", ((None, FAILED, ""), "ValueError"), (DONE, DONE)),
    ("NaN", ((None, "SyncError: The parameters of rank 1 are NaN or infinite", ""),) * 2, (DONE, DONE)),
    ("SIGTERM", (TERMINATED, TERMINATED), (DONE, DONE)),
    ("stop and wake", (DONE, DONE), (DONE, DONE)),
    ("uneven inputs", (DONE, DONE), (DONE, DONE)),
    ("unequal start", (DONE, DONE), (DONE, DONE)),
    ("damaged checkpoint", (DONE, DONE), ((MODEL, "", "(shared.pt: why)"), DONE)),
]


@pytest.mark.parametrize(("fault", "first", "resumed"), KEPT, ids=[case[0] for case in KEPT])
def test_a_promise_that_is_kept_is_no_finding(fault, first, resumed):
    assert play(replace(BASE, fault=fault), acted(first, resumed, saves=resumed is not None)) == []


@pytest.mark.parametrize(
    ("fault", "first", "resumed", "finding"),
    [
        ("kill", ((None, "RuntimeError: Connection closed by peer", ""), "died"), (DONE, DONE), "Connection closed"),
        ("kill", (DONE, "died"), (DONE, DONE), "rank 0 ended with no error"),
        ("exception", ((None, "SyncError: lost", ""), "ValueError"), (DONE, DONE), "rank 0 ended with SyncError: lost"),
        (
            "NaN",
            ((None, "SyncError: The parameters of rank 0 are NaN or infinite", ""),) * 2,
            (DONE, DONE),
            "not named",
        ),
        ("freeze", (DONE, "died"), (DONE, DONE), "rank 0 ended with no error"),
        ("exception in validation", ((None, LOST, ""), "ValueError"), (DONE, DONE), "rank 0 ended with SyncError"),
        ("exception at start", ((None, FAILED, ""), "ValueError"), (DONE, DONE), "a checkpoint from before the start"),
        ("NaN, skipped", (([[float("nan")]], "", ""),) * 2, (DONE, DONE), "not finite"),
        ("SIGTERM", (TERMINATED, DONE), (DONE, DONE), "rank 1 ended with no error"),
        ("uneven inputs", (DONE, ([[2.0]], "", "")), (DONE, DONE), "the final models differ"),
        ("uneven inputs", (([[float("inf")]], "", ""),) * 2, (DONE, DONE), "not finite"),
        ("stop and wake", ("hang", DONE), (DONE, DONE), "did not end within 60 s"),
        ("stop and wake", (DONE, DONE), ("hang", DONE), "did not end within 60 s"),
        ("unequal start", (DONE, DONE), (DONE, ([[2.0]], "", "")), "after resuming: the final models differ"),
        ("unequal start", (DONE, DONE), ((MODEL, "", "starts anew"), DONE), "newest checkpoint is not whole"),
        ("damaged checkpoint", (DONE, DONE), (DONE, DONE), "nobody said that shared.pt is damaged"),
    ],
)
def test_a_promise_that_is_not_kept_is_a_finding(fault, first, resumed, finding):
    found = play(replace(BASE, fault=fault), acted(first, resumed))
    assert found
    assert all(finding in text for text in found)


def test_a_full_disk_that_nobody_speaks_of_is_a_finding():
    full = replace(BASE, fault="full disk")
    said = Outcome(None, "OSError: [Errno 28] No space left on device")
    assert promise(full, [said, Outcome(None, f"SyncError: rank 0 failed: {said.error}")]) == []
    assert promise(full, [said, Outcome(None, "SyncError: lost")])
    assert promise(full, [Outcome([[1.0]]), Outcome([[1.0]])])


def test_nan_that_went_round_with_the_gradients_has_to_be_said():
    shared = replace(BASE, fault="NaN, skipped", algorithm="AllReduce")
    said = Outcome(None, "SyncError: The parameters of rank 0, rank 1 are NaN. No worker is left to recover from.")
    assert promise(shared, [said, said]) == []
    assert promise(shared, [said, Outcome([[float("nan")]])])


def test_a_run_that_leaves_no_checkpoint_is_a_finding():
    assert play(replace(BASE, fault="uneven inputs"), acted((DONE, DONE), saves=False)) == ["no checkpoint was left"]
