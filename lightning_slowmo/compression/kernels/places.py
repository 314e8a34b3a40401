"""Random places in all tensors at once: see ``RandomK``."""

# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_slowmo.compression.kernels.launch import launch
from lightning_slowmo.compression.kernels.random import random_number
from lightning_slowmo.compression.kernels.tables import FIELDS, TILE, kept, simple_tiles


@triton.jit
def _random_places(key, table, kept, indices, TILE: tl.constexpr, FIELDS: tl.constexpr):
    tile = table + tl.program_id(0).to(tl.int64) * FIELDS
    segment = tl.load(tile + 4)
    row = kept + segment * 4
    begin, length, count, before = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    secret = tl.load(key)
    offset = tl.arange(0, TILE)
    position = tl.load(tile) + offset
    stretch = position - before
    low, high = stretch * length // count, (stretch + 1) * length // count
    place = low + random_number(secret, position) % tl.maximum(high - low, 1)
    rotation = random_number(secret, -1 - segment) % length
    tl.store(indices + position, begin + (place + rotation) % length, mask=offset < tl.load(tile + 2))


def random_places(key: Tensor, segments: tuple[int, ...], counts: tuple[int, ...]) -> Tensor:
    """``counts`` places of each tensor, a function of ``key``, an int64 tensor of one element."""
    cut = simple_tiles(counts, key.device)
    indices = torch.empty(sum(counts), dtype=torch.int64, device=key.device)
    table = kept(segments, counts, key.device)
    launch(_random_places, cut.number, key, cut.table, table, indices, TILE=TILE, FIELDS=FIELDS, num_warps=8)
    return indices
