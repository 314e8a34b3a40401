"""What a checkpoint needs beside Lightning's own file: the state that differs by rank, and protection from damage.

The main file is an ordinary Lightning checkpoint with the consensus weights; ``ddp`` and ``load_from_checkpoint`` open
it. Beside it lies a folder::

    model.ckpt
    model.ckpt.slowmo/
        1f0c...e2/              one save, named in the main file
            shared.pt           slow state that is equal on all workers, written once
            slow00000.pt        with sharded slow state: this worker's pieces of it (see sharded.py)
            slow00001.pt
            rank00000.pt        what is this worker's own: parameters, counters, optimizer, schedulers, progress
            rank00001.pt

**Order of writes.** A save writes the folder of a new name first, then the main file, and removes older folders last; a
save that is cut short at any point leaves the previous checkpoint whole.

**Files beside the main file** end with a SHA-256 of their content, and say which file of which save they are: name of
the save, name of the file, rank, and number of workers (see files.py). A file that is damaged, missing, or of another
save is refused by all workers together, and a warning says which file and why: they go on from the consensus, with the
slow state if that is intact.

**The main file** has no second file with its checksum, which could be lost, or written a moment too late. It carries
the checksums of its own entries, under :data:`KEY`; they cover the content, not the bytes. When they do not fit, there
are two cases. If a record does not fit the CRC-32 that torch.save wrote beside it, the file is damaged: an error, since
there are no other weights to go on from. If all records fit, somebody loaded the file, changed it, and saved it again:
a warning, and training goes on from the changed file; the slow state is left behind if the weights were changed, since
it belongs to others. Only this strategy, when it resumes training, looks at these checksums.

Everything is plain values and tensors and is loaded with ``weights_only=True``. Files of version 1, which had neither
labels nor checksums, are still read; of them the CRC-32 of their records is checked.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import fsspec

from lightning_slowmo.checkpoint import files, sharded
from lightning_slowmo.checkpoint.content import checksums, fingerprint, is_plain
from lightning_slowmo.communication.workers import Workers

__all__ = ["KEY", "PER_RANK", "VERSION", "Restored", "is_plain", "load", "remove", "save"]

KEY = "lightning_slowmo"
"""Where the main file says what lies beside it."""

VERSION = 2

PER_RANK = ("optimizer_states", "lr_schedulers", "loops")
"""Entries of a Lightning checkpoint of which every rank keeps its own."""

REASONS = 3
"""How many different reasons a warning quotes at most."""


@dataclass(frozen=True)
class Restored:
    """What could be restored of the workers' state.

    Attributes:
        shared: the slow state, or None if it could not be read. Sharded tensors are
            :class:`~lightning_slowmo.pieces.Pieces` that cover the whole tensor; copy out of them what is needed.
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
    shards: Sequence[int] = (),
    own: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint; all workers must call this.

    Args:
        checkpoint: Lightning's dictionary, to which a note of the per-rank files is added.
        path: of the main file; where they differ (a worker with fewer batches counts fewer steps), rank 0's counts.
        workers: all of them.
        algorithm: what kind of state this is.
        shared: slow state that is equal on all workers; a tensor of which each holds a part is a
            :class:`~lightning_slowmo.pieces.Pieces`, at the same places of the dictionary on all workers.
        local: this worker's own.
        per_rank: further entries of ``checkpoint`` of which every rank keeps its own.
        write_main: writes the main file (on the rank that does).
        shards: how the processes of a worker share its model, if they do: in how many parts, by dimension of the mesh.
        own: further entries for this worker's own file; they come before those of ``checkpoint``.
    """
    path = workers.gather_text(str(path))[0]
    name = f"{int(workers.gather([secrets.randbits(52)], 'naming a checkpoint')[0][0]):013x}"
    note = {"version": VERSION, "name": name, "world_size": workers.size, "algorithm": algorithm}
    note |= {"shards": list(shards)} if shards else {}
    entries = {key: checkpoint[key] for key in (*PER_RANK, *per_rank) if key in checkpoint} | dict(own or {})
    for key in [key for key, value in entries.items() if not is_plain(value)]:
        del entries[key]
        warnings.warn(
            f"{key} of {workers.names[workers.rank]} holds objects that torch.load(weights_only=True) refuses; on "
            "resuming, every rank will get rank 0's.",
            stacklevel=2,
        )
    folder = f"{files.folder(path)}/{name}"
    common, pieces = sharded.separate(shared)

    def write(file: str, **content: Any) -> None:
        files.write({"label": files.label(name, file, workers.rank, workers.size)} | content, f"{folder}/{file}")

    write(files.own_file(workers.rank), local=local, entries=entries)
    if pieces:
        write(files.slow_file(workers.rank), pieces=pieces)
    if workers.rank == 0:
        write("shared.pt", shared=common, sharded=bool(pieces))
        checkpoint[KEY] = note
        checkpoint[KEY] = note | {"checksums": json.dumps(checksums(checkpoint))}
    else:
        checkpoint[KEY] = note  # the others' dictionaries are not written
    workers.gather([0], "writing a checkpoint")  # the main file must not name a folder that is not complete
    write_main()
    if workers.rank == 0:
        files.remove_folders(path, but=name)


def load(
    checkpoint: Mapping[str, Any],
    path: str | os.PathLike,
    workers: Workers,
    algorithm: str,
    weights: Sequence[str] = ("state_dict",),
    shards: Sequence[int] = (),
) -> Restored:
    """Read what :func:`save` wrote beside a main file; all workers must call this and come to the same conclusion.

    Args:
        checkpoint: the main file's content.
        path: of the main file.
        workers: all of them.
        algorithm: what kind of state is wanted.
        weights: the entries that hold the consensus weights.
        shards: as for :func:`save`.

    Raises:
        ValueError: if the main file is damaged, or is not the same for all workers.
    """
    changed = _check_main(checkpoint, path, workers)
    note = checkpoint.get(KEY)
    refusal = _refusal(note, algorithm)
    if refusal is not None:
        return Restored(warning=f"{path} {refusal}: the algorithm starts anew from its weights.")
    if set(weights) & set(changed):
        return Restored(
            warning=f"The weights in {path} were changed, and it was saved again, after the strategy had written it: "
            "the algorithm starts anew from its weights."
        )
    assert note is not None
    found = _read_beside(path, note, workers)
    texts = []
    if changed:
        texts.append(
            f"{', '.join(changed)} of {path} was changed, and it was saved again, after the strategy had written it; "
            "where each worker has its own (optimizers, schedulers, progress), the one that lies beside it counts."
        )
    shared: dict[str, Any] | None = found.shared
    local = entries = None
    if found.lost_shared:
        shared = None
        texts.append(
            f"The slow state beside {path} could not be read by {found.lost_shared}: the algorithm starts anew from "
            "the consensus."
        )
    elif (before := (note["world_size"], tuple(note.get("shards", ())))) != (workers.size, tuple(shards)):
        texts.append(
            f"{path} was saved by {_crew(*before)} and is continued by {_crew(workers.size, shards)}: they go on from "
            "the consensus with the slow state; what each worker had of its own is left behind."
        )
    elif found.lost_own:
        texts.append(f"The own state of {found.lost_own}: all workers go on from the consensus with the slow state.")
    else:
        local, entries = found.own["local"], found.own["entries"]
    return Restored(shared, local, entries, " ".join(texts) or None)


def _crew(processes: int, shards: Sequence[int]) -> str:
    """How many workers there are, in words."""
    if not shards:
        return f"{processes} workers"
    return f"{processes // prod(shards)} workers of {' x '.join(map(str, shards))} shards"


def remove(path: str | os.PathLike) -> None:
    """Remove what lies beside a main file; a link to a checkpoint has nothing of its own."""
    if not os.path.islink(path):
        files.remove_folders(path, but=None)


# The main file --------------------------------------------------------------------------------------------------------


def _check_main(checkpoint: Mapping[str, Any], path: str | os.PathLike, workers: Workers) -> list[str]:
    """Compare the main file's content with its checksums, and with what the other workers have read.

    Returns:
        The entries that were changed on purpose since the file was written.

    Raises:
        ValueError: on all workers, if the file is damaged, or is not the same for all.
    """
    note = checkpoint.get(KEY)
    note = note if isinstance(note, dict) else {}
    found: dict[str, str] = {}
    if KEY in checkpoint:
        plain = {key: value for key, value in note.items() if key != "checksums"}
        found = checksums({**checkpoint, KEY: plain})
    legacy = note.get("version") == 1 and "checksums" not in note
    expected = found if legacy else _expected(note.get("checksums"))
    changed = sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key))
    damage = _damage(path) if changed else None
    read = fingerprint(f"{key} {value} ".encode() for key, value in found.items())
    rows = workers.gather([read, damage is not None], "reading a checkpoint")
    if any(damaged for _, damaged in rows):
        who = ", ".join(name for name, (_, damaged) in zip(workers.names, rows, strict=True) if damaged)
        reason = next(filter(None, workers.gather_text(damage or "")))
        raise ValueError(f"{path} is damaged ({reason}), as read by {who}. Resume from another checkpoint.")
    other = [name for name, row in zip(workers.names, rows, strict=True) if row != rows[0]]
    if other:
        raise ValueError(f"{path} is not the same file for {workers.names[0]} and for {', '.join(other)}.")
    return changed


def _expected(noted: Any) -> dict[str, str]:
    """The checksums in a main file's note.

    They are one text: a dictionary would share its keys with the checkpoint's in the pickle, where a changed key would
    change in both and go unnoticed.
    """
    try:
        expected = json.loads(noted)
        return {key: str(value) for key, value in expected.items()}
    except (TypeError, ValueError, AttributeError):  # the note itself is damaged: then nothing fits
        return {}


def _damage(path: str | os.PathLike) -> str | None:
    """What is damaged in a main file whose content is not what was saved; None if it was changed on purpose.

    Whoever saves a changed file gives its records new CRC-32s. Where a CheckpointIO plugin wrote something that is no
    archive of torch.save, nobody can tell.
    """
    try:
        system, inner = fsspec.core.url_to_fs(str(path))
        if system.isdir(inner):  # of a distributed checkpoint
            inner = f"{inner}/meta.pt"
        with system.open(inner, "rb") as file:
            if zipfile.is_zipfile(file):
                file.seek(0)
                files.verify_records(file)
    except Exception as error:  # of many types, see files.read
        return files.reason(error)
    return None


def _refusal(note: Any, algorithm: str) -> str | None:
    """Why what lies beside a main file cannot be used, or None if nothing in its note speaks against it."""
    if note is None:
        return "was not saved by this strategy"
    if not (isinstance(note, dict) and isinstance(note.get("world_size"), int) and "algorithm" in note):
        return "does not say what lies beside it"
    if note.get("version") not in range(1, VERSION + 1):
        return f"has version {note.get('version')} of this format, and at most {VERSION} is known here"
    if note["algorithm"] != algorithm:
        return f"was saved by {note['algorithm']}, not {algorithm}"
    if not re.fullmatch("[0-9a-f]{13}", str(note.get("name"))):
        return "names an invalid folder"
    return None


# The files beside it --------------------------------------------------------------------------------------------------


@dataclass
class _Beside:
    """What a worker has read beside the main file; ``lost_...`` says who could not read it and why, if anybody."""

    shared: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)
    digest: int = 0
    lost_shared: str = ""
    lost_own: str = ""


def _read_beside(path: str | os.PathLike, note: Mapping[str, Any], workers: Workers) -> _Beside:
    """Read the files beside a main file, and compare with the other workers what each could read."""
    found = _Beside()
    folder = f"{files.folder(path)}/{note['name']}"
    same_size = note["world_size"] == workers.size

    def read(file: str, rank: int) -> tuple[dict[str, Any], bytes]:
        label = files.label(note["name"], file, rank, note["world_size"]) if note["version"] > 1 else None
        return files.read(f"{folder}/{file}", label)

    def read_shared() -> None:
        content, digest = read("shared.pt", 0)
        found.digest, found.shared = fingerprint([digest]), content["shared"]
        if content.get("sharded"):
            found.shared = sharded.read(folder, note["name"], note["world_size"], found.shared, workers)

    def read_own() -> None:
        content, _ = read(files.own_file(workers.rank), workers.rank)
        found.own = {key: content[key] for key in ("local", "entries")}

    why_shared = _attempt(read_shared, "shared.pt")
    why_own = _attempt(read_own, files.own_file(workers.rank)) if same_size else ""
    rows = workers.gather([not why_shared, not why_own, found.digest], "reading a checkpoint")
    readable, own, digests = zip(*rows, strict=True)
    if not all(readable):
        found.lost_shared = _who_and_why(readable, why_shared, workers)
    elif len(set(digests)) > 1:
        found.lost_shared = f"{', '.join(workers.names)} alike (shared.pt is not the same file for all)"
    if not all(own):
        found.lost_own = _who_and_why(own, why_own, workers, f" beside {path} could not be read")
    return found


def _attempt(read: Callable[[], None], file: str) -> str:
    """Call a function that reads a file; why it could not, or an empty text.

    Every exception counts: whatever is wrong with a file, this worker must tell the others instead of leaving them.
    """
    try:
        read()
    except Exception as error:
        return str(error) if isinstance(error, sharded.Damaged) else f"{file}: {files.reason(error)}"
    return ""


def _who_and_why(well: tuple[float, ...], why: str, workers: Workers, what: str = "") -> str:
    """Who failed and, behind ``what``, the reasons that they give; all workers must call this."""
    names = ", ".join(name for name, success in zip(workers.names, well, strict=True) if not success)
    reasons = list(dict.fromkeys(filter(None, workers.gather_text(why))))
    more = f"; and {len(reasons) - REASONS} others" if len(reasons) > REASONS else ""
    return f"{names}{what} ({'; '.join(reasons[:REASONS])}{more})"
