"""Many workers in one process that take turns: no process groups, no sockets, no imports to wait for.

What one worker sends is handed over in memory. A collective ends when the last worker has come to it, who computes the
result for all, in the order of ranks; of two workers a sum has the same bits as gloo's. Who waits lets the others run,
see :mod:`~lightning_slowmo.communication.turns`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_slowmo.communication.pipeline import Transfer
from lightning_slowmo.communication.turns import outcomes_of, wait_until
from lightning_slowmo.communication.workers import DEFAULT_TIMEOUT, SyncError, Workers

T = TypeVar("T")


class InProcessTransport:
    """One worker among others of this process.

    Args:
        room: where they meet.
        rank: which worker this is.
    """

    group = None

    def __init__(self, room: Room, rank: int) -> None:
        self.room = room
        self.rank = rank
        self.size = room.size
        self._operations = 0
        self._splits = 0

    def all_reduce(self, flat: Tensor, purpose: str) -> Transfer[None]:
        """Overwrite a tensor with its sum over the workers."""
        return self._meet(flat, _sum_for_all, purpose)

    def reduce_scatter(self, own: Tensor, flat: Tensor, purpose: str) -> Transfer[None]:
        """Sum over the workers, of which each gets a piece."""
        return self._meet((own, flat), _scatter_sum, purpose)

    def all_gather(self, flat: Tensor, own: Tensor, purpose: str) -> Transfer[None]:
        """Collect every worker's piece."""
        return self._meet((flat, own), _gather_for_all, purpose)

    def broadcast(self, tensor: Tensor, source: int, purpose: str) -> Transfer[None]:
        """Overwrite a tensor with that of one worker."""

        def hand_out(tensors: list[Tensor]) -> None:
            for rank, other in enumerate(tensors):
                if rank != source:
                    other.copy_(tensors[source])

        return self._meet(tensor, hand_out, purpose)

    def all_to_all(
        self, arriving: Tensor, arriving_sizes: list[int], leaving: Tensor, leaving_sizes: list[int], purpose: str
    ) -> Transfer[None]:
        """Send every worker a piece and receive one from each."""
        return self._meet((arriving.split(arriving_sizes), leaving.split(leaving_sizes)), _exchange_pieces, purpose)

    def send_and_receive(
        self,
        message: Tensor,
        receivers: Sequence[int],
        arriving: Sequence[Tensor],
        senders: Sequence[int],
        purpose: str,
    ) -> Transfer[None]:
        """Send one message to some workers and receive one from others."""
        sent = message.clone()  # the sender may go on and change its own before the receivers look
        for receiver in receivers:
            self.room.post(self.rank, receiver, sent)
        # Which message is this transfer's is settled now, as others may be waited for before it, or it never.
        numbers = [self.room.expect(sender, self.rank) for sender in senders]
        yield
        for sender, number, tensor in zip(senders, numbers, arriving, strict=True):
            tensor.copy_(self.room.fetch(sender, self.rank, number, purpose))

    def gather_header(self, everyone: Tensor, own: Tensor, purpose: str) -> None:
        """Collect a few numbers of every worker."""
        for _ in self._meet((everyone, own), _gather_for_all, purpose):
            pass

    def split(self, sets: Sequence[Sequence[int]], headers: bool) -> InProcessTransport:
        """Rooms of disjoint sets of workers."""
        self._splits += 1
        index = next(index for index, ranks in enumerate(sets) if self.rank in ranks)
        room = self.room.beside(self._splits, index, [self.room.names[rank] for rank in sets[index]])
        return InProcessTransport(room, list(sets[index]).index(self.rank))

    def report_failure(self, reason: str) -> None:
        """Leave word why this worker stops."""
        self.room.fail(self.rank, reason)

    def let_others_hear(self) -> None:
        """Nothing to wait for: the room stays."""

    def listen(self, all_the_time: bool) -> None:
        """Nothing to do: whoever waits looks again before every turn."""

    def close_also(self, group: Any) -> None:
        """Nothing to close."""

    def explained(self, error: BaseException, purpose: str, waited: float = 0.0) -> SyncError | None:
        """Nothing to explain: these workers communicate by this transport alone."""
        return None

    def _meet(self, contribution: Any, combine: Callable[[list], None], purpose: str) -> Transfer[None]:
        occasion = self._operations
        self._operations += 1
        self.room.come(self.rank, occasion, contribution, combine)
        yield
        self.room.wait_for_all(self.rank, occasion, purpose)


