"""What must be the same on all workers before the first step: algorithm, parameters, and where they start from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch.optim import Optimizer

from lightning_slowmo.algorithms.base import Algorithm, Running
from lightning_slowmo.communication.meeting import require_equal
from lightning_slowmo.communication.workers import SyncError, Workers
from lightning_slowmo.parameters import Layout


def require_same_setting(algorithm: Algorithm, optimizers: Sequence[Optimizer], everyone: Workers) -> None:
    """Make sure that all workers run the same algorithm on the same parameters, and that there is one to train.

    Raises:
        ValueError: if there is nothing to train.
        SyncError: on every worker, with the two differing descriptions.
    """
    require_equal(
        everyone,
        "The algorithm",
        re.sub(r" at 0x[0-9a-f]+", "", repr(algorithm)),  # a function's address differs between processes
        "Construct the strategy with the same arguments on every rank.",
    )
    require_equal(
        everyone,
        "The model",
        "; ".join(_describe(optimizers)),
        "Build the same model, and freeze the same parameters, on every rank.",
    )
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    if not any(parameter.numel() and parameter.requires_grad for group in groups for parameter in group["params"]):
        raise ValueError("There is nothing to train: the optimizers hold no parameter that requires a gradient.")


def require_same_start(running: Sequence[Running], everyone: Workers) -> None:
    """Make sure that all workers start from the same point: differences between them would pass for training progress.

    Raises:
        SyncError: on every worker; names those that start elsewhere, or says which optimizers keep other copies of the
            parameters.
    """
    require_equal(
        everyone,
        "The optimizers' own copies of the parameters",
        "; ".join(str(each.iterates) for each in running),
        "Use the same optimizers on every rank.",
    )
    high, low = divmod(checksum(each.layout for each in running), 2**32)
    sums = everyone.gather([high, low], "checksums of the initial parameters")
    others = [name for name, own in zip(everyone.names, sums, strict=True) if own != sums[0]]
    if others:
        does = "do" if len(others) > 1 else "does"
        raise SyncError(
            f"The initial parameters differ between workers: {', '.join(others)} {does} not start from those of "
            f"{everyone.names[0]}. Use the same seed on every rank, or broadcast the model from one of them."
        )


def checksum(layouts: Iterable[Layout]) -> int:
    """A number below 2**64 that depends on every bit of the parameters and on its place.

    Integers add up to the same in any order, so equal parameters have equal checksums on all devices.
    """
    total = 0
    for bucket in (bucket for layout in layouts for bucket in layout.buckets):
        for _, flat in bucket.blocks(bucket.pack()):
            bits = flat.view(torch.int64 if flat.element_size() == 8 else torch.int32)
            places = torch.arange(1, 2 * flat.numel(), 2, device=flat.device)  # odd, so that no single change cancels
            total = total * 31 + int((bits * places).sum())
    return total % 2**64


def _describe(optimizers: Sequence[Optimizer]) -> Iterator[str]:
    """The parameters that are synced, one description each."""
    for optimizer in optimizers:
        for index, group in enumerate(optimizer.param_groups):
            yield f"{type(optimizer).__name__} group {index}"
            for parameter in group["params"]:
                kind = f"{str(parameter.dtype).removeprefix('torch.')}{list(parameter.shape)}"
                yield kind if parameter.requires_grad else f"frozen {kind}"
