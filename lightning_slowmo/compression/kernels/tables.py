"""How the work on a vector of many tensors is dealt out to the programs of one kernel launch.

A *tile* is what one program works on: a part of one tensor, made of ``rows`` neighbouring buckets of ``width``
elements. Tables depend on the lengths of the tensors only; they are made once and stay on the device.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

TILE = 4096
"""Elements of one tile, at most, where the size is free."""

FIELDS = 5
"""Columns of :attr:`Tiles.table`."""


class Tiles(NamedTuple):
    """The tiles of a vector.

    Attributes:
        table: int64 of shape (tiles, 5): first element, rows, width, first bucket, and number of the tensor.
        first: int64, the first tile of each tensor, and after the last one the number of tiles.
        number: how many tiles there are.
    """

    table: Tensor
    first: Tensor
    number: int


@lru_cache(maxsize=64)
def tiles(segments: tuple[int, ...], bucket: int, rows: int, device: torch.device) -> Tiles:
    """Cut every tensor into buckets and group at most ``rows`` whole ones to a tile; a shorter last one is alone."""
    lengths = torch.tensor(segments, dtype=torch.int64)
    whole, rest = lengths // bucket, lengths % bucket
    whole_tiles = -(-whole // rows)
    begin, first_bucket = _before(lengths), _before(whole + (rest > 0))
    counts = whole_tiles + (rest > 0)
    first = torch.cat([_before(counts), counts.sum().view(1)])
    owner = torch.arange(len(segments)).repeat_interleave(counts)
    number = torch.arange(len(owner)) - first[owner]
    is_whole = number < whole_tiles[owner]
    skipped = torch.where(is_whole, number * rows, whole[owner])
    height = torch.where(is_whole, torch.clamp(whole[owner] - skipped, max=rows), 1)
    width = torch.where(is_whole, bucket, rest[owner])
    columns = [begin[owner] + skipped * bucket, height, width, first_bucket[owner] + skipped, owner]
    return Tiles(torch.stack(columns, dim=1).to(device), first.to(device), len(owner))


def simple_tiles(segments: tuple[int, ...], device: torch.device) -> Tiles:
    """Tiles of one row of at most :data:`TILE` elements."""
    return tiles(segments, TILE, 1, device)


@lru_cache(maxsize=64)
def lengths(segments: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The lengths of the tensors, 1 for an empty one."""
    return torch.tensor(segments, dtype=dtype, device=device).clamp_(min=1)


@lru_cache(maxsize=64)
def kept(segments: tuple[int, ...], counts: tuple[int, ...], device: torch.device) -> Tensor:
    """For each tensor of which ``count`` elements are kept: begin, length, count, and number of those kept before."""
    length, count = torch.tensor(segments, dtype=torch.int64), torch.tensor(counts, dtype=torch.int64)
    return torch.stack([_before(length), length, count, _before(count)], dim=1).to(device)


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least ``number``."""
    return 1 << max(number - 1, 0).bit_length()


def _before(counts: Tensor) -> Tensor:
    return counts.cumsum(0) - counts
