"""Image files on disk, read once: folders and tars of classes, CIFAR-10's own files, and a cache of tensors.

What is read is kept as one file in a cache folder; workers map it into memory and share it.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import IO

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm

SPLITS = {"train": "train", "test": "test", "val": "test", "valid": "test", "validation": "test"}
"""Names of folders that hold a split."""

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm"}

Images = dict[str, Tensor]
"""``train_images`` and ``test_images``, bytes [N, channels, height, width]; ``train_labels`` and ``test_labels``."""

GET_CIFAR10 = (
    "Give data.root= one of: a folder with torchvision's files (cifar-10-batches-py/), a folder or a .tar, .tar.gz or "
    ".tar.xz of train/<class>/*.jpg and test/<class>/*.jpg; or data.download=true to let torchvision fetch "
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz (170 MB) into data.root."
)


def cached(source: Path, cache: Path, read: Callable[[], Images]) -> Images:
    """What ``read`` returns, from the cache if it is there.

    Args:
        source: what is read: a file, or a folder. A changed file is read anew; a folder has to be renamed for that, or
            the cache removed.
        cache: folder of the cache; made if needed.
        read: called if the cache does not have the source.

    Returns:
        Tensors that are mapped from the file, so processes share them.
    """
    path = source.resolve()
    state = path.stat()
    key = f"{path} {state.st_size} {state.st_mtime_ns}" if path.is_file() else str(path)
    file = cache / f"{path.name.split('.')[0]}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.pt"
    if not file.exists():
        images = read()
        cache.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        torch.save(images, part)
        os.replace(part, file)  # whole or not at all, whoever else is writing it
    return torch.load(file, mmap=True, weights_only=True)


def read_cifar10(root: Path) -> Images:
    """CIFAR-10 from torchvision's files, or from an image tree.

    Raises:
        FileNotFoundError: if neither is there; says how to get them.
    """
    if (root / "cifar-10-batches-py").is_dir():
        return read_batches(root)
    if root.exists():
        return read_tree(root, GET_CIFAR10)
    raise FileNotFoundError(f"There is no {root}. {GET_CIFAR10}")


def read_batches(root: Path) -> Images:
    """The files that torchvision downloads and checks."""
    from torchvision.datasets import CIFAR10

    images = {}
    for split in ("train", "test"):
        data = CIFAR10(str(root), train=split == "train")
        images[f"{split}_images"] = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
        images[f"{split}_labels"] = torch.tensor(data.targets)
    return images


def read_tree(root: Path, advice: str = "") -> Images:
    """All images of a tree ``<split>/<class>/<image>``, in a folder or a tar, in the order of their names.

    Args:
        root: the folder or tar; folders above those of the splits do not matter. Splits are ``train``, and ``test`` or
            ``val``.
        advice: what to say if there are no such images.

    Raises:
        FileNotFoundError: if a split has no images.
        ValueError: if images differ in size or splits in classes.
    """
    from PIL import Image

    found: dict[str, list[tuple[str, str, Tensor]]] = {"train": [], "test": []}
    for name, file in tqdm(_files(root), desc=f"reading {root.name}, once", unit=" images", mininterval=1):
        parts = PurePath(name).parts
        if len(parts) >= 3 and parts[-3] in SPLITS and Path(name).suffix.lower() in SUFFIXES:
            found[SPLITS[parts[-3]]].append((parts[-2], name, pil_to_tensor(Image.open(file).convert("RGB"))))
    if not all(found.values()):
        raise FileNotFoundError(
            f"{root} has no images in train/<class>/ and test/<class>/ (or val/<class>/). {advice}".strip()
        )
    classes = sorted({label for label, _, _ in found["train"]})
    images = {}
    for split, rows in found.items():
        rows.sort(key=lambda row: row[:2])
        unknown = {label for label, _, _ in rows} - set(classes)
        if unknown:
            raise ValueError(f"{root}: {split} has classes that train has not: {', '.join(sorted(unknown))}.")
        sizes = {tuple(image.shape[1:]) for _, _, image in rows}
        if len(sizes) > 1:
            raise ValueError(f"{root}: images must all be of one size, but {split} has {sorted(sizes)[:3]} ...")
        images[f"{split}_images"] = torch.stack([image for _, _, image in rows])
        images[f"{split}_labels"] = torch.tensor([classes.index(label) for label, _, _ in rows])
    return images


def _files(root: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Names and contents of all files in a folder or a tar."""
    if root.is_dir():
        for path in root.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    yield str(path.relative_to(root)), file
        return
    try:
        archive = tarfile.open(root)  # noqa: SIM115 (closed below)
    except tarfile.ReadError:
        raise ValueError(f"{root} is neither a folder nor a tar.") from None
    with archive:
        for member in archive:
            content = archive.extractfile(member) if member.isfile() else None
            if content is not None:
                yield member.name, io.BytesIO(content.read())
