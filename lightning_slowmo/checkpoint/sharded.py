"""Sharded slow state in a checkpoint: every worker writes its pieces, and any number of workers read what they need.

``shared.pt`` holds a placeholder with shape, stride and dtype wherever the state has :class:`Pieces`; the pieces
themselves are in ``slow00000.pt``, ``slow00001.pt``, ..., one file per worker of the save. On loading, each placeholder
becomes ``Pieces`` again, of all files. These are mapped to memory: only what is copied out of them is read.
"""

from __future__ import annotations

from typing import Any

from lightning_slowmo.checkpoint import files
from lightning_slowmo.communication.workers import Workers
from lightning_slowmo.pieces import Pieces, map_leaves


class Damaged(Exception):
    """A file with pieces cannot be used; the message names it."""


INDEX = "index of a sharded tensor"
"""The key by which a placeholder is known."""


def separate(state: Any) -> tuple[Any, list[list[tuple[int, Any]]]]:
    """Take the pieces out of a state.

    Returns:
        The state with placeholders, and the pieces of each sharded tensor by its index.
    """
    taken: list[list[tuple[int, Any]]] = []

    def replace(leaf: Any) -> Any:
        if not isinstance(leaf, Pieces):
            return leaf
        taken.append(list(leaf.pieces))
        return {INDEX: len(taken) - 1, "shape": leaf.shape, "stride": leaf.stride, "dtype": leaf.dtype}

    return map_leaves(replace, state), taken


def join(state: Any, contents: list[dict[str, Any]]) -> Any:
    """Put the pieces of all files in the places of their placeholders.

    Args:
        state: what :func:`separate` returned.
        contents: of each worker's file, by rank.

    Raises:
        ValueError: if an element of a sharded tensor is in no file.
    """

    def replace(leaf: Any) -> Any:
        if not (isinstance(leaf, dict) and INDEX in leaf):
            return leaf
        pieces = tuple(piece for content in contents for piece in content["pieces"][leaf[INDEX]])
        return Pieces(leaf["shape"], leaf["stride"], leaf["dtype"], pieces).joined()

    return map_leaves(replace, state)


def read(folder: str, save: str, world_size: int, state: Any, workers: Workers) -> Any:
    """Check the files of all workers of the save, and map them to memory.

    Checksums are computed once for each file: the present workers share them out.

    Args:
        folder: of the save.
        save: its name.
        world_size: number of workers that wrote it.
        state: what :func:`separate` returned.
        workers: those who read; the caller must ask all of them whether they succeeded.

    Raises:
        Damaged: if a file cannot be used.
        ValueError: if an element of a sharded tensor is in no file.
    """
    contents = []
    for rank in range(world_size):
        name = files.slow_file(rank)
        try:
            if rank % workers.size == workers.rank:
                files.verify_file(f"{folder}/{name}")
            contents.append(files.map_to_memory(f"{folder}/{name}", files.label(save, name, rank, world_size)))
        except Exception as error:  # of many types, see files.read
            raise Damaged(f"{name}: {files.reason(error)}") from error
    return join(state, contents)