class Room:
    """What one set of workers share.

    Args:
        names: what to call each worker in messages.
        whole: the room of all workers, if this is one of a part of them; it knows who has failed.
    """

    def __init__(self, names: Sequence[str], whole: Room | None = None) -> None:
        self.names = list(names)
        self.size = len(self.names)
        self._whole = whole or self
        self._contributions: dict[int, dict[int, Any]] = {}
        self._leaving: dict[int, int] = {}
        self._mail: dict[tuple[int, int, int], Tensor] = {}
        self._posted: Counter[tuple[int, int]] = Counter()
        self._expected: Counter[tuple[int, int]] = Counter()
        self.failures: dict[str, str] = whole.failures if whole else {}
        self._rooms: dict[tuple[int, int], Room] = {}

    def come(self, rank: int, occasion: int, contribution: Any, combine: Callable[[list], None]) -> None:
        """Bring something to a collective; the last who comes combines what all have brought."""
        brought = self._contributions.setdefault(occasion, {})
        brought[rank] = contribution
        if len(brought) < self.size:
            return
        with torch.no_grad():
            combine([brought[other] for other in range(self.size)])
        del self._contributions[occasion]
        self._leaving[occasion] = self.size

    def wait_for_all(self, rank: int, occasion: int, purpose: str) -> None:
        """Wait until a collective has ended."""

        def missing() -> list[int]:
            return [other for other in range(self.size) if other not in self._contributions.get(occasion, {})]

        self._wait(rank, lambda: occasion in self._leaving, missing, purpose)
        self._leaving[occasion] -= 1
        if not self._leaving[occasion]:
            del self._leaving[occasion]

    def post(self, sender: int, receiver: int, message: Tensor) -> None:
        """Leave a message for a worker."""
        self._mail[sender, receiver, self._posted[sender, receiver]] = message
        self._posted[sender, receiver] += 1

    def expect(self, sender: int, receiver: int) -> int:
        """The number of the next message between two workers that nobody expects yet."""
        number = self._expected[sender, receiver]
        self._expected[sender, receiver] += 1
        return number

    def fetch(self, sender: int, receiver: int, number: int, purpose: str) -> Tensor:
        """Wait for a message from a worker."""
        self._wait(receiver, lambda: (sender, receiver, number) in self._mail, lambda: [sender], purpose)
        return self._mail.pop((sender, receiver, number))

    def fail(self, rank: int, reason: str) -> None:
        """Note that a worker comes to nothing any more, in this room or one that is a part of the same whole."""
        self.failures[self.names[rank]] = reason

    def beside(self, occasion: int, index: int, names: Sequence[str]) -> Room:
        """The room of one part of these workers, the same for all who ask on the same occasion."""
        return self._rooms.setdefault((occasion, index), Room(names, self._whole))

    def _wait(self, rank: int, ready: Callable[[], bool], missing: Callable[[], list[int]], purpose: str) -> None:
        def failed() -> list[str]:
            return [name for name in map(self.names.__getitem__, missing()) if name in self.failures]

        came = wait_until(lambda: ready() or bool(failed()))
        if ready():
            return
        message = f"{self.names[rank]} could not meet the other workers for {purpose}."
        if came:
            reasons = [f"{name} failed: {self.failures[name]}" for name in failed()]
            raise SyncError(f"{message} {' '.join(reasons)}")
        absent = ", ".join(self.names[other] for other in missing())
        raise SyncError(f"{message} Did not come, and never will, since all workers wait or have ended: {absent}.")


def in_process(size: int, timeout: timedelta = DEFAULT_TIMEOUT) -> list[Workers]:
    """Workers that meet in this process, by rank; let them take turns with :func:`together`.

    Args:
        size: how many.
        timeout: what :attr:`Workers.timeout` says. There is nothing to wait for: if nobody can go on, that is known.
    """
    room = Room([f"rank {rank}" for rank in range(size)])
    return [Workers(InProcessTransport(room, rank), timeout) for rank in range(size)]


def together(workers: Sequence[Workers], function: Callable[[Workers], T]) -> list[T]:
    """Call a function for every worker, in turns: each runs until it waits for the others.

    Args:
        workers: what :func:`in_process` made.
        function: called with each of them.

    Returns:
        The results, by rank.

    Raises:
        BaseException: what the first worker raised that failed by itself; the others are told, and end too.

    Example:
        >>> together(in_process(3), lambda workers: workers.gather([workers.rank]))[0]
        [[0.0], [1.0], [2.0]]
    """

    def tell(index: int, error: BaseException) -> None:
        workers[index].report_failure(f"{type(error).__name__}: {error}")

    for each in workers:  # whoever failed earlier, in a call that has ended, is here again
        if isinstance(each.transport, InProcessTransport):
            each.transport.room.failures.clear()
    return outcomes_of([partial(function, each) for each in workers], tell)


def _sum_for_all(tensors: list[Tensor]) -> None:
    total = tensors[0]
    for other in tensors[1:]:
        total.add_(other)
    for other in tensors[1:]:
        other.copy_(total)


def _scatter_sum(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for rank, (own, _) in enumerate(pairs):
        length = own.numel()
        pieces = [flat[rank * length : (rank + 1) * length] for _, flat in pairs]
        total = pieces[0].clone()
        for piece in pieces[1:]:
            total.add_(piece)
        own.copy_(total)


def _gather_for_all(pairs: list[tuple[Tensor, Tensor]]) -> None:
    whole = torch.cat([own for _, own in pairs])
    for flat, _ in pairs:
        flat.copy_(whole)


def _exchange_pieces(pairs: list[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> None:
    for receiver, (arriving, _) in enumerate(pairs):
        for sender, (_, leaving) in enumerate(pairs):
            arriving[sender].copy_(leaving[receiver])
