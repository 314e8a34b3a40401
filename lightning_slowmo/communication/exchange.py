"""Messages between single workers: what one sends to its peers, and takes from them, in a step of gossip."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_slowmo.communication.workers import Workers

PURPOSE = "an exchange with its peers"


class Delivery:
    """Messages that are under way, or have come.

    Args:
        messages: what comes to this worker, and the share of each that is for it.
        works: what to wait for, and the peers on whom that depends.
        workers: all of them; not needed where there is nothing to wait for.
        sent: the message that this worker sends. It must not change before :meth:`wait` has returned, and is kept alive
            until then.
    """

    def __init__(
        self,
        messages: Sequence[tuple[Tensor, float]],
        works: Sequence[tuple[dist.Work, Sequence[int]]] = (),
        workers: Workers | None = None,
        sent: Tensor | None = None,
    ) -> None:
        self._messages = messages
        self._works = works
        self._workers = workers
        self._sent = sent

    def wait(self) -> Tensor | None:
        """Wait until this worker's message has gone and those for it have come.

        Returns:
            The sum of this worker's shares of them, the same tensor at every call; None if there are none.

        Raises:
            SyncError: if a peer did not take part in time; names it.
        """
        if not self.messages():
            return None
        (total, first_share), *others = self._messages
        if first_share != 1:
            total.mul_(first_share)
        for message, share in others:
            total.add_(message, alpha=share)
        self._messages = [(total, 1.0)]
        return total

    def messages(self) -> Sequence[tuple[Tensor, float]]:
        """Wait in the same way; the messages themselves, by sender, and this worker's share of each."""
        for work, peers in self._works:
            assert self._workers is not None
            self._workers.wait(work, PURPOSE, peers)
        self._works, self._sent = (), None
        return self._messages


def exchange(
    workers: Workers, message: Tensor, receivers: Sequence[int], senders: Sequence[tuple[int, float]]
) -> Delivery:
    """Start to send a message to some workers, and to receive one of the same size from others.

    All sends and receives are posted together, so no order of the workers can make them wait for one another. Every
    worker must call this equally often, also one that has nobody to send to or receive from at this step.

    Args:
        workers: all of them.
        message: one-dimensional and contiguous; must stay as it is until the delivery has been waited for.
        receivers: ranks of the workers that get the message.
        senders: rank of each worker that sends one, and the share of its message that is this worker's.

    Returns:
        A handle to wait on.

    Raises:
        SyncError: if a peer is gone already.
    """
    if not receivers and not senders:
        return Delivery([])
    received = [(torch.empty_like(message), share) for _, share in senders]
    peers = [*(rank for rank, _ in senders), *receivers]
    buffers = [buffer for buffer, _ in received] + [message] * len(receivers)
    kinds = [dist.irecv] * len(senders) + [dist.isend] * len(receivers)
    operations = [_operation(workers, *each) for each in zip(kinds, buffers, peers, strict=True)]
    size = message.numel() * message.element_size()
    # Not a collective: how many there are differs between workers.
    workers._count(len(receivers) * size, len(senders) * size, collectives=0)
    try:
        works = dist.batch_isend_irecv(operations)
    except RuntimeError as error:
        raise workers._absence(PURPOSE, error, peers) from error
    # gloo gives a handle per message, NCCL one for all.
    whom = [[peer] for peer in peers] if len(works) == len(peers) else [sorted(set(peers))] * len(works)
    return Delivery(received, list(zip(works, whom, strict=True)), workers, message)


def _operation(workers: Workers, kind: Callable, tensor: Tensor, peer: int) -> dist.P2POp:
    assert workers.data is not None  # a worker that is alone has no peers
    return dist.P2POp(kind, tensor, dist.get_global_rank(workers.data, peer), workers.data)
