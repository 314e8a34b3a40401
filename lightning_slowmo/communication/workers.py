"""The workers: who takes part, how they reach one another, and how many bytes that took.

A *worker* is one replica of the model. The workers have process groups of their own, never Lightning's default one: a
*data* group on the device's backend for parameters, and a *control* group on gloo for headers, so that a decision
never waits for a GPU. Every wait has a limit, and when it passes the error names whom it waited for.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

DEFAULT_TIMEOUT = timedelta(minutes=30)
"""How long a worker waits for the others by default, as torch.distributed does."""


LOOK_EVERY = timedelta(seconds=1)
"""How often a worker that waits looks whether another one has failed."""

PATIENCE = 2.0
"""Seconds that are given to the others, after an error, to say that they have one too."""


class SyncError(RuntimeError):
    """The workers could not meet: one did not come, failed, or came for something else."""


@dataclass
class Traffic:
    """Bytes that a worker gave to, and took from, the transport.

    Attributes:
        sent: bytes sent.
        received: bytes received.
        collectives: number of collective operations on tensors.
        headers: number of headers exchanged; their bytes are in ``sent`` and ``received``.
    """

    sent: int = 0
    received: int = 0
    collectives: int = 0
    headers: int = 0

    def copy(self) -> Traffic:
        """The present counts."""
        return Traffic(**vars(self))

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def __sub__(self, earlier: Traffic) -> Traffic:
        return Traffic(*(getattr(self, field.name) - getattr(earlier, field.name) for field in fields(self)))


@dataclass(frozen=True)
class Sum:
    """A sum over the workers that is under way.

    Attributes:
        flat: the tensor that will hold the sum.
        weight: the sum of the workers' weights: what to divide by for a mean.
    """

    flat: Tensor
    weight: float
    work: dist.Work | None
    workers: Workers

    def wait(self) -> Tensor:
        """Wait until the sum is there.

        Raises:
            SyncError: if a worker did not take part in time.
        """
        self.workers.wait(self.work, "the sum of the parameters")
        return self.flat


class Workers:
    """This process among the workers.

    Args:
        data: process group for tensors, or None for a worker that is alone.
        control: gloo process group of the same workers for headers; the data group if None.
        timeout: how long to wait for the others.
        names: what to call each worker in messages, for example ``"rank 3 (node 1)"``.
    """

    def __init__(
        self,
        data: dist.ProcessGroup | None = None,
        control: dist.ProcessGroup | None = None,
        timeout: timedelta = DEFAULT_TIMEOUT,
        names: Sequence[str] | None = None,
    ) -> None:
        self.data = data
        self.control = control if control is not None else data
        self.timeout = timeout
        self.rank = dist.get_rank(data) if data is not None else 0
        self.size = dist.get_world_size(data) if data is not None else 1
        self.names = list(names) if names is not None else [f"rank {rank}" for rank in range(self.size)]
        self.traffic = Traffic()

    @classmethod
    def from_world(cls, timeout: timedelta = DEFAULT_TIMEOUT, device: torch.device | str = "cpu") -> Workers:
        """Every process of ``torch.distributed`` is a worker; makes the two groups (all processes must call this).

        Args:
            timeout: how long to wait for the others.
            device: where the parameters are; decides the data group's backend.

        Example::

            dist.init_process_group("gloo")
            engine = Engine(SlowMo(), [optimizer], Workers.from_world())
        """
        if not (dist.is_available() and dist.is_initialized()):
            return cls(timeout=timeout)
        backend = dist.Backend.default_device_backend_map[torch.device(device).type]
        data = cast(dist.ProcessGroup, dist.new_group(backend=backend, timeout=timeout))
        control = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout))
        return cls(data, control, timeout)

    @property
    def alone(self) -> bool:
        """Whether there is nobody to meet."""
        return self.size == 1

    # Tensors ----------------------------------------------------------------------------------------------------------

    def sum(self, flat: Tensor, weights: Sequence[float] | None = None) -> Sum:
        """Start the weighted sum over the workers of a flat tensor, in place.

        A ring all-reduce sends each element twice, less the share that a worker already has: 2(n-1)/n.

        Args:
            flat: this worker's values; overwritten with the sum, which is the same on all workers to the last bit.
            weights: the weight of each worker, by rank; equal if None. A worker of weight 0 takes no part with its
                values, whatever they are (also NaN), but receives the sum.

        Returns:
            A handle to wait on. The division of a mean is left to the caller, who has the sum in the cache then.
        """
        total = self.weigh(flat, weights)
        if self.alone:
            return Sum(flat, total, None, self)
        self._count(2 * (self.size - 1) * flat.numel() * flat.element_size() // self.size)
        return Sum(flat, total, dist.all_reduce(flat, group=self.data, async_op=True), self)

    def weigh(self, flat: Tensor, weights: Sequence[float] | None = None) -> float:
        """Multiply this worker's values by its weight, in place, relative to the largest weight of all.

        So the workers of full weight send their values as they are, and a weight of 0 makes zeros also of NaN.

        Args:
            flat: this worker's values.
            weights: the weight of each worker, by rank; equal if None.

        Returns:
            The sum of the relative weights.
        """
        if weights is None or len(set(weights)) == 1:
            return float(self.size)
        largest = max(weights)
        mine = weights[self.rank] / largest
        if mine == 0:
            flat.zero_()
        elif mine != 1:
            flat.mul_(mine)
        return sum(weights) / largest

    def scatter_sum(self, flat: Tensor, own: Tensor) -> None:
        """Sum a flat tensor over the workers and leave each with its piece of the sum.

        Args:
            flat: ``size`` pieces of equal length, by rank.
            own: where this worker's piece of the sum goes.
        """
        if self.alone:
            own.copy_(flat)
            return
        self._count((self.size - 1) * own.numel() * own.element_size())
        work = dist.reduce_scatter_tensor(own, flat, group=self.data, async_op=True)
        self.wait(work, "the sum of the parameters")

    def gather_pieces(self, flat: Tensor, own: Tensor) -> None:
        """Collect the workers' pieces.

        Args:
            flat: where ``size`` pieces of equal length go, by rank.
            own: this worker's.
        """
        if self.alone:
            flat.copy_(own)
            return
        self._count((self.size - 1) * own.numel() * own.element_size())
        work = dist.all_gather_into_tensor(flat, own, group=self.data, async_op=True)
        self.wait(work, "the parameters")

    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        """Overwrite a tensor with that of worker ``source``."""
        if self.alone:
            return
        size = tensor.numel() * tensor.element_size()
        self._count(size if self.rank == source else 0, 0 if self.rank == source else size)
        assert self.data is not None
        work = dist.broadcast(tensor, dist.get_global_rank(self.data, source), group=self.data, async_op=True)
        self.wait(work, "a broadcast")

    # Headers ----------------------------------------------------------------------------------------------------------

    def gather(self, numbers: Sequence[float], purpose: str = "a header") -> list[list[float]]:
        """Every worker's numbers, by rank, over the control group.

        Args:
            numbers: as many on every worker; sent as float64, exact for integers below 2**53.
            purpose: what the meeting is for, for messages.

        Raises:
            SyncError: if a worker did not come in time; names it.
        """
        if self.alone:
            return [list(numbers)]
        mine = torch.tensor(numbers, dtype=torch.float64)
        everyone = torch.empty(self.size * len(numbers), dtype=torch.float64)
        self.traffic.headers += 1
        self._count((self.size - 1) * mine.numel() * 8, collectives=0)
        try:
            work = dist.all_gather_into_tensor(everyone, mine, group=self.control, async_op=True)
        except RuntimeError as error:
            raise self._absence(purpose, error) from error
        self._wait_for_headers(cast(dist.Work, work), purpose)
        return everyone.view(self.size, -1).tolist()

    def gather_text(self, text: str) -> list[str]:
        """Every worker's text, by rank. Sent as UTF-8: nothing is unpickled."""
        raw = text.encode()
        length = int(max(row[0] for row in self.gather([len(raw)])))
        padded = raw.ljust(length, b"\0")
        rows = self.gather(list(padded)) if length else [[]] * self.size
        return [bytes(map(int, row)).rstrip(b"\0").decode() for row in rows]

    # Waiting ----------------------------------------------------------------------------------------------------------

    def wait(self, work: dist.Work | None, purpose: str, peers: Sequence[int] | None = None) -> None:
        """Wait for a communication to end, at most as long as the timeout.

        Args:
            work: what to wait for; nothing if None.
            purpose: what it is for, for messages.
            peers: the workers on whom it depends; all if None.

        Raises:
            SyncError: if it failed or took longer; names the workers who did not come, and why if that is known.
        """
        try:
            if work is not None:
                work.wait()
        except RuntimeError as error:
            raise self._absence(purpose, error, peers) from error

    def _wait_for_headers(self, work: dist.Work, purpose: str) -> None:
        """Wait, and look from time to time whether somebody has failed who would never come."""
        start = time.monotonic()
        while True:
            # Asked before: work that ends while an exception says it has not is waited for once more.
            ended = work.is_completed()
            try:
                work.wait(LOOK_EVERY)
                return
            except RuntimeError as error:
                waited = timedelta(seconds=time.monotonic() - start)
                if ended or waited >= self.timeout or self._somebody_failed():
                    raise self._absence(purpose, error, lost=waited < self.timeout * 0.9) from error

    def _somebody_failed(self) -> bool:
        try:
            return bool(self._store().check(["failed"]))
        except RuntimeError:  # its host is gone
            return True

    def report_failure(self, reason: str) -> None:
        """Leave word why this worker stops, for those who wait for it or will."""
        store = self._store()
        if store is not None:
            with suppress(RuntimeError):  # the store's host may be gone, and this worker is failing anyway
                store.set(f"failed/{self.rank}", reason[:2000])
                store.set("failed", "")

    def let_others_hear(self) -> None:
        """Stay a moment, if this process holds the store with the reason why it fails, until the others have read it.

        Under torchrun the agent holds the store, and nobody has to stay.
        """
        store = self._store()
        if store is None or self.rank != 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return
        give_up = time.monotonic() + PATIENCE
        with suppress(RuntimeError):
            for rank in range(1, self.size):
                while not (store.check([f"heard/{rank}"]) or store.check([f"failed/{rank}"])):
                    if time.monotonic() > give_up:
                        return
                    time.sleep(0.05)

    def _absence(
        self, purpose: str, error: RuntimeError, peers: Sequence[int] | None = None, lost: bool = False
    ) -> SyncError:
        """Find out who did not come: whoever waited in vain signs a list, and the others' names are missing in it."""
        message = f"{self.names[self.rank]} could not meet the other workers for {purpose}."
        store = self._store()
        if store is None:
            return SyncError(f"{message} {error}")
        try:
            meeting = f"{purpose}/{self.traffic.headers}/{self.traffic.collectives}"
            store.set(f"waited/{meeting}/{self.rank}", "")
            others = [rank for rank in (range(self.size) if peers is None else peers) if rank != self.rank]
            give_up = time.monotonic() + PATIENCE
            while True:
                failed = [rank for rank in others if store.check([f"failed/{rank}"])]
                missing = [rank for rank in others if not store.check([f"waited/{meeting}/{rank}"])]
                if failed or not missing or time.monotonic() > give_up:
                    break
                time.sleep(0.1)
            reasons = [f"{self.names[rank]} failed: {store.get(f'failed/{rank}').decode()}" for rank in failed]
            store.set(f"heard/{self.rank}", "")
        except RuntimeError:
            return SyncError(f"{message} The process that held the rendezvous (usually rank 0) is gone. {error}")
        if reasons:
            return SyncError(f"{message} {' '.join(reasons)}")
        if missing:
            absent = ", ".join(self.names[rank] for rank in missing)
            how = "Ended without a word, or lost its connection" if lost else f"Did not come (within {self.timeout})"
            return SyncError(f"{message} {how}: {absent}. {error}")
        return SyncError(f"{message} All workers lost the connection. {error}")

    def _store(self) -> Any:
        """A corner of the rendezvous store for this set of workers."""
        if self.alone or not dist.is_initialized():
            return None
        store = dist.distributed_c10d._get_default_store()
        name = self.control.group_name if self.control is not None else ""
        corner = dist.PrefixStore(f"lightning_slowmo/{name}", store)
        corner.set_timeout(timedelta(seconds=5))
        return corner

    def _count(self, sent: int, received: int | None = None, collectives: int = 1) -> None:
        self.traffic.sent += sent
        self.traffic.received += sent if received is None else received
        self.traffic.collectives += collectives
