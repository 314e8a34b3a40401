"""Memory of the host for what does not fit a card: pinned, so that it comes and goes at the speed of the bus."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

LINE = 64
"""Bytes at whose multiples rows begin."""

CGROUPS = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)
"""Where the two versions of Linux' control groups say what a container may take, what it has taken, and of what."""


class HostMemory:
    """Memory of the host for many workers, all of which need rows of the same sizes.

    Where torch pins memory it takes a power of two, and a row of 1.1 GB would take 2. So rows of several workers are
    cut from one block; each has a storage of its own, so that saving one does not save its neighbours.

    Args:
        workers: how many take each row.
        pinned: whether a card reads and writes it.

    Attributes:
        device: the CPU.
    """

    def __init__(self, workers: int, pinned: bool) -> None:
        self.device = torch.device("cpu")
        self._workers, self._pinned = workers, pinned
        self._blocks: dict[int, tuple[Tensor, int, int]] = {}  # by size of the row: block, bytes used, rows to come

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A row of so many elements, with any values."""
        size = _row(numel * dtype.itemsize)
        block, used, left = self._blocks.get(size, (torch.empty(0, dtype=torch.uint8), 0, self._workers))
        if used + size > len(block):
            block, used = torch.empty(_blocks(size, left)[0], dtype=torch.uint8, pin_memory=self._pinned), 0
        self._blocks[size] = block, used + size, left - 1 or self._workers  # of another kind, such as momenta
        return torch.from_numpy(block.numpy()[used : used + numel * dtype.itemsize]).view(dtype)


def bytes_taken(size: int, workers: int) -> int:
    """What as many rows of so many bytes take together.

    Example:
        >>> [round(bytes_taken(1_100_000_000, workers) / 1.1e9 / workers, 2) for workers in (1, 4, 32)]
        [1.95, 1.46, 1.04]
    """
    return sum(_blocks(_row(size), workers)) if size else 0


def _row(size: int) -> int:
    return max(1, -(-size // LINE)) * LINE


def _blocks(row: int, left: int) -> list[int]:
    """Powers of two that hold so many rows: one block, or half of it and what the rest needs, whichever is less."""
    one = 1 << (row * left - 1).bit_length()
    inside = one // 2 // row
    if inside == 0:
        return [one]
    return min([one], [one // 2, *_blocks(row, left - inside)], key=sum)


def free_bytes(meminfo: Path = Path("/proc/meminfo"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """What the host can still give: memory that nothing needs, and not more than a container may take.

    Args:
        meminfo: what Linux says of its memory; without it, pages that are free.
        cgroups: the folder of the control group.
    """
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if meminfo.exists():
        free = 1024 * _entry(meminfo, "MemAvailable:")
    for limit, taken, stat in CGROUPS:
        if (cgroups / limit).exists() and (most := (cgroups / limit).read_text().strip()) != "max":
            needed = int((cgroups / taken).read_text()) - _entry(cgroups / stat, "inactive_file")  # files it has read
            free = min(free, max(0, int(most) - needed))
    return free


def _entry(file: Path, name: str) -> int:
    return next((int(line.split()[1]) for line in file.read_text().splitlines() if line.startswith(name)), 0)
