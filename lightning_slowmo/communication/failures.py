"""Who failed, and why: what workers write for one another, and the errors that are made of it.

A worker that waits in vain cannot ask the one that it waits for. So whoever fails leaves its reason where all can read
it. Whoever waited too long signs a list, and those who did not come are missing in it; whoever lost a connection calls
the roll, and those that are gone do not answer.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from lightning_slowmo.communication.bulletin import (
    FAILED,
    GONE,
    LISTENS,
    NEWS,
    ROLL,
    Bulletin,
    NoAnswer,
    all_at_once,
    answers_missing,
)
from lightning_slowmo.communication.workers import SyncError

FAILURE_GRACE_SECONDS = 2.0
"""Seconds that are given to the others, after an error, to answer or to say that they have one too."""

STORE_SECONDS = 5.0
"""Seconds after which the process that serves the store is taken to be frozen."""

ABORT_SECONDS = 10.0
"""Seconds that a device may take to end its communication; then the error is raised nevertheless."""


class Failures:
    """What one process knows of the failures of all, and how it tells them of its own.

    Args:
        store: a connection to the rendezvous store that nothing else uses, restricted to these workers.
        rank: which worker this is.
        names: what to call each worker in messages.
        timeout: how long workers wait for one another.

    Attributes:
        close: what to call to end all communication of this process, whoever waits for it.
        abort: what to call to end communication that its device waits for.
    """

    def __init__(self, store: Any, rank: int, names: Sequence[str], timeout: timedelta) -> None:
        self.rank = rank
        self.names = list(names)
        self.timeout = timeout
        self.close: list[Callable[[], None]] = []
        self.abort: list[Callable[[], None]] = []
        self.bulletin = Bulletin(store, rank, len(names), self.close)
        weakref.finalize(self, self.bulletin.stop)

    @property
    def host(self) -> str:
        """The process that holds the rendezvous, for messages."""
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return f"torchrun on {os.environ.get('MASTER_ADDR', 'the first node')}"
        return self.names[0]

    def listen(self, all_the_time: bool) -> None:
        """Look at the others' notes all the time, and answer for this process, or only while it waits for others.

        All the time is for as long as a Trainer runs: then all processes end together, and none goes on asking a store
        whose process has ended.
        """
        self.bulletin.listening = all_the_time
        self._try(lambda store: store.set(f"{LISTENS}/{self.rank}", "yes" if all_the_time else "no"), STORE_SECONDS)

    def report(self, reason: str) -> None:
        """Leave word why this worker stops."""

        def write(store: Any) -> None:
            store.set(f"{FAILED}/{self.rank}", reason[:2000])
            store.set(NEWS, "")

        self.bulletin.told = True
        self._try(write, STORE_SECONDS)

    def free_device(self) -> None:
        """End what a device still does for these workers, after which nothing keeps this process from ending.

        A kernel that waits for a worker that is gone waits for ever, and with it whatever waits for the device: a copy
        of the model to the host, the release of memory, ``destroy_process_group``.
        """
        all_at_once(self.abort, ABORT_SECONDS)

    def let_others_hear(self) -> None:
        """Stay a moment, if this process hosts the store with the reason why it fails, until the others have read it.

        Under torchrun the agent hosts the store, and nobody has to stay.
        """
        if self.rank != 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return
        deadline = time.monotonic() + FAILURE_GRACE_SECONDS
        while time.monotonic() < deadline:
            if not self._try(self._have_not_heard, STORE_SECONDS):
                return
            time.sleep(0.05)

    def _have_not_heard(self, store: Any) -> list[int]:
        others = [rank for rank in self.bulletin.others if not store.check([f"{FAILED}/{rank}"])]
        return answers_missing(store, FAILED, others)

    def _try(self, question: Callable[[Any], Any], seconds: float) -> Any:
        """Ask the store; None if it is gone or silent, for a worker that is failing anyway."""
        try:
            return self.bulletin.ask(question, seconds)
        except (NoAnswer, RuntimeError):
            return None

    # Errors -----------------------------------------------------------------------------------------------------------

    def absence(
        self,
        purpose: str,
        occasion: str | None,
        error: BaseException,
        peers: Sequence[int] | None = None,
        waited: float = 0.0,
    ) -> SyncError:
        """Find out who did not come, or failed.

        Args:
            purpose: what the workers were to meet for.
            occasion: tells this meeting from others for the same purpose; equal on all workers. None if there is none.
            error: what the transport said.
            peers: the workers on whom it depended; all if None.
            waited: seconds; if shorter than the timeout, a connection must have been lost.

        Returns:
            The error to raise.
        """
        why = self.why(purpose, occasion, peers, waited) or "All workers are there, but have lost their connections."
        return SyncError(f"{self.names[self.rank]} could not meet the other workers for {purpose}. {why} {error}")

    def why(self, purpose: str, occasion: str | None, peers: Sequence[int] | None, waited: float) -> str:
        """What :meth:`absence` finds out; empty if nobody is to be blamed."""
        self.bulletin.told = True
        inquiry = Inquiry(self, f"waited/{purpose}/{occasion}", peers, waited)
        silence = ""
        if not self.bulletin.bad_news:
            try:
                inquiry.run(listed=occasion is not None)
            except NoAnswer:
                silence = f"({self.host}) does not answer: it is frozen, or its machine is gone."
            except RuntimeError:
                silence = f"({self.host}) is gone."
        if self.bulletin.bad_news:
            return self._known()
        return f"The process that holds the rendezvous {silence}" if silence else inquiry.findings()

    def _known(self) -> str:
        """What has become known by notes: causes, or those who suffer from them if no cause is known."""
        bulletin = self.bulletin
        causes = bulletin.causes
        gone = sorted(bulletin.gone - causes.keys())
        found = [f"{self.names[rank]} failed: {reason}." for rank, reason in sorted(causes.items())]
        if gone:
            found.append(f"Ended without a word, or lost its connection: {self._named(gone)}.")
        return " ".join(
            found or [f"{self.names[rank]} failed: {reason}." for rank, reason in sorted(bulletin.failed.items())]
        )

    def _named(self, ranks: Sequence[int]) -> str:
        return ", ".join(self.names[rank] for rank in ranks)


class Inquiry:
    """One worker's search for those who did not come.

    Args:
        failures: of the worker.
        place: of the list that those sign who waited for the same.
        peers: the workers on whom it depended; all if None.
        waited: seconds that this worker has waited.
    """

    def __init__(self, failures: Failures, place: str, peers: Sequence[int] | None, waited: float) -> None:
        self.failures = failures
        self.bulletin = failures.bulletin
        self.place = place
        self.peers = [rank for rank in self.bulletin.others if peers is None or rank in peers]
        self.waited = waited
        self.lost = waited < 0.9 * failures.timeout.total_seconds()
        self.unsigned: list[int] = []
        self.answered: dict[int, bool] = {}
        self.others_waited: dict[int, float] = {}
        self.store_seconds = 0.0

    def run(self, listed: bool) -> None:
        """Sign the list, call the roll, and wait for the others' answers and reasons.

        Args:
            listed: whether there is a list.
        """
        start = time.monotonic()
        self.bulletin.ask(self._sign, STORE_SECONDS)
        self.store_seconds = time.monotonic() - start
        grace = time.monotonic() + FAILURE_GRACE_SECONDS
        while time.monotonic() < grace:
            self.bulletin.ask(self._look, STORE_SECONDS - self.store_seconds + FAILURE_GRACE_SECONDS)
            if self.bulletin.bad_news or (listed and not self.unsigned):
                return
            time.sleep(0.1)
        if self.lost and self.silent:
            self.bulletin.ask(self._tell, FAILURE_GRACE_SECONDS)

    def _sign(self, store: Any) -> None:
        rank = self.failures.rank
        store.set(f"{self.place}/{rank}", f"{self.waited:.3f}")
        store.set(f"{ROLL}/{rank}", "")
        store.set(NEWS, "")

    def _look(self, store: Any) -> None:
        self.bulletin.read(store)
        self.unsigned = [rank for rank in self.peers if not store.check([f"{self.place}/{rank}"])]
        for rank in set(self.peers) - set(self.unsigned) - self.others_waited.keys():
            self.others_waited[rank] = float(store.get(f"{self.place}/{rank}"))
        self.answered = self.bulletin.roll(store)

    @property
    def silent(self) -> list[int]:
        """Workers that gave no answer, though a thread of theirs would even if they were busy."""
        return [rank for rank, answered in self.answered.items() if not answered and rank not in self.others_waited]

    def _tell(self, store: Any) -> None:
        """Name the workers that are gone to all others, who may have lost other connections than this one."""
        for rank in self.silent:
            store.set(f"{GONE}/{rank}", "")
        self.bulletin.gone.update(self.silent)

    def findings(self) -> str:
        """What the list and the roll say, where nobody left word of a failure; empty if all are there."""
        timeout = self.failures.timeout
        if not self.lost and self.unsigned:
            frozen = [rank for rank in self.unsigned if rank in self.silent]
            does_not_answer = f" No answer at all, frozen or gone: {self._named(frozen)}." if frozen else ""
            return f"Did not come (within {timeout}): {self._named(self.unsigned)}.{does_not_answer}"
        lost = [rank for rank in self.unsigned if not self.answered.get(rank)]
        if lost:
            return f"Ended without a word, or lost its connection: {self._named(lost)}."
        waits = self.others_waited | {self.failures.rank: self.waited}
        late = sorted(rank for rank, seconds in waits.items() if seconds < 0.5 * max(waits.values()))
        if late and max(waits.values()) >= 0.9 * timeout.total_seconds():
            return f"Came after the others had given up (they waited {timeout}): {self._named(late)}."
        if self.store_seconds > 1:
            host, seconds = self.failures.host, self.store_seconds
            return f"The process that holds the rendezvous ({host}) was frozen: it did not answer for {seconds:.0f} s."
        return ""

    def _named(self, ranks: Sequence[int]) -> str:
        return ", ".join(self.failures.names[rank] for rank in ranks)
