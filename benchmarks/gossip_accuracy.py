"""Accuracy and traffic of gossip beside DDP and local SGD, each without and with SlowMo, at equal steps.

    python -m benchmarks.gossip_accuracy                                  # scikit-learn's digits, about a minute
    python -m benchmarks.gossip_accuracy --data cifar10.tar.xz            # train/ and test/ with a folder per class

All start from the same model and take the same number of steps of SGD with Nesterov momentum, with a warm-up and a
cosine decay; none is tuned. What is tested is the consensus. ``ddp`` is the AllReduce preset, the same mathematics.
"""

from __future__ import annotations

import argparse
import io
import math
import statistics
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lightning_slowmo import PRESETS, Algorithm, Engine, SlowMo, Workers
from tests.harness import run

BASES = ("allreduce", "local_sgd", "sgp", "dpsgd")
SPLITS = ("train", "test")


def load_digits(folder: Path) -> None:
    """1,797 images of 8 x 8 from scikit-learn, a fifth of them for the test."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    cut = len(labels) // 5
    for split, rows in zip(SPLITS, (order[cut:], order[:cut]), strict=True):
        torch.save((torch.tensor(images[rows] / 8 - 1).float(), torch.tensor(labels[rows])), folder / f"{split}.pt")


def load_images(path: Path, folder: Path) -> None:
    """A tar of folders ``.../train/<class>/*.jpg`` and ``.../test/<class>/*.jpg``, all of one size."""
    from PIL import Image

    found: dict[str, list[tuple[str, np.ndarray]]] = {split: [] for split in SPLITS}
    with tarfile.open(path) as archive:
        for member in archive:
            parts = Path(member.name).parts
            file = archive.extractfile(member) if member.isfile() and len(parts) >= 3 else None
            if file is not None and parts[-3] in SPLITS and parts[-1].endswith(".jpg"):
                found[parts[-3]].append((parts[-2], np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB"))))
    classes = sorted({name for name, _ in found["train"]})
    for split, rows in found.items():
        images = torch.from_numpy(np.stack([image for _, image in rows])).permute(0, 3, 1, 2)
        torch.save((images, torch.tensor([classes.index(name) for name, _ in rows])), folder / f"{split}.pt")


def build(images: Tensor) -> nn.Module:
    """Two dense layers for flat images, a small convolutional network for others."""
    if images.dim() == 2:
        return nn.Sequential(nn.Linear(images.shape[1], 64), nn.ReLU(), nn.Linear(64, 10))
    layers: list[nn.Module] = []
    channels = 3
    for width in (16, 32, 64):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 16, 10))


def prepare(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Scale bytes to [-1, 1]; in training, mirror half of the images."""
    if images.dtype != torch.uint8:
        return images
    images = images.float().div_(127.5).sub_(1)
    if generator is None:
        return images
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


def train(
    rank: int, folder: str, algorithms: dict[str, Algorithm], seeds: int, steps: int, batch: int, lr: float
) -> dict[str, list[tuple[float, float]]]:
    """Accuracy of the consensus in percent, and MB sent by this worker, of each algorithm and seed."""
    train_images, train_labels = torch.load(f"{folder}/train.pt", weights_only=True)
    test_images, test_labels = torch.load(f"{folder}/test.pt", weights_only=True)
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in algorithms}
    for seed in range(seeds):
        for name, algorithm in algorithms.items():
            workers = Workers.from_world()
            torch.manual_seed(seed)
            model = build(train_images)
            shard = torch.randperm(len(train_labels))[rank :: workers.size]
            generator = torch.Generator().manual_seed(1000 * seed + rank)
            optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=1e-4)
            schedule = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda k: min(1, (k + 1) / (0.1 * steps)) * 0.5 * (1 + math.cos(math.pi * k / steps))
            )
            engine = Engine(algorithm, [optimizer], workers, module=model)
            sent = workers.traffic.sent
            for _ in range(steps):
                rows = shard[torch.randint(len(shard), (batch,), generator=generator)]
                images = prepare(train_images[rows], generator)
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images), train_labels[rows]).backward()
                engine.after_backward()
                engine.before_step()
                optimizer.step()
                engine.after_step()
                schedule.step()
            megabytes = (workers.traffic.sent - sent) / 1e6
            engine.finish()
            own = slice(rank, None, workers.size)  # each worker tests its share
            with torch.no_grad():
                guesses = [model(prepare(part)).argmax(1) for part in test_images[own].split(500)]
            right = float((torch.cat(guesses) == test_labels[own]).sum())
            correct = sum(row[0] for row in workers.gather([right], "the test"))
            results[name].append((100 * correct / len(test_labels), megabytes))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a tar of JPEG files; scikit-learn's digits if left out")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--batch", type=int, default=16, help="examples per worker and step")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--sync-every", type=int, default=12, help="steps between slow updates")
    parser.add_argument("--slow-momentum", type=float, default=0.5)
    parser.add_argument("--limit", type=float, default=3600, help="seconds")
    a = parser.parse_args()
    algorithms: dict[str, Algorithm] = {}
    for base in BASES:
        algorithms[base] = PRESETS[base]
        algorithms[f"{base} + slowmo"] = SlowMo(PRESETS[base], a.sync_every, a.slow_momentum)
    with tempfile.TemporaryDirectory() as folder:
        load_images(a.data, Path(folder)) if a.data else load_digits(Path(folder))
        results = run(a.workers, train, folder, algorithms, a.seeds, a.steps, a.batch, a.lr, limit=a.limit)[0]
    print(f"{a.workers} workers, {a.steps} steps of {a.batch} examples each, {a.seeds} seeds, learning rate {a.lr}")
    print("| | accuracy, % | MB sent per worker |\n|---|---|---|")
    for name, rows in results.items():
        accuracies = [accuracy for accuracy, _ in rows]
        spread = statistics.stdev(accuracies) if len(rows) > 1 else 0.0
        shown = name.replace("allreduce", "ddp")
        print(f"| {shown} | {statistics.mean(accuracies):.2f} ± {spread:.2f} | {rows[0][1]:.2f} |")


if __name__ == "__main__":
    main()
