"""Notes that all workers can read: a corner of the rendezvous store, and the one thread of a process that uses it.

An operation of the store has no limit if the process that serves it is frozen, or its machine is gone without closing
its connections. So only a thread of its own talks to the store, over a connection of its own, and whoever asks it for
something waits for the answer no longer than it wants to.

While this process waits for others, or :attr:`Bulletin.listening` is set, the thread also looks regularly for notes of
the others. It answers roll calls, even if the main thread is busy with a long computation, and it remembers who has
failed. If the main thread has not come to know that shortly after, it is stuck in an operation that will never end, and
the thread closes the connections, so that the operation fails.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")

LOOK_SECONDS = 0.5
"""Seconds between two looks at the notes."""

CLOSE_SECONDS = 1.0
"""Seconds after a failure became known, after which the main thread is taken to be stuck."""

CLOSE_SECONDS_WITHOUT_CAUSE = 10.0
"""The same, as long as only errors about a meeting are known: most of them are raised on all workers alike, and those
that are a little slower need their connections if they go on after that."""

CLOSE_LIMIT_SECONDS = 30.0
"""Seconds after which the thread looks at the notes again, though not everything is closed yet."""

NOT_A_CAUSE = "SyncError"
"""How the reason of a worker begins that only suffers from another one's failure."""

NEWS, FAILED, GONE, ROLL, HERE, LISTENS = "news", "failed", "gone", "roll", "here", "listens"
"""Keys: there are notes at all; a worker's reason; a worker that is gone, as others found; roll calls and answers to
them; whether a worker looks at the notes all the time."""


class NoAnswer(Exception):
    """The process that serves the store does not answer."""


class Bulletin:
    """The notes of one set of workers.

    Args:
        store: a connection to the store that nothing else uses, restricted to these workers.
        rank: which worker this is.
        size: how many there are.
        close: called by the thread to end all communication of this process, whoever waits for it.

    Attributes:
        failed: why each worker that has failed did, as far as this process has read.
        gone: workers that ended without a word, as others found.
        listening: whether the thread looks at the notes all the time, and not only while this process waits.
        waiting: how many waits of this process are going on.
        told: whether the main thread knows of a failure, so that nothing has to be closed for it.
    """

    def __init__(self, store: Any, rank: int, size: int, close: Sequence[Callable[[], None]]) -> None:
        self.rank = rank
        self.others = [other for other in range(size) if other != rank]
        self.failed: dict[int, str] = {}
        self.gone: set[int] = set()
        self.listening = False
        self.waiting = 0
        self.told = False
        self._store = store
        self._close = close
        self._known_since: float | None = None
        self._questions: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._silent = False
        self._store_is_gone = False
        self._answered: set[int] = set()
        self._thread = threading.Thread(target=self._run, name="lightning_slowmo notes", daemon=True)
        self._thread.start()

    @property
    def bad_news(self) -> bool:
        """Whether a worker is known to have failed or gone."""
        return bool(self.failed or self.gone)

    @property
    def causes(self) -> dict[int, str]:
        """Why workers have failed that did not only suffer from another one's failure."""
        return {rank: reason for rank, reason in self.failed.items() if not reason.startswith(NOT_A_CAUSE)}

    def ask(self, question: Callable[[Any], T], seconds: float) -> T:
        """Let the thread do something with the store.

        Args:
            question: called with the store.
            seconds: how long to wait for the answer.

        Raises:
            NoAnswer: if it did not come in time, or an earlier one has still not come. The thread does it nevertheless,
                should the store answer some day.
            RuntimeError: if the store is gone.
        """
        answers: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

        def answer() -> None:
            try:
                answers.put((True, question(self._store)))
            except RuntimeError as error:
                answers.put((False, error))
            self._silent = False

        self._questions.put(answer)
        if self._silent:
            raise NoAnswer
        try:
            fine, result = answers.get(timeout=max(0.0, seconds))
        except queue.Empty:
            self._silent = True
            raise NoAnswer from None
        if not fine:
            raise result
        return result

    def read(self, store: Any) -> None:
        """Take in what the others have written, and answer roll calls; for the thread, see :meth:`ask`."""
        if not store.check([NEWS]):
            return
        for other in self.others:
            if other not in self._answered and store.check([f"{ROLL}/{other}"]):
                store.set(f"{HERE}/{other}/{self.rank}", "")
                self._answered.add(other)
            if other not in self.failed and store.check([f"{FAILED}/{other}"]):
                self.failed[other] = store.get(f"{FAILED}/{other}").decode()
                store.set(f"{HERE}/{FAILED}/{self.rank}", "")
            if other not in self.gone and store.check([f"{GONE}/{other}"]):
                self.gone.add(other)

    def roll(self, store: Any) -> dict[int, bool]:
        """Which of the other workers have answered this one's roll call; for the thread, see :meth:`ask`.

        Those that do not listen all the time are left out: they may be busy, and say nothing by their silence.
        """
        keys = {rank: f"{LISTENS}/{rank}" for rank in self.others}
        listening = [rank for rank, key in keys.items() if store.check([key]) and store.get(key) == b"yes"]
        missing = answers_missing(store, str(self.rank), listening)
        return {rank: rank not in missing for rank in listening}

    def stop(self) -> None:
        """End the thread, before the interpreter ends, which a thread that comes back from torch must not meet."""
        self._questions.put(None)
        if threading.current_thread() is not self._thread:  # of which the garbage collector may have called this
            self._thread.join(1.0)

    def _run(self) -> None:
        next_look = time.monotonic() + LOOK_SECONDS
        while True:
            try:
                question = self._questions.get(timeout=max(0.0, next_look - time.monotonic()))
            except queue.Empty:
                next_look = time.monotonic() + LOOK_SECONDS
                if (self.listening or self.waiting) and not self._store_is_gone:
                    self._look()
                continue
            if question is None:
                return
            question()

    def _look(self) -> None:
        """Read the notes, and free the main thread if it is stuck."""
        try:
            self.read(self._store)
        except RuntimeError:  # those who ask will be told
            self._store_is_gone = True
            return
        if not self.bad_news or self.told:
            return
        if self._known_since is None:
            self._known_since = time.monotonic()
        patience = CLOSE_SECONDS if self.causes or self.gone else CLOSE_SECONDS_WITHOUT_CAUSE
        if time.monotonic() - self._known_since >= patience:
            self.told = True
            all_at_once(self._close, CLOSE_LIMIT_SECONDS)


def all_at_once(acts: Sequence[Callable[[], None]], seconds: float) -> None:
    """Call functions in threads of their own, and wait for them no longer than some seconds.

    One after the other would not do: NCCL's abort of a group frees memory, for which it waits for all kernels of the
    device, those of the next group among them.

    Args:
        acts: what to call; errors about groups that are closed already are ignored.
        seconds: after which this returns, and leaves the rest to threads that do not keep the process from ending.
    """

    def act_quietly(act: Callable[[], None]) -> None:
        with suppress(RuntimeError, ValueError):
            act()

    threads = [threading.Thread(target=act_quietly, args=(act,), daemon=True) for act in acts]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))


def answers_missing(store: Any, occasion: str, ranks: Sequence[int]) -> list[int]:
    """Of these workers, those that have not answered on an occasion; for the thread, see :meth:`Bulletin.ask`."""
    return [rank for rank in ranks if not store.check([f"{HERE}/{occasion}/{rank}"])]
