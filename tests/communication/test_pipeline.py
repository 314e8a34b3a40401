"""Exchanges in turns: which runs when, and how many at once."""

import pytest

from lightning_slowmo.communication.pipeline import pipeline


def exchange(name, waits, log):
    log.append(f"{name}0")
    for turn in range(1, waits + 1):
        yield
        log.append(f"{name}{turn}")
    return name


def run(waits, depth):
    log: list[str] = []
    results = pipeline((exchange(name, count, log) for name, count in waits.items()), depth)
    return "".join(results), log


def test_one_sends_while_the_other_waits():
    results, log = run({"a": 2, "b": 2, "c": 2}, depth=2)
    assert results == "abc"
    assert log == ["a0", "b0", "a1", "b1", "a2", "c0", "b2", "c1", "c2"]


@pytest.mark.parametrize("depth", [1, 2, 3, 9])
def test_no_more_than_so_many_are_under_way_and_all_end(depth):
    waits = {"a": 0, "b": 3, "c": 1, "d": 4, "e": 1}
    results, log = run(waits, depth)
    assert sorted(results) == list(waits)
    assert sorted(log) == sorted(f"{name}{turn}" for name, count in waits.items() for turn in range(count + 1))
    under_way = most = 0
    for entry in log:
        under_way += entry[1] == "0"
        most = max(most, under_way)
        under_way -= entry == f"{entry[0]}{waits[entry[0]]}"
    assert most <= depth
    assert log == [f"{name}{turn}" for name, count in waits.items() for turn in range(count + 1)] or depth > 1


def test_nothing_to_do():
    assert pipeline([]) == []


def test_an_error_ends_all():
    def fails():
        yield
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        pipeline([exchange("a", 3, []), fails()])
