"""Small data in the formats of the real: CIFAR-10's own files, trees of JPEG files, and tars of such trees."""

from __future__ import annotations

import pickle
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("airplane", "automobile", "bird", "cat")


def write_cifar10(root: Path, per_batch: int = 20, test: int = 10) -> dict[str, np.ndarray]:
    """The files that torchvision unpacks, with random pixels. Returns images by split, [N, 3, 32, 32]."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    made = {}
    for name, size in [*((f"data_batch_{i}", per_batch) for i in range(1, 6)), ("test_batch", test)]:
        pixels = draw.integers(256, size=(size, 3 * 32 * 32), dtype=np.uint8)
        with (folder / name).open("wb") as file:
            pickle.dump({"data": pixels, "labels": [i % 10 for i in range(size)]}, file)
        made[name] = pixels.reshape(size, 3, 32, 32)
    with (folder / "batches.meta").open("wb") as file:
        pickle.dump({"label_names": [str(i) for i in range(10)]}, file)
    return {"test": made.pop("test_batch"), "train": np.concatenate(list(made.values()))}


def write_tree(root: Path, train: int = 16, held_out: int = 4, size: int = 32, split: str = "test") -> None:
    """JPEG files in ``train/<class>/`` and ``<split>/<class>/``: so many of each class, each of its own shade."""
    draw = np.random.default_rng(0)
    for folder, count in (("train", train), (split, held_out)):
        for i, name in enumerate(CLASSES):
            (root / folder / name).mkdir(parents=True)
            for k in range(count):
                pixels = np.clip(60 * i + 30 + draw.normal(0, 20, (size, size, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / folder / name / f"{k:04}.jpg")


def write_tar(tree: Path, path: Path) -> None:
    """Pack a tree; the suffix says how it is compressed."""
    with tarfile.open(path, f"w:{path.suffix[1:]}" if path.suffix != ".tar" else "w") as archive:
        archive.add(tree, arcname=tree.name)
