"""Who failed, and why: words that workers leave for one another where all can read them, in the rendezvous store.

A worker that waits in vain cannot ask the one that it waits for. So whoever fails writes its reason into the store,
whoever waits in vain signs a list there, and from both follows whom to name in the error.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

from lightning_slowmo.communication.workers import SyncError

FAILURE_GRACE_SECONDS = 2.0
"""Seconds that are given to the others, after an error, to say that they have one too."""

STORE_SECONDS = 5
"""Seconds after which an operation of the store is given up."""


class Failures:
    """A corner of the rendezvous store for one set of workers.

    Args:
        store: the rendezvous store of ``torch.distributed``, restricted to these workers.
        rank: which worker this is.
        names: what to call each worker in messages.
        timeout: how long workers wait for one another.
    """

    def __init__(self, store: Any, rank: int, names: Sequence[str], timeout: timedelta) -> None:
        self.store = store
        self.rank = rank
        self.names = names
        self.timeout = timeout
        store.set_timeout(timedelta(seconds=STORE_SECONDS))

    def report(self, reason: str) -> None:
        """Leave word why this worker stops."""
        with suppress(RuntimeError):  # the store's host may be gone, and this worker is failing anyway
            self.store.set(f"failed/{self.rank}", reason[:2000])
            self.store.set("failed", "")

    def any(self) -> bool:
        """Whether a worker has failed, or the store's host is gone."""
        try:
            return bool(self.store.check(["failed"]))
        except RuntimeError:
            return True

    def let_others_hear(self) -> None:
        """Stay a moment, if this process hosts the store with the reason why it fails, until the others have read it.

        Under torchrun the agent hosts the store, and nobody has to stay.
        """
        if self.rank != 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return
        give_up = time.monotonic() + FAILURE_GRACE_SECONDS
        with suppress(RuntimeError):
            for rank in range(1, len(self.names)):
                while not (self.store.check([f"heard/{rank}"]) or self.store.check([f"failed/{rank}"])):
                    if time.monotonic() > give_up:
                        return
                    time.sleep(0.05)

    def absence(
        self, purpose: str, occasion: str, error: RuntimeError, peers: Sequence[int] | None = None, lost: bool = False
    ) -> SyncError:
        """Find out who did not come: whoever waited in vain signs a list, and the others' names are missing in it.

        Args:
            purpose: what the workers were to meet for.
            occasion: tells this meeting from others for the same purpose; equal on all workers.
            error: what the transport said.
            peers: the workers on whom it depended; all if None.
            lost: whether the error came before the time was over, so that a connection must have been lost.

        Returns:
            The error to raise.
        """
        message = f"{self.names[self.rank]} could not meet the other workers for {purpose}."
        try:
            place = f"waited/{purpose}/{occasion}"
            self.store.set(f"{place}/{self.rank}", "")
            others = [rank for rank in (range(len(self.names)) if peers is None else peers) if rank != self.rank]
            give_up = time.monotonic() + FAILURE_GRACE_SECONDS
            while True:
                failed = [rank for rank in others if self.store.check([f"failed/{rank}"])]
                missing = [rank for rank in others if not self.store.check([f"{place}/{rank}"])]
                if failed or not missing or time.monotonic() > give_up:
                    break
                time.sleep(0.1)
            reasons = [f"{self.names[rank]} failed: {self.store.get(f'failed/{rank}').decode()}" for rank in failed]
            self.store.set(f"heard/{self.rank}", "")
        except RuntimeError:
            return SyncError(f"{message} The process that held the rendezvous (usually rank 0) is gone. {error}")
        if reasons:
            return SyncError(f"{message} {' '.join(reasons)}")
        if missing:
            absent = ", ".join(self.names[rank] for rank in missing)
            how = "Ended without a word, or lost its connection" if lost else f"Did not come (within {self.timeout})"
            return SyncError(f"{message} {how}: {absent}. {error}")
        return SyncError(f"{message} All workers lost the connection. {error}")
