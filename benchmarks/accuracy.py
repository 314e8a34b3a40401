"""Accuracy against traffic at equal steps, on handwritten digits or on small images.

    python -m benchmarks.accuracy gossip                                   # scikit-learn's digits, about a minute
    python -m benchmarks.accuracy compressed --plot accuracy.png           # the plot to choose by
    python -m benchmarks.accuracy gossip --data cifar10.tar.xz             # train/ and test/ with a folder per class

All start from the same model and take the same number of steps with a warm-up and a cosine decay: SGD with Nesterov
momentum at one learning rate, or Adam at another; none is tuned. What is tested is the consensus. ``ddp`` is the
AllReduce preset, the same mathematics. MB are what a worker sends in training: looking at the consensus does not count.
The workers are simulated in this process, which changes neither accuracy nor bytes.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import random
import statistics
import tarfile
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lightning_slowmo import PRESETS, Algorithm, APMSqueeze, Engine, SlowMo, SyncError, Workers, together
from lightning_slowmo.compression import QSGD, Sign, SignTopK

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Task:
    """What all rows have in common.

    Attributes:
        folder: where the data lie.
        steps: optimizer steps.
        batch: examples per worker and step.
        rates: learning rate by name of the optimizer.
        looks: how often the consensus is tested, the end included.
        look_at: test images for each look, the first ones; None takes all.
        sync_every: steps between slow updates.
        slow_momentum: of SlowMo.
    """

    folder: str
    steps: int
    batch: int
    rates: dict[str, float]
    looks: int
    look_at: int | None
    sync_every: int
    slow_momentum: float


@dataclass(frozen=True)
class Row:
    """One line of the table: an algorithm over an optimizer, ``"sgd"``, ``"plain"`` (no momentum) or ``"adam"``."""

    algorithm: Algorithm
    optimizer: str = "sgd"


def rows(family: str, task: Task) -> dict[str, Row]:
    """The lines of a table, by name."""
    slow = {"sync_every": task.sync_every, "slow_momentum": task.slow_momentum}
    if family == "gossip":
        bases = {"ddp": "allreduce", "local_sgd": "local_sgd", "sgp": "sgp", "dpsgd": "dpsgd"}
        pairs = [(name, PRESETS[preset]) for name, preset in bases.items()]
        return {
            name + suffix: Row(SlowMo(base, **slow) if suffix else base)
            for name, base in pairs
            for suffix in ("", " + slowmo")
        }
    warmup = max(1, task.steps // 5)
    names = ("local_sgd", "qprsgd", "qprsgd_gossip", "choco_sgd", "squarm_sgd")
    return {
        "ddp": Row(PRESETS["allreduce"]),
        "slowmo": Row(SlowMo(**slow)),
        "slowmo, QSGD 4 bit": Row(SlowMo(**slow, compressor=QSGD(bits=4, norm="max", bucket=512))),
        "slowmo, 1 % of signs": Row(SlowMo(**slow, compressor=SignTopK(0.01))),
        **{name: Row(PRESETS[name]) for name in names},
        "sparq_sgd": Row(PRESETS["sparq_sgd"], "plain"),
        "sketched_sgd": Row(PRESETS["sketched_sgd"], "plain"),
        "sensed_sgd": Row(PRESETS["sensed_sgd"], "plain"),
        "ddp, Adam": Row(PRESETS["allreduce"], "adam"),
        "apmsqueeze": Row(APMSqueeze(warmup), "adam"),
        "apmsqueeze, l1 scale, no floor": Row(APMSqueeze(warmup, Sign("l1"), floor=0.0), "adam"),
        "apmsqueeze, no floor": Row(APMSqueeze(warmup, floor=0.0), "adam"),
    }


# Data -----------------------------------------------------------------------------------------------------------------


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
        for member in tqdm(archive, desc="reading images", unit=""):
            parts = Path(member.name).parts
            file = archive.extractfile(member) if member.isfile() and len(parts) >= 3 else None
            if file is not None and parts[-3] in SPLITS and parts[-1].endswith(".jpg"):
                found[parts[-3]].append((parts[-2], np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB"))))
    classes = sorted({name for name, _ in found["train"]})
    for split, rows in found.items():
        random.Random(0).shuffle(rows)  # a tar goes class by class, and some looks take the first images alone
        images = torch.from_numpy(np.stack([image for _, image in rows])).permute(0, 3, 1, 2)
        torch.save((images, torch.tensor([classes.index(name) for name, _ in rows])), folder / f"{split}.pt")


def prepare(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Scale bytes to [-1, 1]; in training, mirror half of the images."""
    if images.dtype != torch.uint8:
        return images
    images = images.float().div_(127.5).sub_(1)
    if generator is None:
        return images
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


