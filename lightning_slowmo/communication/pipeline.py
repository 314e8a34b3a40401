"""Several exchanges at once: while one waits for its message, the next one computes.

An exchange is a generator that starts a transfer, yields, and only then waits for what it has started::

    def exchange(workers, tensor):
        total = workers.sum(tensor)
        yield  # others go on
        return total.wait()

All workers run the same exchanges in the same order, so their transfers meet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from typing import TypeVar

T = TypeVar("T")

Exchange = Generator[None, None, T]
"""Yields wherever others may go on, and returns its result."""

DEPTH = 2
"""Exchanges under way: one computes and one travels. More would need more memory, and gain little."""


def pipeline(exchanges: Iterable[Exchange[T]], depth: int = DEPTH) -> list[T]:
    """Run exchanges in turns; those that yield equally often end in their order.

    Args:
        exchanges: started one by one, as earlier ones end.
        depth: how many may be under way.

    Returns:
        Their results, in the order in which they end.

    Example:
        >>> def exchange(name):
        ...     print(name, "sends")
        ...     yield
        ...     print(name, "waits")
        ...     return name
        >>> pipeline([exchange("a"), exchange("b")])
        a sends
        b sends
        a waits
        b waits
        ['a', 'b']
    """
    results: list[T] = []
    under_way: deque[Exchange[T]] = deque()

    def advance() -> None:
        exchange = under_way.popleft()
        try:
            next(exchange)
        except StopIteration as end:
            results.append(end.value)
        else:
            under_way.append(exchange)

    for exchange in exchanges:
        while len(under_way) >= depth:
            advance()
        under_way.appendleft(exchange)
        advance()  # its first transfer starts now
    while under_way:
        advance()
    return results
