"""The order of the test files: those that take longest come first.

``make test`` deals files out to two workers. Whatever begins last is waited for, so it should be short; pytest-xdist's
own order, by the number of tests, would begin the few long ones last.
"""

from __future__ import annotations

import pytest

LONGEST = [
    "recipes/test_translation.py",
    "test_interpreter.py",
    "recipes/test_experiments.py",
    "sharded/test_core.py",
    "recipes/test_train.py",
    "test_contract.py",
    "trainer/test_simulated.py",
    "trainer/test_launchers.py",
    "test_qsdp.py",
    "test_wheel.py",
    "faults/test_failures.py",
    "sharded/test_trainer.py",
    "algorithms/test_streaming.py",
    "trainer/test_checkpoints.py",
    "trainer/test_compressed.py",
    "trainer/test_one_worker.py",
    "recipes/test_report.py",
    "recipes/test_text.py",
    "recipes/test_simulated.py",
    "faults/test_random_modules.py",
    "faults/test_ends.py",
]
"""Files of which a part takes long, roughly by their time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, the others as they are."""
    places = {name: place for place, name in enumerate(LONGEST)}

    def place(item: pytest.Item) -> int:
        _, _, file = item.nodeid.partition("::")[0].rpartition("tests/")
        return places.get(file, len(LONGEST))

    items.sort(key=place)
