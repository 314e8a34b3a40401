"""Many workers on one thread, which take turns: each runs until it waits for the others, and then the next one does.

A turn is a greenlet: a call stack that can be left in the middle and gone on with later. So the code between two
communications is never interrupted, the order of everything is the same in every run, and if all workers wait for one
another, that is known at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from greenlet import getcurrent, greenlet

T = TypeVar("T")

DEVICE_TYPES = ("cpu", "cuda")
"""Where autocast can be on."""


class Modes:
    """What contexts set for a while, and workers on one thread would otherwise share: no_grad, autocast, the dtype."""

    def __init__(self) -> None:
        self._grad = torch.is_grad_enabled()
        self._dtype = torch.get_default_dtype()
        self._cache = torch.is_autocast_cache_enabled()
        self._autocast = [
            (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in DEVICE_TYPES
        ]

    def restore(self) -> None:
        """Let these modes be in force again."""
        torch.set_grad_enabled(self._grad)
        torch.set_default_dtype(self._dtype)
        torch.set_autocast_cache_enabled(self._cache)
        for device, enabled, dtype in self._autocast:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)


class _Turn:
    """One worker's turn: its stack, and what it waits for."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.stack = greenlet(function)
        self.ready: Callable[[], bool] = lambda: True
        self.modes = Modes()

    def go_on(self, stuck: bool) -> bool:
        """Run until the worker waits or ends.

        Args:
            stuck: whether no worker can go on.

        Returns:
            Whether it waits.
        """
        self.modes.restore()
        waits_for = self.stack.switch(stuck) if self.stack else self.stack.switch()
        self.modes = Modes()
        if self.stack.dead:
            return False
        self.ready = waits_for
        return True


def wait_until(ready: Callable[[], bool]) -> bool:
    """Let the other workers run until something is the case; call this inside of :func:`take_turns`.

    Args:
        ready: whether it is; it depends on what other workers do, and stays true once it is.

    Returns:
        Whether it is now; if not, all workers wait, and nothing will ever happen.
    """
    if ready():
        return True
    others = getcurrent().parent
    if others is None:
        return False
    return not others.switch(ready)


def take_turns(functions: Sequence[Callable[[], None]]) -> None:
    """Call functions that wait for one another, in turns.

    Args:
        functions: one for each worker. None of them may raise.
    """
    before = Modes()
    turns = [_Turn(function) for function in functions]
    try:
        while turns:
            able = {id(turn) for turn in turns if turn.ready()}
            if able:
                turns = [turn for turn in turns if id(turn) not in able or turn.go_on(stuck=False)]
            else:  # the first one is told, and will tell the others
                turns = turns[1:] if not turns[0].go_on(stuck=True) else turns
    finally:
        before.restore()


def outcomes_of(functions: Sequence[Callable[[], T]], failed: Callable[[int, BaseException], Any]) -> list[T]:
    """Call functions in turns, and collect what they return.

    Args:
        functions: one for each worker.
        failed: called with the number of a worker whose function raised, and the exception, so that the others hear.

    Returns:
        The results, by worker.

    Raises:
        BaseException: what was raised first.
    """
    results: list[Any] = [None] * len(functions)
    errors: list[BaseException] = []

    def caught(index: int) -> Callable[[], None]:
        def call() -> None:
            try:
                results[index] = functions[index]()
            except BaseException as error:  # whatever it is, the others must not wait, and it is raised again below
                errors.append(error)
                failed(index, error)

        return call

    take_turns([caught(index) for index in range(len(functions))])
    if errors:
        raise errors[0]
    return results
