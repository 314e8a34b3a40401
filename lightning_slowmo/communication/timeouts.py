"""How long workers wait for one another."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

DEFAULT_TIMEOUT = timedelta(minutes=30)
"""How long a worker waits for the others by default, as torch.distributed does."""


def as_timeout(name: str, value: Any) -> timedelta:
    """A duration that was given in seconds, or as a timedelta.

    Args:
        name: of the setting, for messages.
        value: above 0.

    Raises:
        ValueError: if it is no duration.

    Example:
        >>> as_timeout("sync_timeout", 90)
        datetime.timedelta(seconds=90)
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e9
    limit = timedelta(seconds=value) if number else value
    if not isinstance(limit, timedelta) or limit <= timedelta(0):
        raise ValueError(f"{name} must be a number of seconds above 0, or a timedelta, got {value!r}.")
    return limit
