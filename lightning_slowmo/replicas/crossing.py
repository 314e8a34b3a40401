"""Copies between the stage's device and the host, where the workers' values lie if they do not fit the card.

Copies are queued behind what the card has to do, and nobody waits for them one by one: who has called for copies to the
host calls :func:`wait_for` before the host reads them. What a card reads, the host changes only after the next copy
from there, which is queued behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_slowmo.replicas.rows import Copying, Rows, in_a_row
from lightning_slowmo.storage import flat_view


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on a device, also if it is the one where the tensor lies."""
    return tensor.detach().to(device, non_blocking=True, copy=True)


def wait_for(device: torch.device) -> None:
    """Wait until copies from a device have come."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


class Landing:
    """Rows on the stage's device, where tensors that lie apart are gathered to cross in one piece; for all workers."""

    def __init__(self) -> None:
        self._kinds: list[tuple[Any, ...]] = []
        self._tensors: list[Tensor] = []

    def of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """A place for each of the stage's tensors."""
        kinds: list[tuple[Any, ...]] = [(each.shape, each.stride(), each.dtype, each.device) for each in tensors]
        if kinds != self._kinds:
            self._kinds, self._tensors = kinds, Rows(tensors).tensors
        return self._tensors


class Crossing:
    """Copies tensors of the stage to a worker's and back: in one piece what lies in a row on both sides.

    Args:
        stage: the stage's.
        own: as many of the worker's, of the same shapes and dtypes.
        landing: where to gather the stage's first; None: they lie in a row.
    """

    def __init__(self, stage: Sequence[Tensor], own: Sequence[Tensor], landing: Landing | None = None) -> None:
        places = stage if landing is None else landing.of(stage)
        self._gathering = None if landing is None else Copying(stage, places)
        self._pieces: list[tuple[Tensor, Tensor]] = []
        last: dict[tuple[Any, ...], int] = {}  # of those of one kind, which may stand between others
        for place, mine in zip(places, own, strict=True):
            piece, kind = _flat(place.detach(), mine.detach()), (place.device, place.dtype, mine.dtype)
            joined = _joined(self._pieces[last[kind]], piece) if kind in last else None
            if joined:
                self._pieces[last[kind]] = joined
            else:
                last[kind] = len(self._pieces)
                self._pieces.append(piece)

    def forth(self) -> None:
        """Let the worker have the stage's values."""
        if self._gathering is not None:
            self._gathering.forth()
        for place, mine in self._pieces:
            mine.copy_(place, non_blocking=True)

    def back(self) -> None:
        """Let the stage have the worker's values."""
        for place, mine in self._pieces:
            place.copy_(mine, non_blocking=True)
        if self._gathering is not None:
            self._gathering.back()


def _flat(place: Tensor, mine: Tensor) -> tuple[Tensor, Tensor]:
    """Both as they lie in memory, if they lie alike."""
    alike = in_a_row(place) and in_a_row(mine) and place.stride() == mine.stride()
    return (flat_view(place), flat_view(mine)) if alike else (place, mine)


def _joined(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor] | None:
    """Both pieces as one, if the second follows the first on both sides."""
    if not all(_follows(*sides) for sides in zip(first, second, strict=True)):
        return None
    numel = first[0].numel() + second[0].numel()
    return first[0].as_strided((numel,), (1,)), first[1].as_strided((numel,), (1,))


def _follows(first: Tensor, second: Tensor) -> bool:
    return bool(
        in_a_row(first)
        and in_a_row(second)
        and first.dim() == second.dim() == 1
        and first.dtype == second.dtype
        and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        and first.storage_offset() + first.numel() == second.storage_offset()
    )
