"""Messages between processes, by ``torch.distributed``: the one file of this floor that knows it.

The workers have process groups of their own, never Lightning's default one: a *data* group on the device's backend for
tensors, and a *control* group on gloo for headers, so that a decision never waits for a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_slowmo.communication import nccl
from lightning_slowmo.communication.bulletin import LOOK_SECONDS
from lightning_slowmo.communication.failures import Failures
from lightning_slowmo.communication.pipeline import Transfer
from lightning_slowmo.communication.staging import Stage, Staged
from lightning_slowmo.communication.transport import Transport
from lightning_slowmo.communication.workers import SyncError
from lightning_slowmo.private import default_store

LOOK_EVERY = timedelta(seconds=LOOK_SECONDS)
"""How often a worker that waits looks whether another one is known to have failed."""

UNUSED_TAG = 2**30
"""Tag of a message that nobody sends."""


FIRST_PAUSE, LAST_PAUSE = 2e-5, 1e-3
"""Seconds between two looks whether NCCL is done: short at first, for short messages."""

NCCL_GRACE = timedelta(minutes=5)
"""How much longer than a worker NCCL's watchdog waits: it ends the process, and names nobody."""


class TorchTransport:
    """One process among others.

    Args:
        data: process group for tensors.
        control: gloo process group of the same processes for headers.
        backend: that the data group uses, and that those of parts of it will.
        timeout: how long to wait for the others.
        names: what to call each process in messages.
        failures: of the set that these processes were split from, which knows them by their ranks in it; a new one, for
            all processes of ``torch.distributed``, if None.
        places: the ranks of these processes in that set.
    """

    def __init__(
        self,
        data: dist.ProcessGroup,
        control: dist.ProcessGroup,
        backend: str,
        timeout: timedelta,
        names: Sequence[str] | None = None,
        failures: Failures | None = None,
        places: Sequence[int] | None = None,
    ) -> None:
        self.group = data
        self.control = control
        self.backend = backend
        self.timeout = timeout
        self.rank = dist.get_rank(data)
        self.size = dist.get_world_size(data)
        self.names = list(names) if names is not None else [f"rank {rank}" for rank in range(self.size)]
        self.places = list(places) if places is not None else list(range(self.size))
        if failures is None:
            store = dist.PrefixStore(f"lightning_slowmo/{control.group_name}", _own_connection(default_store()))
            failures = Failures(store, self.rank, self.names, timeout)
            failures.close.append(lambda: _close(dist.group.WORLD))
            failures.abort.append(lambda: _abort(dist.group.WORLD))
        self.failures = failures
        failures.close.extend(partial(_close, group) for group in {data, control})
        if backend == "nccl":
            failures.abort.append(data.abort)
        self._operations = 0
        """Operations that all processes have taken part in: tells one occasion to wait from the others."""

    @classmethod
    def of_world(
        cls, timeout: timedelta, device: torch.device | str = "cpu", backend: str | None = None
    ) -> Transport | None:
        """All processes of ``torch.distributed``; None if this one is alone.

        Args:
            timeout: how long to wait for the others.
            device: of the tensors that travel.
            backend: what they travel by, also as ``"cpu:gloo,cuda:nccl"``; None: torch's usual one for the device.

        Raises:
            ValueError: if ``backend`` says nothing about the device.
        """
        device = torch.device(device)
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return None
        kind = backend_for(device, backend)
        data, control = _new_group(None, kind, timeout), _new_group(None, "gloo", timeout)
        transport = cls(data, control, kind, timeout)
        return Staged(transport, Stage(device)) if kind == "gloo" and device.type != "cpu" else transport

    # Tensors ----------------------------------------------------------------------------------------------------------

    def all_reduce(self, flat: Tensor, purpose: str) -> Transfer[None]:
        """Overwrite a tensor with its sum over the processes."""
        return self._collective(purpose, lambda: dist.all_reduce(flat, group=self.group, async_op=True))

    def reduce_scatter(self, own: Tensor, flat: Tensor, purpose: str) -> Transfer[None]:
        """Sum over the processes, of which each gets a piece."""
        return self._collective(purpose, lambda: dist.reduce_scatter_tensor(own, flat, group=self.group, async_op=True))

    def all_gather(self, flat: Tensor, own: Tensor, purpose: str) -> Transfer[None]:
        """Collect every process's piece."""
        return self._collective(
            purpose, lambda: dist.all_gather_into_tensor(flat, own, group=self.group, async_op=True)
        )

    def broadcast(self, tensor: Tensor, source: int, purpose: str) -> Transfer[None]:
        """Overwrite a tensor with that of one process."""
        return self._collective(
            purpose, lambda: dist.broadcast(tensor, self._global(source), group=self.group, async_op=True)
        )

    def all_to_all(
        self, arriving: Tensor, arriving_sizes: list[int], leaving: Tensor, leaving_sizes: list[int], purpose: str
    ) -> Transfer[None]:
        """Send every process a piece and receive one from each."""
        return self._collective(
            purpose,
            lambda: dist.all_to_all_single(
                arriving, leaving, arriving_sizes, leaving_sizes, group=self.group, async_op=True
            ),
        )

    def send_and_receive(
        self,
        message: Tensor,
        receivers: Sequence[int],
        arriving: Sequence[Tensor],
        senders: Sequence[int],
        purpose: str,
    ) -> Transfer[None]:
        """Send one message to some processes and receive one from others."""
        peers = [*senders, *receivers]
        kinds = [dist.irecv] * len(senders) + [dist.isend] * len(receivers)
        tensors = [*arriving, *[message] * len(receivers)]
        operations = [
            dist.P2POp(kind, tensor, self._global(peer), self.group)
            for kind, tensor, peer in zip(kinds, tensors, peers, strict=True)
        ]
        start = time.monotonic()
        try:
            works = dist.batch_isend_irecv(operations)
        except RuntimeError as error:  # a peer is gone already
            raise self._absence(purpose, error, peers) from error
        yield
        # gloo gives a handle per message, NCCL one for all.
        whom: Iterable[list[int]] = [[peer] for peer in peers]
        if len(works) != len(peers):
            whom = [sorted(set(peers))] * len(works)
        for work, depends_on in zip(works, whom, strict=True):
            # gloo gives messages up for good if a wait for them ends early, so there is no looking up in between: if
            # somebody fails meanwhile, the bulletin's thread closes the connections.
            self._wait(work, purpose, start, depends_on)

    def _collective(self, purpose: str, begin: Callable[[], Any]) -> Transfer[None]:
        self._operations += 1
        start = time.monotonic()
        try:
            work = begin()
        except RuntimeError as error:
            raise self._absence(purpose, error) from error
        yield
        if self.backend == "gloo":
            self._wait_and_look(work, purpose, start)
        else:  # a GPU waits in its stream, and this does not wait for it
            self._wait(work, purpose, start)

    def _global(self, rank: int) -> int:
        """The rank of one of these processes among all of ``torch.distributed``."""
        return dist.get_global_rank(self.group, rank)

    # Headers ----------------------------------------------------------------------------------------------------------

    def gather_header(self, everyone: Tensor, own: Tensor, purpose: str) -> None:
        """Collect a few numbers of every process, over the control group."""
        self._operations += 1
        start = time.monotonic()
        try:
            work = dist.all_gather_into_tensor(everyone, own, group=self.control, async_op=True)
        except RuntimeError as error:
            raise self._absence(purpose, error) from error
        self._wait_and_look(cast(dist.Work, work), purpose, start)

    # Sets and failures ------------------------------------------------------------------------------------------------

    def split(self, sets: Sequence[Sequence[int]], headers: bool) -> TorchTransport:
        """Process groups of disjoint sets: every process takes part in making every group, in the same order."""
        own: TorchTransport | None = None
        for ranks in sets:
            everywhere = [self._global(rank) for rank in ranks]
            data = _new_group(everywhere, self.backend, self.timeout)
            control = _new_group(everywhere, "gloo", self.timeout) if headers else data
            if self.rank in ranks:
                names = [self.names[rank] for rank in ranks]
                places = [self.places[rank] for rank in ranks]
                own = TorchTransport(data, control, self.backend, self.timeout, names, self.failures, places)
        assert own is not None  # every process is in one of the sets
        return own

    def report_failure(self, reason: str) -> None:
        """Leave word why this process stops."""
        if dist.is_initialized():
            self.failures.report(reason)
            self.failures.free_device()

    def let_others_hear(self) -> None:
        """Stay until the others have read the reason, if this process hosts the store."""
        if dist.is_initialized():
            self.failures.let_others_hear()

    def listen(self, all_the_time: bool) -> None:
        """Look for failures of the others all the time, or only while this process waits for them."""
        if dist.is_initialized():
            self.failures.listen(all_the_time)

    def close_also(self, group: Any) -> None:
        """Close another process group, too, if another process has failed."""
        self.failures.close.append(partial(_close, group))

    def explained(self, error: BaseException, purpose: str, waited: float = 0.0) -> SyncError | None:
        """Who failed, if an error of another process group comes from that; None if nobody did."""
        if isinstance(error, SyncError) or not _is_of_communication(error) or not dist.is_initialized():
            return None
        why = self.failures.why(purpose, None, None, waited)
        return SyncError(f"{self.names[self.rank]} was cut off during {purpose}. {why} {error}") if why else None

    def _wait_and_look(self, work: dist.Work, purpose: str, start: float) -> None:
        """Wait for a collective of gloo, and look from time to time whether somebody has failed who would never come.

        Args:
            work: what to wait for.
            purpose: what it is for, for messages.
            start: when it was begun.

        Raises:
            SyncError: if it failed or took longer than the timeout; names those who did not come, and why.
        """
        self.failures.bulletin.waiting += 1
        try:
            while True:
                # Asked before: work that ends while an exception says it has not is waited for once more.
                ended = work.is_completed()
                try:
                    work.wait(LOOK_EVERY)
                    return
                except RuntimeError as error:
                    waited = time.monotonic() - start
                    if ended or waited >= self.timeout.total_seconds() or self.failures.bulletin.bad_news:
                        raise self._absence(purpose, error, waited=waited) from error
        finally:
            self.failures.bulletin.waiting -= 1

    def _wait(self, work: dist.Work | None, purpose: str, start: float, peers: Sequence[int] | None = None) -> None:
        """Wait for a communication to end, at most as long as the timeout of its process group.

        Args:
            work: what to wait for; nothing if None.
            purpose: what it is for, for messages.
            start: when it was begun.
            peers: the processes on which it depends; all if None.

        Raises:
            SyncError: if it failed or took longer; names those who did not come, and why if that is known.
        """
        self.failures.bulletin.waiting += 1
        try:
            if work is not None:
                if self.backend == "nccl":
                    self._wait_for_device(work)
                work.wait()
        except RuntimeError as error:
            raise self._absence(purpose, error, peers, time.monotonic() - start) from error
        finally:
            self.failures.bulletin.waiting -= 1

    def _wait_for_device(self, work: dist.Work) -> None:
        """Look on the host until NCCL has done its work.

        NCCL's own ``wait`` only lets the GPU wait, for ever if a worker is gone, and whoever looks at a tensor then
        hangs. Other messages and kernels go on meanwhile, and what depends on this one could not begin anyway.

        Raises:
            RuntimeError: if it failed, another worker has, or it took longer than the timeout.
        """
        start = looked = time.monotonic()
        pause = FIRST_PAUSE
        while not work.is_completed():
            now = time.monotonic()
            if now - start > self.timeout.total_seconds():
                raise RuntimeError(f"NCCL did not end within {self.timeout}.")
            if now - looked > LOOK_EVERY.total_seconds():
                looked = now
                if self.failures.bulletin.bad_news:
                    raise RuntimeError("Another worker has failed.")
            time.sleep(pause)
            pause = min(2 * pause, LAST_PAUSE)
        try:
            reason = work.exception()
        except TypeError:  # torch before 2.12 cannot say; a worker that is gone is missed at the next header
            reason = None
        if reason is not None:
            raise RuntimeError(f"NCCL failed. {reason}")

    def _absence(
        self, purpose: str, error: RuntimeError, peers: Sequence[int] | None = None, waited: float = 0.0
    ) -> SyncError:
        if not dist.is_initialized():
            return SyncError(f"{self.names[self.rank]} could not meet the other workers for {purpose}. {error}")
        occasion = f"{self.control.group_name}/{self._operations}"
        places = [self.places[rank] for rank in (range(self.size) if peers is None else peers)]
        absence = self.failures.absence(purpose, occasion, error, places, waited)
        self.failures.free_device()
        return absence


