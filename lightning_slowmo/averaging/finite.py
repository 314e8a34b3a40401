"""Whether parameters are finite, with one look at a GPU however many there are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from lightning_slowmo.averaging.kernels import table_of
from lightning_slowmo.parameters import Layout
from lightning_slowmo.private import foreach_norm
from lightning_slowmo.storage import local


def is_finite(layout: Layout) -> bool:
    """Whether all parameters of a layout are finite."""
    flags: dict[torch.device, Tensor] = {}
    others: dict[int, Tensor] = {}
    for bucket in layout.buckets:
        table = table_of(bucket)
        if table is None:
            others |= {id(parameter): local(parameter) for parameter, _, _ in bucket.spans}
            continue
        flags[bucket.device] = _lowered_flag(bucket.device)
        table.find_nonfinite(flags[bucket.device])
    raised = [flag for flag in flags.values() if flag.item()]
    for flag in raised:
        flag.zero_()
    return are_finite(list(others.values())) and not raised


@lru_cache(maxsize=64)
def _lowered_flag(device: torch.device) -> Tensor:
    """An integer on a device that kernels raise; whoever finds it raised lowers it."""
    return torch.zeros(1, dtype=torch.int32, device=device)


def are_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all elements of all tensors are finite."""
    if not tensors:
        return True
    tensors = [tensor.detach() for tensor in tensors]
    norms = foreach_norm(tensors)
    if len({norm.dtype for norm in norms}) > 1:
        norms = [norm.double() for norm in norms]
    if torch.stack(norms).isfinite().all():  # one look, as each of them would make a GPU wait
        return True
    # A norm can overflow though the values do not; looking at each of them is ten times slower, and rare.
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