@cache
def data(folder: str) -> list[tuple[Tensor, Tensor]]:
    """Images and labels of both splits."""
    return [torch.load(f"{folder}/{split}.pt", weights_only=True, mmap=True) for split in SPLITS]


# Training -------------------------------------------------------------------------------------------------------------


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


def make_optimizer(name: str, parameters: Iterable[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    """The optimizer of a row."""
    if name == "adam":
        return torch.optim.Adam(parameters, lr=rate)
    momentum = {"sgd": 0.9, "plain": 0.0}[name]
    return torch.optim.SGD(parameters, lr=rate, momentum=momentum, nesterov=momentum > 0, weight_decay=1e-4)


def accuracy(model: nn.Module, task: Task, workers: Workers, limit: int | None) -> float:
    """Accuracy in percent on the first ``limit`` test images (or all), of which each worker tests its share."""
    images, labels = (tensor[:limit][workers.rank :: workers.size] for tensor in data(task.folder)[1])
    with torch.no_grad():
        guesses = [model(prepare(part)).argmax(1) for part in images.split(500)]
    right = float((torch.cat(guesses) == labels).sum())
    tested = workers.gather([right, float(len(labels))], "the test")
    return 100 * sum(row[0] for row in tested) / sum(row[1] for row in tested)


def train(workers: Workers, task: Task, row: Row, seed: int) -> list[dict[str, float]]:
    """Train on one of the workers.

    Returns:
        At each look: step, MB that this worker has sent so far, and accuracy of the consensus in percent.
    """
    images, labels = data(task.folder)[0]
    torch.manual_seed(seed)
    model = build(images)
    shard = torch.randperm(len(labels))[workers.rank :: workers.size]
    generator = torch.Generator().manual_seed(1000 * seed + workers.rank)
    optimizer = make_optimizer(
        row.optimizer, model.parameters(), task.rates["adam" if row.optimizer == "adam" else "sgd"]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min(1, (k + 1) / (0.1 * task.steps)) * 0.5 * (1 + math.cos(math.pi * k / task.steps))
    )
    engine = Engine(row.algorithm, [optimizer], workers, module=model)
    looks, sent = [], 0
    for step in range(1, task.steps + 1):
        before = workers.traffic.sent
        chosen = shard[torch.randint(len(shard), (task.batch,), generator=generator)]
        batch = prepare(images[chosen], generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch), labels[chosen]).backward()
        engine.after_backward()
        engine.before_step()
        optimizer.step()
        engine.after_step()
        schedule.step()
        sent += workers.traffic.sent - before
        if step * task.looks // task.steps > (step - 1) * task.looks // task.steps:
            with engine.consensus():
                looks.append({"step": step, "mb": sent / 1e6, "accuracy": accuracy(model, task, workers, task.look_at)})
    engine.finish()
    return looks


def looks_of(size: int, task: Task, row: Row, seed: int) -> list[dict[str, float]]:
    """Train with so many workers; no looks if they diverged."""
    try:
        return together(Workers.simulated(size), partial(train, task=task, row=row, seed=seed))[0]
    except (SyncError, ValueError) as error:  # parameters are looked at before a sync, what is compressed inside of it
        if "infinit" not in str(error):
            raise
        return []


def earlier(path: Path | None, described: dict[str, Any]) -> dict[str, list[list[dict[str, float]]]]:
    """What a file holds of the same task already.

    Raises:
        SystemExit: if it is of another task.
    """
    if path is None or not path.exists():
        return {}
    saved = json.loads(path.read_text())
    if saved["task"] != described:
        raise SystemExit(f"{path} holds another task, {saved['task']}; name another file.")
    return saved["results"]


# Results --------------------------------------------------------------------------------------------------------------


def table(results: dict[str, list[list[dict[str, float]]]]) -> str:
    """Mean and standard deviation over the seeds, as Markdown."""
    lines = ["| | accuracy, % | MB sent per worker |", "|---|---|---|"]
    for name, seeds in results.items():
        if not all(seeds):
            lines.append(f"| {name} | diverged with {sum(not looks for looks in seeds)} of {len(seeds)} seeds | |")
            continue
        last = [looks[-1]["accuracy"] for looks in seeds]
        spread = statistics.stdev(last) if len(last) > 1 else 0.0
        lines.append(f"| {name} | {statistics.mean(last):.2f} ± {spread:.2f} | {seeds[0][-1]['mb']:.2f} |")
    return "\n".join(lines)


def plot(results: dict[str, list[list[dict[str, float]]]], path: Path, title: str) -> None:
    """Draw accuracy over MB: the mean over the seeds, with their spread at the end. What diverged is left out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    colors = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
    for number, (name, seeds) in enumerate(results.items()):
        if not all(seeds):
            continue
        points = [
            [statistics.mean(seed[i][key] for seed in seeds) for key in ("mb", "accuracy")]
            for i in range(len(seeds[0]))
        ]
        spread = statistics.stdev([seed[-1]["accuracy"] for seed in seeds]) if len(seeds) > 1 else 0.0
        color, second = colors[number % 10], number >= 10
        line = {"linestyle": "--" if second else "-", "marker": "s" if second else "D", "color": color}
        axes.plot(*zip(*points, strict=True), **line, markersize=2.5, linewidth=1.3)
        axes.errorbar(*points[-1], yerr=spread, **line, markersize=6, capsize=3, label=name)
    axes.set_xscale("log")
    axes.set(xlabel="MB sent per worker (logarithmic)", ylabel="test accuracy of the consensus, %", title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=["gossip", "compressed"])
    parser.add_argument("--data", type=Path, help="a tar of JPEG files; scikit-learn's digits if left out")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--batch", type=int, default=16, help="examples per worker and step")
    parser.add_argument("--lr", type=float, default=0.05, help="of SGD")
    parser.add_argument("--adam-lr", type=float, default=0.001)
    parser.add_argument("--looks", type=int, default=10, help="how often the consensus is tested")
    parser.add_argument("--look-at", type=int, help="test images for each look; all if left out")
    parser.add_argument("--sync-every", type=int, default=12, help="steps between slow updates")
    parser.add_argument("--slow-momentum", type=float, default=0.5)
    parser.add_argument("--only", nargs="+", help="names of rows")
    parser.add_argument("--json", type=Path, help="where to write all looks, and to go on from what is there")
    parser.add_argument("--plot", type=Path, help="where to draw accuracy over MB")
    a = parser.parse_args()
    what = a.data.name.split(".")[0] if a.data else "digits"
    with tempfile.TemporaryDirectory() as folder:
        rates = {"sgd": a.lr, "adam": a.adam_lr}
        task = Task(folder, a.steps, a.batch, rates, a.looks, a.look_at, a.sync_every, a.slow_momentum)
        described = asdict(task) | {"folder": what, "workers": a.workers}
        results = earlier(a.json, described)
        load_images(a.data, Path(folder)) if a.data else load_digits(Path(folder))
        lines = {name: row for name, row in rows(a.family, task).items() if not a.only or name in a.only}
        for name, row in (bar := tqdm(lines.items(), unit="row")):
            bar.set_postfix_str(name)
            seeds = results.setdefault(name, [])
            for seed in range(len(seeds), a.seeds):
                seeds.append(looks_of(a.workers, task, row, seed))
                if a.json:
                    a.json.write_text(json.dumps({"task": described, "results": results}, indent=1))
    title = f"{what}: {a.workers} workers, {a.steps} steps of {a.batch} examples each, {a.seeds} seeds"
    print(f"{title}, learning rates {rates}\n\n{table(results)}")
    if a.plot:
        plot(results, a.plot, title)


if __name__ == "__main__":
    main()
