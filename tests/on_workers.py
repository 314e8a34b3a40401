"""Tests that run on several workers and share the processes of one call of the harness.

A test of this kind is written as a function of this process's :class:`Workers`::

    @on_workers(2, 4)
    def test_a_sum_is_the_same_everywhere(workers): ...

pytest sees it as one test per number of workers. Starting processes is the expensive part, so all the tests of a module
at one number of workers run in the same processes, one after the other, each with process groups of its own.

Where processes are not the point, :func:`taking_turns` runs the same kind of test on workers of this process.
"""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache
from typing import Any, NamedTuple

import pytest

from lightning_slowmo.communication.in_process import in_process, together
from tests import harness

TIMEOUT = timedelta(seconds=20)


class Check(NamedTuple):
    function: Callable
    sizes: tuple[int, ...]
    cases: Sequence[Any]


_checks: dict[str, dict[str, Check]] = {}


def on_workers(*sizes: int, each: Sequence[Any] = ()) -> Callable[[Callable], Callable]:
    """Make ``function(workers)`` a test at these numbers of workers; with ``each``, of ``function(workers, case)``."""

    def decorate(function: Callable) -> Callable:
        module, name = function.__module__, function.__name__
        _checks.setdefault(module, {})[name] = Check(function, sizes, each)

        def outcome(size: int, case: Any = None) -> None:
            failures = _outcomes(module, size)
            texts = [f"rank {rank}\n{failed[name, case]}" for rank, failed in enumerate(failures) if failed[name, case]]
            if texts:
                pytest.fail("\n".join(texts), pytrace=False)

        def test(size: int) -> None:
            outcome(size)

        def test_case(size: int, case: Any) -> None:
            outcome(size, case)

        shown = pytest.mark.parametrize("case", each)(test_case) if each else test
        shown.__name__, shown.__doc__, shown.__module__ = name, function.__doc__, module
        return pytest.mark.processes(pytest.mark.parametrize("size", sizes)(shown))

    return decorate


def taking_turns(*sizes: int, each: Sequence[Any] = ()) -> Callable[[Callable], Callable]:
    """As :func:`on_workers`, in this process, where workers take turns; so the test must leave global state alone."""

    def decorate(function: Callable) -> Callable:
        def test(size: int) -> None:
            together(in_process(size, TIMEOUT), function)

        def test_case(size: int, case: Any) -> None:
            together(in_process(size, TIMEOUT), lambda workers: function(workers, case))

        shown = pytest.mark.parametrize("case", each)(test_case) if each else test
        shown.__name__, shown.__doc__, shown.__module__ = function.__name__, function.__doc__, function.__module__
        return pytest.mark.parametrize("size", sizes)(shown)

    return decorate


@cache
def _outcomes(module: str, size: int) -> list[dict[tuple[str, Any], str]]:
    return harness.run(size, _run_all, module, size)


def _run_all(rank: int, module: str, size: int) -> dict[tuple[str, Any], str]:
    """Run every check of a module; the text of what each raised, or ``""``."""
    from lightning_slowmo import Workers

    importlib.import_module(module)
    outcomes = {}
    for name, check in _checks[module].items():
        for case in (check.cases or [None]) if size in check.sizes else ():
            try:
                workers = Workers.from_world(timeout=TIMEOUT)
                check.function(workers, *([case] if check.cases else []))
                outcomes[name, case] = ""
            except Exception:
                outcomes[name, case] = traceback.format_exc()
    return outcomes
