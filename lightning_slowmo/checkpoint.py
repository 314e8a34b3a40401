"""What a checkpoint needs beside Lightning's own file: the state that differs by rank.

The main file is an ordinary Lightning checkpoint with the consensus weights; ``ddp`` and ``load_from_checkpoint`` open
it. Beside it lies a folder::

    model.ckpt
    model.ckpt.slowmo/
        1f0c...e2/              one save, named in the main file
            shared.pt           slow state that is equal on all workers, written once
            rank00000.pt        what is this worker's own: parameters, counters, optimizer, schedulers, progress
            rank00001.pt

A save writes the folder of a new name first, then the main file, and removes older folders last; a save that is cut
short at any point leaves the previous checkpoint whole. A set of files that is not complete is recognised by all
workers together. Everything is plain values and tensors and is loaded with ``weights_only=True``.
"""

from __future__ import annotations

import os
import re
import secrets
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePosixPath
from pickle import UnpicklingError
from typing import Any

import fsspec
import torch
from torch import Tensor

from lightning_slowmo.communication.workers import Workers

KEY = "lightning_slowmo"
"""Where the main file says what lies beside it."""

VERSION = 1

PER_RANK = ("optimizer_states", "lr_schedulers", "loops")
"""Entries of a Lightning checkpoint of which every rank keeps its own."""


@dataclass(frozen=True)
class Restored:
    """What could be restored of the workers' state.

    Attributes:
        shared: the slow state, or None if it could not be read.
        local: this rank's own state, or None if the checkpoint has another number of workers or is incomplete.
        entries: this rank's own entries of the Lightning checkpoint.
        warning: what the user should know, if anything was lost.
    """

    shared: dict[str, Any] | None = None
    local: dict[str, Any] | None = None
    entries: Mapping[str, Any] | None = None
    warning: str | None = None


def save(
    checkpoint: dict[str, Any],
    path: str | os.PathLike,
    workers: Workers,
    algorithm: str,
    shared: dict[str, Any],
    local: dict[str, Any],
    per_rank: tuple[str, ...],
    write_main: Callable[[], None],
) -> None:
    """Write a checkpoint; all workers must call this.

    Args:
        checkpoint: Lightning's dictionary, to which a note of the per-rank files is added.
        path: of the main file; where they differ (a worker with fewer batches counts fewer steps), rank 0's counts.
        workers: all of them.
        algorithm: what kind of state this is.
        shared: slow state that is equal on all workers.
        local: this worker's own.
        per_rank: further entries of ``checkpoint`` of which every rank keeps its own.
        write_main: writes the main file (on the rank that does).
    """
    path = workers.gather_text(str(path))[0]
    name = f"{int(workers.gather([secrets.randbits(52)], 'naming a checkpoint')[0][0]):013x}"
    checkpoint[KEY] = {"version": VERSION, "name": name, "world_size": workers.size, "algorithm": algorithm}
    entries = {key: checkpoint[key] for key in (*PER_RANK, *per_rank) if key in checkpoint}
    for key in [key for key, value in entries.items() if not is_plain(value)]:
        del entries[key]
        warnings.warn(
            f"{key} of {workers.names[workers.rank]} holds objects that torch.load(weights_only=True) refuses; on "
            "resuming, every rank will get rank 0's.",
            stacklevel=2,
        )
    folder = f"{_folder(path)}/{name}"
    _write({"local": local, "entries": entries}, f"{folder}/{_rank_file(workers.rank)}")
    if workers.rank == 0:
        _write({"shared": shared}, f"{folder}/shared.pt")
    workers.gather([0], "writing a checkpoint")  # the main file must not name a folder that is not complete
    write_main()
    if workers.rank == 0:
        _remove_folders(path, but=name)


