"""Tensors of a GPU over a transport that reaches host memory alone, such as gloo where there is no NCCL.

Each tensor is copied to pinned host memory in pieces. The first piece travels while the next ones are copied, and
pieces that have come go up while later ones travel. Copies down and up have streams of their own, so both directions of
the bus are in use at once and kernels run meanwhile; with ``tensor.cpu()`` all of it would come one after another.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_slowmo.communication.pipeline import Transfer, UnderWay, start
from lightning_slowmo.communication.transport import Transport
from lightning_slowmo.communication.workers import SyncError

PIECE_BYTES = 8 * 2**20
"""Bytes that are copied and sent at a time: 0.3 ms on a bus of 25 GB/s, and long enough for any network."""


class Staged:
    """A transport for the tensors of a device, over one for those in host memory.

    Args:
        inner: reaches the other workers.
        stage: copies between the device and host memory.
        piece_bytes: how much is copied and sent at a time.
    """

    def __init__(self, inner: Transport, stage: Stage, piece_bytes: int = PIECE_BYTES) -> None:
        self.inner = inner
        self.stage = stage
        self.piece_bytes = piece_bytes
        self.rank = inner.rank
        self.size = inner.size

    @property
    def group(self) -> Any:
        """The process group of the transport underneath."""
        return self.inner.group

    def all_reduce(self, flat: Tensor, purpose: str) -> Transfer[None]:
        """Overwrite a tensor with its sum over the workers."""
        return self._piecewise(flat, lambda piece: self.inner.all_reduce(piece, purpose))

    def broadcast(self, tensor: Tensor, source: int, purpose: str) -> Transfer[None]:
        """Overwrite a tensor with that of one worker."""
        if not tensor.is_contiguous():
            return self._whole([tensor], [tensor], lambda down, _: self.inner.broadcast(down[0], source, purpose))
        flat = tensor.view(-1)
        return self._piecewise(flat, lambda piece: self.inner.broadcast(piece, source, purpose))

    def reduce_scatter(self, own: Tensor, flat: Tensor, purpose: str) -> Transfer[None]:
        """Sum over the workers, of which each gets a piece."""
        return self._whole([flat], [own], lambda down, up: self.inner.reduce_scatter(up[0], down[0], purpose))

    def all_gather(self, flat: Tensor, own: Tensor, purpose: str) -> Transfer[None]:
        """Collect every worker's piece."""
        return self._whole([own], [flat], lambda down, up: self.inner.all_gather(up[0], down[0], purpose))

    def all_to_all(
        self, arriving: Tensor, arriving_sizes: list[int], leaving: Tensor, leaving_sizes: list[int], purpose: str
    ) -> Transfer[None]:
        """Send each worker a piece and receive one from each."""

        def exchange(down: list[Tensor], up: list[Tensor]) -> Transfer[None]:
            return self.inner.all_to_all(up[0], arriving_sizes, down[0], leaving_sizes, purpose)

        return self._whole([leaving], [arriving], exchange)

    def send_and_receive(
        self,
        message: Tensor,
        receivers: Sequence[int],
        arriving: Sequence[Tensor],
        senders: Sequence[int],
        purpose: str,
    ) -> Transfer[None]:
        """Send one message to some workers and receive one from others."""

        def exchange(down: list[Tensor], up: list[Tensor]) -> Transfer[None]:
            return self.inner.send_and_receive(down[0], receivers, up, senders, purpose)

        return self._whole([message], list(arriving), exchange)

    def gather_header(self, everyone: Tensor, own: Tensor, purpose: str) -> None:
        """Collect a few numbers of every worker, which are in host memory anyway."""
        self.inner.gather_header(everyone, own, purpose)

    def split(self, sets: Sequence[Sequence[int]], headers: bool) -> Staged:
        """Make transports of disjoint sets of workers, for the same device."""
        return Staged(self.inner.split(sets, headers), self.stage, self.piece_bytes)

    def report_failure(self, reason: str) -> None:
        """Leave word why this worker stops."""
        self.inner.report_failure(reason)

    def let_others_hear(self) -> None:
        """Stay for a moment if the others need this worker to read the word that it has left."""
        self.inner.let_others_hear()

    # How --------------------------------------------------------------------------------------------------------------

    def listen(self, all_the_time: bool) -> None:
        """As the transport inside."""
        self.inner.listen(all_the_time)

    def close_also(self, group: Any) -> None:
        """As the transport inside."""
        self.inner.close_also(group)

    def explained(self, error: BaseException, purpose: str, waited: float = 0.0) -> SyncError | None:
        """As the transport inside."""
        return self.inner.explained(error, purpose, waited)

    def _piecewise(self, flat: Tensor, send: Callable[[Tensor], Transfer[None]]) -> Transfer[None]:
        """Replace a flat tensor by what an operation that acts on each element makes of it."""
        pieces = flat.split(max(1, self.piece_bytes // flat.element_size())) if flat.numel() else (flat,)
        copies = [self.stage.down(piece) for piece in pieces]
        under_way: list[UnderWay[None]] = []
        for copy in copies:
            copy.wait()
            under_way.append(start(send(copy.host)))
        yield
        for piece, copy, travelling in zip(pieces, copies, under_way, strict=True):
            travelling.wait()
            self.stage.up(copy.host, piece)
        self.stage.settle()

    def _whole(
        self,
        leaving: list[Tensor],
        arriving: list[Tensor],
        send: Callable[[list[Tensor], list[Tensor]], Transfer[None]],
    ) -> Transfer[None]:
        """Run an operation on copies of tensors; what is both sent and overwritten is copied once."""
        copies = [self.stage.down(tensor) for tensor in leaving]
        down = [copy.host for copy in copies]
        known = {id(tensor): host for tensor, host in zip(leaving, down, strict=True)}
        up = [known[id(tensor)] if id(tensor) in known else self.stage.room(tensor) for tensor in arriving]
        for copy in copies:
            copy.wait()
        travelling = start(send(down, up))
        yield
        travelling.wait()
        for tensor, host in zip(arriving, up, strict=True):
            self.stage.up(host, tensor)
        for host in down:
            if not any(host is other for other in up):
                self.stage.release(host)
        self.stage.settle()


class Copy(NamedTuple):
    """A tensor on its way to host memory.

    Attributes:
        host: where it goes.
        wait: waits until it is there.
    """

    host: Tensor
    wait: Callable[[], None]


class Stage:
    """Copies between a device and host memory, and the host memory for them, which is used again and again.

    Args:
        device: whose tensors travel; for a CPU, copies are plain ones.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._down = torch.cuda.Stream(device) if self.on_gpu else None
        self._up = torch.cuda.Stream(device) if self.on_gpu else None
        self._lent: dict[int, Tensor] = {}
        self._free: dict[torch.dtype, deque[tuple[Tensor, Callable[[], None]]]] = {}

    def down(self, tensor: Tensor) -> Copy:
        """Begin to copy a tensor to host memory, after what is queued for the device now."""
        host = self.room(tensor)
        if self._down is None:
            host.copy_(tensor)
            return Copy(host, _nothing)
        self._down.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self._down):
            host.copy_(tensor, non_blocking=True)
            event = self._down.record_event()
        return Copy(host, event.synchronize)

    def up(self, host: Tensor, tensor: Tensor) -> None:
        """Begin to copy host memory that :meth:`room` gave to a tensor, and take the memory back."""
        if self._up is None:
            tensor.copy_(host)
            self.release(host)
            return
        self._up.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self._up):
            tensor.copy_(host, non_blocking=True)
            event = self._up.record_event()
        self.release(host, event.synchronize)

    def settle(self) -> None:
        """Let what is queued for the device from now on come after the copies that have begun. The host goes on."""
        if self._up is not None:
            torch.cuda.current_stream(self._up.device).wait_stream(self._up)

    def room(self, tensor: Tensor) -> Tensor:
        """Host memory of a tensor's shape and dtype, pinned for a GPU."""
        free = self._free.setdefault(tensor.dtype, deque())
        for index, (flat, wait) in enumerate(free):
            if flat.numel() >= tensor.numel():
                del free[index]
                wait()
                break
        else:
            flat = torch.empty(tensor.numel(), dtype=tensor.dtype, pin_memory=self.on_gpu)
        self._lent[flat.data_ptr()] = flat
        return flat[: tensor.numel()].view(tensor.shape)

    def release(self, host: Tensor, wait: Callable[[], None] | None = None) -> None:
        """Take back memory that :meth:`room` gave.

        Args:
            host: the memory.
            wait: waits until its last copy has ended; None: it has.
        """
        flat = self._lent.pop(host.data_ptr())
        self._free.setdefault(host.dtype, deque()).append((flat, _nothing if wait is None else wait))


def _nothing() -> None:
    pass
