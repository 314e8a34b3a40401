"""The workers: who takes part, what they can do together, and how many bytes that took.

A *worker* is one replica of the model. Algorithms know the others through :class:`Workers` alone, whatever carries the
messages: process groups of ``torch.distributed``, the memory of one process in which workers take turns, or nothing for
a worker that is alone. Every wait has a limit, and when it passes the error names whom it waited for.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_slowmo.bucket_sizes import DEFAULT_SIZES, BucketSizes, check_bucket_cap, sizes_for
from lightning_slowmo.communication.pipeline import Transfer, complete
from lightning_slowmo.communication.timeouts import DEFAULT_TIMEOUT

if TYPE_CHECKING:
    from lightning_slowmo.communication.transport import Transport


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


class Workers:
    """This worker among the others.

    Args:
        transport: what carries messages; None for a worker that is alone.
        timeout: how long to wait for the others.
        names: what to call each worker in messages, for example ``"rank 3 (node 1)"``.
        places: the ranks of these workers in the set that they were split from, see :meth:`split`; their own if None.
        sizes: how parameters are cut into messages between these workers; equal on all of them.

    Attributes:
        rank: which worker this is.
        size: how many there are.
        traffic: what this worker has sent and received so far.
    """

    def __init__(
        self,
        transport: Transport | None = None,
        timeout: timedelta = DEFAULT_TIMEOUT,
        names: Sequence[str] | None = None,
        places: Sequence[int] | None = None,
        sizes: BucketSizes = DEFAULT_SIZES,
    ) -> None:
        self.transport = transport
        self.timeout = timeout
        self.rank = transport.rank if transport is not None else 0
        self.size = transport.size if transport is not None else 1
        self.names = list(names) if names is not None else [f"rank {rank}" for rank in range(self.size)]
        self.places = list(places) if places is not None else list(range(self.size))
        self.sizes = sizes
        self.traffic = Traffic()

    @classmethod
    def from_world(
        cls,
        timeout: timedelta = DEFAULT_TIMEOUT,
        device: torch.device | str = "cpu",
        backend: str | None = None,
        bucket_cap_mb: float | None = None,
    ) -> Workers:
        """Every process of ``torch.distributed`` is a worker; makes process groups (all processes must call this).

        Args:
            timeout: how long to wait for the others.
            device: where the parameters are.
            backend: what tensors travel by, as for ``init_process_group``, for example ``"nccl"`` or
                ``"cpu:gloo,cuda:nccl"``; None: torch's usual one for the device. With gloo, tensors of a GPU travel
                through host memory.
            bucket_cap_mb: size of messages in MiB, see :func:`~lightning_slowmo.bucket_sizes.sizes_for`.

        Raises:
            ValueError: if ``bucket_cap_mb`` differs between workers.

        Example::

            dist.init_process_group("gloo")
            engine = Engine(SlowMo(), [optimizer], Workers.from_world())
        """
        from lightning_slowmo.communication.torch_transport import TorchTransport

        check_bucket_cap(bucket_cap_mb)
        workers = cls(TorchTransport.of_world(timeout, device, backend), timeout)
        # Messages are the same on all workers, whatever devices they have.
        on_gpu = torch.device(device).type == "cuda"
        told = workers.gather([float(on_gpu), bucket_cap_mb or 0.0], "the size of messages")
        if len({cap for _, cap in told}) > 1:
            raise ValueError(f"bucket_cap_mb must be equal on all workers, got {[cap or None for _, cap in told]}.")
        device = device if all(gpu for gpu, _ in told) else "cpu"
        workers.sizes = sizes_for(device, workers.size, bucket_cap_mb)
        workers.traffic = Traffic()
        return workers

    @classmethod
    def simulated(cls, size: int, timeout: timedelta = DEFAULT_TIMEOUT) -> list[Workers]:
        """Workers of this process alone, by rank, which take turns; no processes, no start-up.

        Args:
            size: how many.
            timeout: as for :meth:`from_world`; whoever waits in vain is told at once.

        Example::

            def train(workers):  # what a process would do
                model = make_model()
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
                engine = Engine(SlowMo(), [optimizer], workers, module=model)
                for batch in batches_of(workers.rank): ...

            together(Workers.simulated(32), train)
        """
        from lightning_slowmo.communication.in_process import in_process

        return in_process(size, timeout)

    @property
    def alone(self) -> bool:
        """Whether there is nobody to meet."""
        return self.size == 1

    @property
    def group(self) -> Any:
        """The process group that tensors travel in; None where there is none."""
        return self.transport.group if self.transport is not None else None

    # Tensors ----------------------------------------------------------------------------------------------------------

    def sum(self, flat: Tensor, weights: Sequence[float] | None = None) -> Transfer[float]:
        """The weighted sum over the workers of a flat tensor, in place.

        A ring all-reduce sends each element twice, less the share that a worker already has: 2(n-1)/n.

        Args:
            flat: this worker's values; overwritten with the sum, which is the same on all workers to the last bit.
            weights: the weight of each worker, by rank; equal if None. A worker of weight 0 takes no part with its
                values, whatever they are (also NaN), but receives the sum.

        Returns:
            A transfer whose result is the sum of the weights: what to divide by for a mean. The division is left to the
            caller, who has the sum in the cache then.
        """
        total = self.weigh(flat, weights)
        if self.transport is not None and not self.alone:
            self._count(2 * (self.size - 1) * _bytes(flat) // self.size)
            yield from self.transport.all_reduce(flat, "the sum of the parameters")
        return total

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

    def scatter_sum(self, flat: Tensor, own: Tensor) -> Transfer[None]:
        """Sum a flat tensor over the workers and leave each with its piece of the sum.

        Args:
            flat: ``size`` pieces of equal length, by rank.
            own: where this worker's piece of the sum goes.
        """
        if self.transport is None or self.alone:
            own.copy_(flat)
            return
        self._count((self.size - 1) * _bytes(own))
        yield from self.transport.reduce_scatter(own, flat, "the sum of the parameters")

    def gather_pieces(self, flat: Tensor, own: Tensor) -> Transfer[None]:
        """Collect the workers' pieces.

        Args:
            flat: where ``size`` pieces of equal length go, by rank.
            own: this worker's.
        """
        if self.transport is None or self.alone:
            flat.copy_(own)
            return
        self._count((self.size - 1) * _bytes(own))
        yield from self.transport.all_gather(flat, own, "the parameters")

    def all_to_all(self, payloads: Sequence[Tensor], sizes: Sequence[int]) -> Transfer[Sequence[Tensor]]:
        """Send each worker its payload and receive one from each.

        Args:
            payloads: one-dimensional, of one dtype, by receiver.
            sizes: elements of those that arrive, by sender.

        Returns:
            A transfer whose result are the payloads that arrived, by sender.
        """
        if self.transport is None or self.alone:
            return payloads
        leaving, lengths = torch.cat(list(payloads)), [payload.numel() for payload in payloads]
        arriving, sizes = leaving.new_empty(sum(sizes)), list(sizes)
        itemsize = leaving.element_size()
        self._count((leaving.numel() - lengths[self.rank]) * itemsize, (arriving.numel() - sizes[self.rank]) * itemsize)
        yield from self.transport.all_to_all(arriving, sizes, leaving, lengths, "a compressed mean")
        return arriving.split(sizes)

    def send_and_receive(
        self, message: Tensor, receivers: Sequence[int], senders: Sequence[int], sizes: Sequence[int] | None = None
    ) -> Transfer[list[Tensor]]:
        """Send a message to some workers, and receive one from others.

        All sends and receives are posted together, so no order of the workers can make them wait for one another. Every
        worker must call this equally often, also one that has nobody to send to or receive from at this step.

        Args:
            message: one-dimensional and contiguous; must stay as it is until the transfer has ended.
            receivers: ranks of the workers that get the message.
            senders: ranks of the workers from which one comes.
            sizes: elements of those that come; as many as in ``message`` if None.

        Returns:
            A transfer whose result are the messages that came, by sender.
        """
        if self.transport is None or not (receivers or senders):
            return []
        arriving = [message.new_empty(size) for size in (sizes or [message.numel()] * len(senders))]
        # Not a collective: how many there are differs between workers.
        self._count(len(receivers) * _bytes(message), sum(map(_bytes, arriving)), collectives=0)
        yield from self.transport.send_and_receive(message, receivers, arriving, senders, "an exchange with its peers")
        return arriving

    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        """Overwrite a tensor with that of worker ``source``."""
        if self.transport is None or self.alone:
            return
        self._count(_bytes(tensor) if self.rank == source else 0, 0 if self.rank == source else _bytes(tensor))
        complete(self.transport.broadcast(tensor, source, "a broadcast"))

    # Headers ----------------------------------------------------------------------------------------------------------

    def gather(self, numbers: Sequence[float], purpose: str = "a header") -> list[list[float]]:
        """Every worker's numbers, by rank.

        Args:
            numbers: as many on every worker; sent as float64, exact for integers below 2**53.
            purpose: what the meeting is for, for messages.

        Raises:
            SyncError: if a worker did not come in time; names it.
        """
        if self.transport is None or self.alone:
            return [list(numbers)]
        own = torch.tensor(numbers, dtype=torch.float64)
        everyone = own.new_empty(self.size * len(numbers))
        self.traffic.headers += 1
        self._count((self.size - 1) * _bytes(own), collectives=0)
        self.transport.gather_header(everyone, own, purpose)
        return everyone.view(self.size, -1).tolist()

    def gather_text(self, text: str) -> list[str]:
        """Every worker's text, by rank. Sent as UTF-8: nothing is unpickled."""
        raw = text.encode()
        length = int(max(row[0] for row in self.gather([len(raw)])))
        padded = raw.ljust(length, b"\0")
        rows = self.gather(list(padded)) if length else [[]] * self.size
        return [bytes(map(int, row)).rstrip(b"\0").decode() for row in rows]

    # Sets and failures ------------------------------------------------------------------------------------------------

    def split(self, sets: Sequence[Sequence[int]], headers: bool = True) -> Workers:
        """The workers of one of several disjoint sets; all workers must call this with the same sets.

        Args:
            sets: ranks of each set; this worker is in one of them.
            headers: whether the workers of a set will gather headers among themselves.
        """
        own = next(ranks for ranks in sets if self.rank in ranks)
        transport = self.transport.split(sets, headers) if self.transport is not None else None
        return Workers(transport, self.timeout, [self.names[rank] for rank in own], own, self.sizes)

    def report_failure(self, reason: str) -> None:
        """Leave word why this worker stops, for those who wait for it or will."""
        if self.transport is not None:
            self.transport.report_failure(reason)

    def let_others_hear(self) -> None:
        """Stay for a moment if the others need this worker to read the word that it has left."""
        if self.transport is not None:
            self.transport.let_others_hear()

    def listen(self, all_the_time: bool) -> None:
        """Look for failures of the others all the time, or only while this worker waits for them, as at first.

        What this worker waits for outside of this package (DistributedDataParallel, say) then ends too if another one
        has failed: all connections are closed. Call it with False while all workers are still there.
        """
        if self.transport is not None:
            self.transport.listen(all_the_time)

    def close_also(self, group: Any) -> None:
        """Close a process group that others made, too, if another worker has failed, so that no wait in it is in vain.

        Args:
            group: of ``torch.distributed``.
        """
        if self.transport is not None:
            self.transport.close_also(group)

    @contextmanager
    def naming(self, purpose: str) -> Iterator[None]:
        """Communication by other means than these workers, whose errors then name who failed.

        Args:
            purpose: what it is for, for messages.

        Raises:
            SyncError: instead of an error of ``torch.distributed``.
        """
        start = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            explained = self.explained(error, purpose, time.monotonic() - start)
            if explained is None:
                raise
            raise explained from error

    def explained(self, error: BaseException, purpose: str, waited: float = 0.0) -> SyncError | None:
        """Who failed, where something else that communicates raised an error; None if it is no such error.

        Args:
            error: what was raised.
            purpose: what the communication was for, for messages.
            waited: seconds since it began, to tell a lost connection from an absent worker.
        """
        return None if self.transport is None else self.transport.explained(error, purpose, waited)

    def _count(self, sent: int, received: int | None = None, collectives: int = 1) -> None:
        self.traffic.sent += sent
        self.traffic.received += sent if received is None else received
        self.traffic.collectives += collectives


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
