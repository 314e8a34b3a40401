"""The order of the test files: those that take longest come first.

``make test`` deals files out to two workers. Whatever begins last is waited for, so it should be short; pytest-xdist's
own order, by the number of tests, would begin the few long ones last.
"""

from __future__ import annotations

import pytest

LONGEST = [
    "recipes/test_translation.py",
    "recipes/test_experiments.py",
    "recipes/test_train.py",
    "test_interpreter.py",
    "trainer/test_one_worker.py",
    "trainer/test_surface_callbacks.py",
    "trainer/test_launchers.py",
    "trainer/test_compressed.py",
    "trainer/test_checkpoints.py",
    "faults/test_saves.py",
    "faults/test_random_modules.py",
    "recipes/test_report.py",
    "trainer/test_identities.py",
    "faults/test_failures.py",
    "faults/test_ends.py",
    "trainer/test_one_rank_alone.py",
    "trainer/test_surface_steps.py",
    "trainer/test_surface_optimizers.py",
    "trainer/test_surface_modules.py",
    "trainer/test_sketched.py",
]
"""Files of half a minute and more, roughly by their time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, the others as they are."""
    places = {name: place for place, name in enumerate(LONGEST)}

    def place(item: pytest.Item) -> int:
        _, _, file = item.nodeid.partition("::")[0].rpartition("tests/")
        return places.get(file, len(LONGEST))

    items.sort(key=place)
