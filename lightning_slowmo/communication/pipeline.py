"""What is under way between workers: one kind of object for all of it, and several of them at once.

A *transfer* is a generator that starts to send and receive, yields, and only then waits for what it has started::

    def mean(workers, tensor):
        weight = yield from workers.sum(tensor)    # starts the sum, yields, waits for it
        return tensor.div_(weight)

:func:`complete` runs a transfer to its end, :func:`start` lets it travel while its owner does something else, and
:func:`pipeline` runs many, so that one computes while another travels. All workers run the same transfers in the same
order, so that the messages of one meet those of the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")

Transfer = Generator[None, None, T]
"""Yields wherever its owner may do something else, and returns its result. Nothing is sent before the first step."""

DEPTH = 2
"""Transfers of a pipeline that are under way: one computes and one travels. More need more memory, and gain little."""


class UnderWay(Generic[T]):
    """A transfer that has been started.

    Args:
        transfer: whose messages leave now.
    """

    def __init__(self, transfer: Transfer[T]) -> None:
        self._transfer: Transfer[T] | None = transfer
        self._result: T
        self._advance()

    def _advance(self) -> None:
        assert self._transfer is not None
        try:
            next(self._transfer)
        except StopIteration as end:
            self._result = end.value
            self._transfer = None

    @property
    def done(self) -> bool:
        """Whether the result is there, without looking whether messages have come meanwhile."""
        return self._transfer is None

    def advance(self) -> bool:
        """Go on to where the transfer yields next, which waits for what it has started.

        Returns:
            Whether it has ended.
        """
        if self._transfer is not None:
            self._advance()
        return self._transfer is None

    def wait(self) -> T:
        """Wait for the end.

        Returns:
            The result, the same object at every call.

        Raises:
            SyncError: if a worker did not take part in time.
        """
        while not self.advance():
            pass
        return self._result


def start(transfer: Transfer[T]) -> UnderWay[T]:
    """Start a transfer; its messages travel until somebody waits for them."""
    return UnderWay(transfer)


def complete(transfer: Transfer[T]) -> T:
    """Run a transfer to its end.

    Example:
        >>> def greeting():
        ...     yield
        ...     return "hello"
        >>> complete(greeting())
        'hello'
    """
    return UnderWay(transfer).wait()


def pipeline(transfers: Iterable[Transfer[T]], depth: int = DEPTH) -> list[T]:
    """Run transfers in turns; those that yield equally often end in their order.

    Args:
        transfers: started one by one, as earlier ones end.
        depth: how many may be under way.

    Returns:
        Their results, in the order in which they end.

    Example:
        >>> def transfer(name):
        ...     print(name, "sends")
        ...     yield
        ...     print(name, "waits")
        ...     return name
        >>> pipeline([transfer("a"), transfer("b")])
        a sends
        b sends
        a waits
        b waits
        ['a', 'b']
    """
    results: list[T] = []
    under_way: deque[UnderWay[T]] = deque()

    def take_turn() -> None:
        first = under_way.popleft()
        if first.advance():
            results.append(first.wait())
        else:
            under_way.append(first)

    for transfer in transfers:
        while len(under_way) >= depth:
            take_turn()
        started = start(transfer)
        if started.done:
            results.append(started.wait())
        else:
            under_way.append(started)
    while under_way:
        take_turn()
    return results
