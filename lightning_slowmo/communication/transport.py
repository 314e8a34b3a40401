"""What carries messages between workers: the operations that process groups give, or one process with many workers.

Byte counts, weights and all else that algorithms ask for are on top of this, in
:class:`~lightning_slowmo.communication.workers.Workers`. Operations on tensors are transfers (see
:mod:`~lightning_slowmo.communication.pipeline`): they start when they are first advanced, and wait when they are
advanced again. All of them raise ``SyncError`` if a worker did not take part in time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from lightning_slowmo.communication.pipeline import Transfer
from lightning_slowmo.communication.workers import SyncError


class Transport(Protocol):
    """How one of several workers reaches the others. A worker that is alone has none.

    Attributes:
        rank: which one this is.
        size: how many there are.
    """

    rank: int
    size: int

    @property
    def group(self) -> Any:
        """The process group of ``torch.distributed`` that tensors travel in, where there is one."""

    def all_reduce(self, flat: Tensor, purpose: str) -> Transfer[None]:
        """Overwrite a tensor with its sum over the workers, the same bits on all."""

    def reduce_scatter(self, own: Tensor, flat: Tensor, purpose: str) -> Transfer[None]:
        """Sum ``flat`` over the workers; each gets its piece of the sum, by rank, in ``own``."""

    def all_gather(self, flat: Tensor, own: Tensor, purpose: str) -> Transfer[None]:
        """Collect every worker's ``own``, by rank, in ``flat``."""

    def broadcast(self, tensor: Tensor, source: int, purpose: str) -> Transfer[None]:
        """Overwrite a tensor with that of one worker."""

    def all_to_all(
        self, arriving: Tensor, arriving_sizes: list[int], leaving: Tensor, leaving_sizes: list[int], purpose: str
    ) -> Transfer[None]:
        """Send each worker a piece of ``leaving`` and collect theirs in ``arriving``, both cut by rank."""

    def send_and_receive(
        self,
        message: Tensor,
        receivers: Sequence[int],
        arriving: Sequence[Tensor],
        senders: Sequence[int],
        purpose: str,
    ) -> Transfer[None]:
        """Send one message to some workers and receive one from others; all must be posted before any is waited for."""

    def gather_header(self, everyone: Tensor, own: Tensor, purpose: str) -> None:
        """Collect a few float64 numbers of every worker, waiting for them, and without waiting for a GPU."""

    def split(self, sets: Sequence[Sequence[int]], headers: bool) -> Transport:
        """Make transports of disjoint sets of workers; all workers must call this with the same sets.

        Args:
            sets: ranks of each set.
            headers: whether :meth:`gather_header` will be needed in them.

        Returns:
            That of the set which this worker is in.
        """

    def report_failure(self, reason: str) -> None:
        """Leave word why this worker stops, for those who wait for it or will."""

    def let_others_hear(self) -> None:
        """Stay for a moment if the others need this worker to read the word that it has left."""

    def listen(self, all_the_time: bool) -> None:
        """Look for failures of the others all the time, or only while this worker waits for them."""

    def close_also(self, group: Any) -> None:
        """Close a process group that others made, too, if another worker has failed: whoever waits in it hears."""

    def explained(self, error: BaseException, purpose: str, waited: float = 0.0) -> SyncError | None:
        """Who failed, where an operation that is not of this transport raised an error.

        Args:
            error: what it raised.
            purpose: what it was for, for messages.
            waited: seconds since it began, to tell a lost connection from an absent worker.

        Returns:
            The error to raise, or None if this one does not come from communication, or says already who failed.
        """
