"""Means of gradients whose layout is sparse, as ``torch.nn.Embedding(sparse=True)`` makes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_slowmo.communication.pipeline import complete
from lightning_slowmo.communication.workers import SyncError, Workers
from lightning_slowmo.storage import accumulation_dtype, as_real


def average_sparse(parameters: Sequence[Tensor], workers: Workers, weights: Sequence[float]) -> None:
    """Replace sparse gradients by their mean over the workers, which has the elements that any of them has.

    Each worker sends the elements that it has, filled up with zeros to the largest number of them on any worker.

    Args:
        parameters: whose gradients are sparse, or None.
        workers: all of whom must call this.
        weights: weight of each worker, by rank; the gradient of one that weighs 0 does not count.

    Raises:
        SyncError: on all workers, if the indices of a gradient have different numbers of dimensions on them.
    """
    own = [p.grad.coalesce() if p.grad is not None and weights[workers.rank] else None for p in parameters]
    numbers = [
        number for grad in own for number in ((0, 0) if grad is None else (grad.values().shape[0], grad.sparse_dim()))
    ]
    rows = workers.gather(numbers, "sizes of sparse gradients")
    for index, (parameter, grad) in enumerate(zip(parameters, own, strict=True)):
        counts = [int(row[2 * index]) for row in rows]
        dims = {int(row[2 * index + 1]) for row in rows} - {0}
        if len(dims) != 1:
            raise SyncError(
                f"The sparse gradients of a parameter of shape {list(parameter.shape)} have indices of "
                f"{' and '.join(map(str, sorted(dims)))} dimensions on different workers. Make them alike, or dense."
            )
        parameter.grad = _mean(parameter, grad, counts, dims.pop(), workers, weights)


def _mean(
    parameter: Tensor, grad: Tensor | None, counts: Sequence[int], dims: int, workers: Workers, weights: Sequence[float]
) -> Tensor:
    most, shape, device = max(counts), as_real(parameter.detach()).shape[dims:], parameter.device
    dtype = accumulation_dtype(as_real(parameter.detach()).dtype)
    indices = torch.zeros(most, dims, dtype=torch.int64, device=device)
    values = torch.zeros(most, *shape, dtype=dtype, device=device)
    if grad is not None:
        indices[: grad.values().shape[0]] = grad.indices().T
        values[: grad.values().shape[0]] = as_real(grad.values())
    total = workers.weigh(values, weights)
    everyones = [_gathered(piece, counts, workers) for piece in (indices, values)]
    elements = everyones[1].div_(total).to(as_real(parameter.detach()).dtype)
    if parameter.is_complex():
        elements = torch.view_as_complex(elements)
    return torch.sparse_coo_tensor(everyones[0].T, elements, parameter.shape, check_invariants=False).coalesce()


def _gathered(own: Tensor, counts: Sequence[int], workers: Workers) -> Tensor:
    """The rows of all workers, by rank, without what they were filled up with."""
    flat = own.new_empty(workers.size * own.numel())
    complete(workers.gather_pieces(flat, own.reshape(-1)))
    pieces = flat.view(workers.size, *own.shape)
    return torch.cat([piece[:count] for piece, count in zip(pieces, counts, strict=True)])
