"""Reducing a tensor, such as a metric, over those workers that have one, helped by those that have none.

A worker whose batches have run out logs nothing more in that epoch, but a collective needs every worker. So it takes
part with an empty share, which is left out of the result.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_slowmo.communication.meeting import OUT_OF_BATCHES, Meeting, Reason
from lightning_slowmo.communication.pipeline import complete
from lightning_slowmo.communication.workers import SyncError, Workers

OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda rows: rows.mean(0),
    "avg": lambda rows: rows.mean(0),
    "sum": lambda rows: rows.sum(0, dtype=rows.dtype),
    "product": lambda rows: rows.prod(0, dtype=rows.dtype),
    "max": lambda rows: rows.amax(0),
    "min": lambda rows: rows.amin(0),
}
"""What can be computed without a share of every worker: from a matrix whose rows are the shares of those present."""


def reduce_present(
    tensor: Tensor | None, operation: str, meeting: Meeting, workers: Workers, device: torch.device
) -> Tensor | None:
    """Reduce a tensor over the workers that came to the meeting for that; all workers must call this.

    Args:
        tensor: this worker's share, of the same shape and dtype on all that have one; None on those that only help.
        operation: one of :data:`OPERATIONS`; ignored where there is no tensor.
        meeting: at which the workers have met for this.
        workers: all processes.
        device: where tensors have to be to travel.

    Returns:
        The result, equal on all workers that have a share to the last bit; None on the others.

    Raises:
        SyncError: on every worker, if the shares do not go together, or the operation needs all workers.
    """
    text = "" if tensor is None else json.dumps([list(tensor.shape), str(tensor.dtype), operation])
    texts = [text for text in workers.gather_text(text) if text]
    shape, dtype, name = json.loads(texts[0])
    if len(set(texts)) > 1:
        raise SyncError(f"The workers reduce different tensors at the same time: {'; '.join(texts)}.")
    if name not in OPERATIONS:
        raise SyncError(f"Some workers want to reduce a tensor ({name}) that others do not have.{OUT_OF_BATCHES}")
    own = torch.zeros(shape, dtype=getattr(torch, dtype.removeprefix("torch.")), device=device)
    if tensor is not None:
        own.copy_(tensor.detach())
    own = own.flatten()
    rows = own.new_empty(workers.size * own.numel())
    if own.numel():
        complete(workers.gather_pieces(rows, own))
    if tensor is None:
        return None
    present = [rank for rank, header in enumerate(meeting.headers) if header.reason is Reason.REDUCE]
    return OPERATIONS[name](rows.view(workers.size, -1)[present]).view(shape).to(tensor.device)


def operation_name(operation: Any) -> str:
    """The name of a reduction, which may be a string or a ``ReduceOp`` of torch.distributed."""
    return (operation if isinstance(operation, str) else str(getattr(operation, "name", operation))).lower()
