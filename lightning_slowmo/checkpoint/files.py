"""One file beside a checkpoint: written whole, with a label and a checksum, and refused if either does not fit.

A file is what ``torch.save`` writes, followed by 32 bytes: the SHA-256 of all bytes before them. ``torch.load`` ignores
bytes after the archive and opens such a file as any other. Its content is a dictionary whose entry ``"label"`` says
which file of which save it is.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import zipfile
from contextlib import suppress
from pathlib import PurePosixPath
from typing import IO, Any, cast

import fsspec
import torch
from fsspec.implementations.local import LocalFileSystem

CHUNK = 2**20
"""Bytes that are read at a time while a checksum is computed: memory does not depend on the file's size."""

DIGEST_BYTES = hashlib.sha256().digest_size


def label(save: str, file: str, rank: int, world_size: int) -> dict[str, Any]:
    """What a file says about itself.

    Args:
        save: name of the save.
        file: the file's own name.
        rank: who wrote it.
        world_size: number of workers of the save.
    """
    return {"save": save, "file": file, "rank": rank, "world_size": world_size}


def own_file(rank: int) -> str:
    """Name of the file with what is a worker's own."""
    return f"rank{rank:05d}.pt"


def slow_file(rank: int) -> str:
    """Name of the file with a worker's pieces of sharded slow state."""
    return f"slow{rank:05d}.pt"


def folder(path: str | os.PathLike) -> str:
    """The folder beside a main file; beside the file itself if ``path`` is a link to it."""
    local = os.path.realpath(path) if "://" not in str(path) else path
    return f"{local}.slowmo"


class _Hashing:
    """A file to write to that computes the checksum of what passes."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def write(content: dict[str, Any], path: str) -> None:
    """Write to a temporary name and rename, so that a file is whole or absent.

    Args:
        content: plain values and tensors, with a :func:`label`.
        path: local, or a URL that fsspec opens.
    """
    system, inner = fsspec.core.url_to_fs(path)
    system.makedirs(str(PurePosixPath(inner).parent), exist_ok=True)
    temporary = f"{inner}.part"
    with system.open(temporary, "wb") as file:
        hashing = _Hashing(file)
        torch.save(content, cast(IO[bytes], hashing))
        file.write(hashing.digest.digest())
    system.mv(temporary, inner)


def read(path: str, expected: dict[str, Any] | None) -> tuple[dict[str, Any], bytes]:
    """Read a file after checking all of it.

    Args:
        path: local, or a URL that fsspec opens.
        expected: the label that the file must have; None for a file of version 1, which has neither label nor
            checksum: the checksums of the archive's records, which are weaker, are checked instead.

    Returns:
        The content, and a checksum.

    Raises:
        Exception: of whatever type. Damaged archives make torch and zipfile raise nearly every type there is.
    """
    system, inner = fsspec.core.url_to_fs(path)
    with system.open(inner, "rb") as file:
        digest = verify(file) if expected is not None else verify_records(file)
        file.seek(0)
        content = torch.load(file, map_location="cpu", weights_only=True)
    check_label(content, expected)
    return content, digest


def map_to_memory(path: str, expected: dict[str, Any]) -> dict[str, Any]:
    """Open a file so that its tensors are read from disk when they are used; checks the label alone.

    A remote file is copied to the folder for temporary files (``TMPDIR``), where it takes space until its tensors are
    gone.
    """
    system, inner = fsspec.core.url_to_fs(path)
    if isinstance(system, LocalFileSystem):
        content = torch.load(inner, map_location="cpu", weights_only=True, mmap=True)
    else:
        with tempfile.NamedTemporaryFile(suffix=".pt") as copy:  # the mapping outlives the name
            with system.open(inner, "rb") as file:
                shutil.copyfileobj(file, copy, CHUNK)
            copy.flush()
            content = torch.load(copy.name, map_location="cpu", weights_only=True, mmap=True)
    check_label(content, expected)
    return content


def verify_file(path: str) -> None:
    """Compute the checksum of a file and compare it with the one at its end.

    Raises:
        ValueError: if they differ.
    """
    system, inner = fsspec.core.url_to_fs(path)
    with system.open(inner, "rb") as file:
        verify(file)


def verify(file: IO[bytes]) -> bytes:
    """The checksum at the end of an open file, after comparing it with the content.

    Raises:
        ValueError: if it is not that of the content.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    digest = hashlib.sha256()
    left = size - DIGEST_BYTES
    while left > 0:
        chunk = file.read(min(CHUNK, left))
        if not chunk:
            break
        digest.update(chunk)
        left -= len(chunk)
    if size <= DIGEST_BYTES or file.read(DIGEST_BYTES) != digest.digest():
        raise ValueError("its checksum is not that of its content")
    return digest.digest()


def verify_records(file: IO[bytes]) -> bytes:
    """Check the CRC-32 of each record of an archive that torch.save wrote.

    Returns:
        A checksum of these checksums.

    Raises:
        ValueError: if a record does not fit its checksum.
        Exception: of whatever type, if it is no archive.
    """
    with zipfile.ZipFile(file) as archive:
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of its record {damaged} is not that of its content")
        return hashlib.sha256(repr([(info.filename, info.CRC) for info in archive.infolist()]).encode()).digest()


def check_label(content: Any, expected: dict[str, Any] | None) -> None:
    """Raise ValueError if a file is not what its name and place promise."""
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}")
    if expected is None or content.get("label") == expected:
        return
    found = content["label"] if isinstance(content.get("label"), dict) else {}
    wrong = [key for key, value in expected.items() if found.get(key) != value]
    raise ValueError("; ".join(f"its {key} is {found.get(key)} instead of {expected[key]}" for key in wrong))


def reason(error: Exception) -> str:
    """An exception in one line of printable ASCII and of limited length: damaged files bring anything into messages."""
    lines = str(error).encode("ascii", "backslashreplace").decode().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def remove_folders(path: str | os.PathLike, but: str | None) -> None:
    """Remove the folders of saves under a main file's name, except one."""
    system, inner = fsspec.core.url_to_fs(folder(path))
    with suppress(FileNotFoundError):
        if but is None:
            system.rm(inner, recursive=True)
            return
        for entry in system.ls(inner, detail=False):
            if PurePosixPath(entry).name != but:
                system.rm(entry, recursive=True)
