"""A tensor of which every worker holds a part: what sharded slow state is saved as, and read from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pieces:
    """Contiguous pieces of one tensor, which need not be all of it.

    Offsets count elements in the order of the tensor's memory, which ``stride`` describes. So a parameter in
    ``channels_last`` is cut as its flat view is, and read by a contiguous one all the same.

    Args:
        shape: of the whole tensor.
        stride: of the whole tensor, which must be dense (:func:`~lightning_slowmo.parameters.is_dense`).
        dtype: of the elements.
        pieces: offset of the first element, and the elements as a 1-D tensor; any order, may overlap.

    Example::

        held = Pieces.of(parameter, dtype=torch.float32, pieces=[(start, own[:length])])
        own = torch.empty(stop - start)
        loaded.copy_to(own, start)  # reads the pieces that overlap with [start, stop), and no others
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[tuple[int, Tensor], ...]

    @classmethod
    def of(cls, tensor: Tensor, dtype: torch.dtype, pieces: Iterable[tuple[int, Tensor]]) -> Pieces:
        """Pieces of a tensor with the shape and the memory order of ``tensor``."""
        return cls(tuple(tensor.shape), tuple(tensor.stride()), dtype, tuple(pieces))

    @property
    def numel(self) -> int:
        """Number of elements of the whole tensor."""
        return torch.Size(self.shape).numel()

    def joined(self) -> Pieces:
        """The same, in order and without pieces that others contain.

        Raises:
            ValueError: if an element is in no piece, or a piece reaches beyond the tensor or has another dtype.
        """
        kept: list[tuple[int, Tensor]] = []
        end = 0
        for start, flat in sorted(self.pieces, key=lambda piece: (piece[0], -piece[1].numel())):
            if flat.dtype != self.dtype or flat.dim() != 1:
                raise ValueError(f"a piece is {flat.dtype}{list(flat.shape)} instead of flat {self.dtype}")
            if start < 0 or start + flat.numel() > self.numel:
                raise ValueError(f"a piece [{start}, {start + flat.numel()}) is outside of {self.numel} elements")
            if start > end:
                break
            if start + flat.numel() > end:
                kept.append((start, flat))
                end = start + flat.numel()
        if end < self.numel:
            raise ValueError(f"element {end} of {self.numel} is in no piece")
        return Pieces(self.shape, self.stride, self.dtype, tuple(kept))

    def copy_to(self, flat: Tensor, start: int = 0) -> None:
        """Copy elements ``[start, start + flat.numel())`` into a flat tensor, from the pieces that overlap with them.

        Raises:
            ValueError: if one of these elements is in no piece.
        """
        stop = start + flat.numel()
        end = start
        for first, piece in sorted(self.pieces, key=lambda piece: piece[0]):
            low, high = max(first, end), min(first + piece.numel(), stop)
            if low >= high:
                continue
            if low > end:
                break
            flat[low - start : high - start].copy_(piece[low - first : high - first])
            end = high
        if end < stop:
            raise ValueError(f"element {end} of {self.numel} is in no piece")

    def whole(self) -> Tensor:
        """The whole tensor, in memory of its own."""
        flat = torch.empty(self.numel, dtype=self.dtype)
        self.copy_to(flat)
        return flat.as_strided(self.shape, self.stride)


def map_leaves(replace: Callable[[Any], Any], value: Any) -> Any:
    """A copy of nested dictionaries, lists and tuples with ``replace`` applied to everything in them."""
    replaced = replace(value)
    if replaced is not value:
        return replaced
    if type(value) is dict:
        return {key: map_leaves(replace, item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map_leaves(replace, item) for item in value)
    return value