def backend_for(device: torch.device, backend: str | None) -> str:
    """The backend that tensors of a device travel by.

    Args:
        device: of the tensors.
        backend: as for ``init_process_group``; None: torch's usual one for the device.

    Raises:
        ValueError: if ``backend`` says nothing about the device.
    """
    if backend is None:
        return dist.Backend.default_device_backend_map[device.type]
    if ":" not in backend:
        return backend.lower()
    by_device = dict(part.strip().split(":", 1) for part in backend.lower().split(","))
    if device.type not in by_device:
        raise ValueError(f"process_group_backend={backend!r} says nothing about {device.type} tensors.")
    return by_device[device.type]


def _new_group(ranks: list[int] | None, backend: str, timeout: timedelta) -> dist.ProcessGroup:
    if backend != "nccl":
        return cast(dist.ProcessGroup, dist.new_group(ranks, backend=backend, timeout=timeout))
    with nccl.settings(nccl.ENDS_IN_TIME, nccl.NAMES_FIRST):
        return cast(dist.ProcessGroup, dist.new_group(ranks, backend=backend, timeout=timeout + NCCL_GRACE))


def _own_connection(store: dist.Store) -> dist.Store:
    """A connection of one's own to a store: an operation that waits for ever on one does not block the other."""
    return store.clone() if hasattr(store, "clone") else store  # since torch 2.7


def _close(group: dist.ProcessGroup | None) -> None:
    """Close all connections of a process group, so that whatever waits for them fails, in this process and in others.

    gloo does this when a wait for a message ends early; its ``abort`` does nothing.
    """
    if group is None or dist.get_world_size(group) < 2:
        return
    if "gloo" in dist.get_backend_config(group):
        peer = dist.get_global_rank(group, 0 if dist.get_rank(group) else 1)
        with suppress(RuntimeError):  # says that the wait ended early, which is the purpose
            work = dist.irecv(torch.empty(1), peer, group=group, tag=UNUSED_TAG)
            cast(dist.Work, work).wait(timedelta(milliseconds=1))
    group.abort()


def _abort(group: dist.ProcessGroup | None) -> None:
    """End what a GPU still does for a process group: NCCL's kernels wait for ever for a worker that is gone."""
    if group is not None and "nccl" in dist.get_backend_config(group):
        group.abort()


def _is_of_communication(error: BaseException) -> bool:
    """Whether an error comes from torch.distributed; gloo's are plain RuntimeErrors."""
    said = ("gloo", "Connection closed by peer", "Application timeout caused pair closure", "NCCL")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in said)
    )