def load(checkpoint: Mapping[str, Any], path: str | os.PathLike, workers: Workers, algorithm: str) -> Restored:
    """Read what :func:`save` wrote beside a main file; all workers must call this and come to the same conclusion.

    Args:
        checkpoint: the main file's content.
        path: of the main file.
        workers: all of them.
        algorithm: what kind of state is wanted.
    """
    note = checkpoint.get(KEY)
    if note is None:
        return Restored(warning=f"{path} was not saved by this strategy: the algorithm starts anew from its weights.")
    if note["algorithm"] != algorithm:
        return Restored(
            warning=f"{path} was saved by {note['algorithm']}, not {algorithm}: the algorithm starts anew from its "
            "weights."
        )
    if not re.fullmatch("[0-9a-f]{13}", str(note["name"])):
        return Restored(warning=f"{path} names an invalid folder: the algorithm starts anew from its weights.")
    folder = f"{_folder(path)}/{note['name']}"
    shared, why_shared = _read(f"{folder}/shared.pt")
    same_size = note["world_size"] == workers.size
    own, why_own = _read(f"{folder}/{_rank_file(workers.rank)}") if same_size else ({}, "")
    readable = workers.gather([bool(shared), bool(own)], "reading a checkpoint")
    all_shared, all_own = (all(column) for column in zip(*readable, strict=True))
    if not all_shared:
        lost = [workers.names[rank] for rank, row in enumerate(readable) if not row[0]]
        return Restored(
            warning=f"The slow state beside {path} could not be read by {', '.join(lost)} {why_shared}: "
            "the algorithm starts anew from the consensus."
        )
    if not same_size:
        return Restored(
            shared=shared["shared"],
            warning=f"{path} was saved by {note['world_size']} workers and is continued by {workers.size}: "
            "they go on from the consensus with the slow state; what each worker had of its own is left behind.",
        )
    if not all_own:
        lost = [workers.names[rank] for rank, row in enumerate(readable) if not row[1]]
        return Restored(
            shared=shared["shared"],
            warning=f"The own state of {', '.join(lost)} beside {path} could not be read {why_own}: all workers go on "
            "from the consensus with the slow state.",
        )
    return Restored(shared["shared"], own["local"], own["entries"])


def remove(path: str | os.PathLike) -> None:
    """Remove what lies beside a main file; a link to a checkpoint has nothing of its own."""
    if not os.path.islink(path):
        _remove_folders(path, but=None)


def is_plain(value: Any) -> bool:
    """Whether ``torch.load(weights_only=True)`` accepts a value: tensors, numbers, text, and collections of them."""
    if type(value) in (dict, OrderedDict, Counter):
        return all(is_plain(key) and is_plain(item) for key, item in value.items())
    if type(value) in (list, tuple, set):
        return all(map(is_plain, value))
    plain = (type(None), bool, int, float, complex, str, bytes, torch.dtype)  # None: many an optimizer's options
    return type(value) in plain or isinstance(value, Tensor)


def _folder(path: str | os.PathLike) -> str:
    """The folder beside a main file; beside the file itself if ``path`` is a link to it."""
    local = os.path.realpath(path) if "://" not in str(path) else path
    return f"{local}.slowmo"


def _rank_file(rank: int) -> str:
    return f"rank{rank:05d}.pt"


def _write(state: dict[str, Any], path: str) -> None:
    """Write to a temporary name and rename, so that a file is whole or absent."""
    system, inner = fsspec.core.url_to_fs(path)
    system.makedirs(str(PurePosixPath(inner).parent), exist_ok=True)
    temporary = f"{inner}.part"
    with system.open(temporary, "wb") as file:
        torch.save(state, file)
    system.mv(temporary, inner)


def _read(path: str) -> tuple[dict[str, Any], str]:
    """The content of a file, or an empty dictionary and the reason."""
    try:
        system, inner = fsspec.core.url_to_fs(path)
        with system.open(inner, "rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True), ""
    except (OSError, EOFError, RuntimeError, UnpicklingError, ValueError, KeyError) as error:
        return {}, f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else path})"


def _remove_folders(path: str | os.PathLike, but: str | None) -> None:
    """Remove the folders of saves under a main file's name, except one."""
    system, inner = fsspec.core.url_to_fs(_folder(path))
    with suppress(FileNotFoundError):
        if but is None:
            system.rm(inner, recursive=True)
            return
        for entry in system.ls(inner, detail=False):
            if PurePosixPath(entry).name != but:
                system.rm(entry, recursive=True)
