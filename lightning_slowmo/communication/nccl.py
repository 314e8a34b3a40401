"""What torch is told about NCCL while it makes a process group, so that a process can end when another one is gone.

Torch reads these settings from the environment when it makes a group. Its watchdog, a thread of each group, sees that a
worker is gone as soon as NCCL does. Left alone, it then sleeps for a minute and lets the default group's monitor write
traces; the monitor sleeps for eight minutes and ends the process. ``destroy_process_group`` and the end of the
interpreter wait for both threads.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

ENDS_IN_TIME = {"TORCH_NCCL_DUMP_ON_TIMEOUT": "0", "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "250"}
"""The monitor stays out of it, and the watchdog sleeps four times this long, one second."""

NAMES_FIRST = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}
"""The watchdog does not end the process at an error: whoever waits sees it, and can say who is missing."""


@contextmanager
def settings(*chosen: dict[str, str]) -> Iterator[None]:
    """Set variables of the environment, but not those that the user has set.

    Args:
        chosen: names and values.
    """
    missing = {name: value for each in chosen for name, value in each.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)
