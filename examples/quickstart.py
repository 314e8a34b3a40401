"""One model, four ways to train it on four workers, and what each of them sends.

Real handwritten digits (8 x 8 pixels, they come with scikit-learn), a small convolutional network, four processes on
this machine's CPU. The LightningModule knows nothing of how it is trained: the strategy alone decides.
"""

import logging
import os
import time
import warnings

os.environ["OMP_NUM_THREADS"] = "1"  # the workers share this machine: one thread each

import lightning as L
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from lightning_slowmo import DiLoCo, LocalSGD, SlowMo, SlowMoStrategy

WORKERS, EPOCHS, BATCH = 4, 12, 15  # 15 images for each worker at each step: 24 steps in an epoch

STRATEGIES = {  # the same steps, with the same optimizer; the workers meet at all of them, or at every 12th
    "ddp": "ddp",
    "local_sgd": SlowMoStrategy(LocalSGD(sync_every=12)),
    "slowmo": SlowMoStrategy(SlowMo(sync_every=12)),  # these are the defaults: strategy="slowmo" is the same
    "diloco": SlowMoStrategy(DiLoCo(sync_every=12)),
}


class Digits(L.LightningModule):
    """An ordinary LightningModule."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(64 * 4 * 4, 128), nn.ReLU(), nn.Linear(128, 10)),
        )

    def training_step(self, batch, _):
        images, digits = batch
        return nn.functional.cross_entropy(self.net(images), digits)

    def validation_step(self, batch, _):
        images, digits = batch
        self.log("accuracy", 100 * (self.net(images).argmax(dim=1) == digits).float().mean(), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Record(L.Callback):
    """Writes down, after every epoch, how much was sent and how good the model is."""

    def __init__(self, name, bar):
        self.name, self.bar, self.megabytes, self.accuracies = name, bar, [], []

    def on_train_start(self, trainer, module):
        self.start = time.perf_counter()

    def on_validation_end(self, trainer, module):
        self.steps, self.seconds = trainer.global_step, time.perf_counter() - self.start
        self.accuracies.append(trainer.callback_metrics["accuracy"].item())
        if self.name == "ddp":
            # DDP does not count. It sums each step's gradients over the workers, and a ring sends 2 (n - 1) / n of
            # what it sums. Of strategy="allreduce", which does the same, the report says the same and some headers.
            gradients = sum(p.numel() * p.element_size() for p in module.parameters())
            self.megabytes.append(self.steps * gradients * 2 * (WORKERS - 1) / WORKERS / 1e6)
        else:
            self.megabytes.append(trainer.strategy.report.bytes_sent / 1e6)
        self.bar.set_postfix_str(f"{self.name}: {self.accuracies[-1]:.1f} % correct")
        self.bar.update()


def load():
    """Training and test images."""
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    parts = train_test_split(images, torch.tensor(labels), test_size=360, stratify=labels, random_state=0)
    return TensorDataset(parts[0], parts[2]), TensorDataset(parts[1], parts[3])


def draw(records):
    """Accuracy against MB sent, one line for each strategy with its name at the end."""
    colours = {"ddp": "#555555", "local_sgd": "#0072B2", "slowmo": "#D55E00", "diloco": "#009E73"}
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes, taken = figure.subplots(), {}
    for record in sorted(records, key=lambda record: record.accuracies[-1]):
        end, colour = record.megabytes[-1], colours[record.name]
        axes.plot(record.megabytes, record.accuracies, "o-", markersize=3.5, color=colour)
        taken[end] = max(record.accuracies[-1], taken.get(end, 0) + 0.55)  # names that would overlap move up
        axes.text(end * 1.08, taken[end], record.name, color=colour, va="center", weight="bold")
    axes.set(xscale="log", xlabel="MB sent per worker (log scale)", ylabel="test accuracy, %")
    axes.set_xticks(ticks := [2, 5, 10, 20, 50, 100, 200, 500], map(str, ticks))
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{WORKERS} workers, the same {records[0].steps} steps: what was sent for what accuracy", loc="left")
    figure.savefig("quickstart.png", dpi=150)


def main():
    """Train with each strategy, print the table, draw the picture."""
    logging.disable(logging.INFO)  # the terminal is for the progress bar and the table
    warnings.filterwarnings("ignore", module=r"lightning\.|torch\.")
    train, test = load()
    # Lightning starts this script once more for each further worker, so all of this runs in each of them.
    bar = tqdm(total=len(STRATEGIES) * EPOCHS, unit="epoch", disable=os.environ.get("LOCAL_RANK", "0") != "0")
    records = [Record(name, bar) for name in STRATEGIES]
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    for record in records:
        L.seed_everything(0, verbose=False)
        strategy = STRATEGIES[record.name]
        trainer = L.Trainer(strategy=strategy, accelerator="cpu", devices=WORKERS, max_epochs=EPOCHS, callbacks=record,
                            num_sanity_val_steps=0, **quiet)  # fmt: skip
        trainer.fit(Digits(), DataLoader(train, BATCH, shuffle=True), DataLoader(test, BATCH))
    bar.close()
    if trainer.is_global_zero:
        print(f"\n{'strategy':10}{'accuracy':>10}{'steps':>8}{'MB sent':>10}{'seconds':>10}")
        for r in records:
            print(f"{r.name:10}{r.accuracies[-1]:8.1f} %{r.steps:8}{r.megabytes[-1]:10.1f}{r.seconds:10.1f}")
        draw(records)
        print("\nAccuracy against MB sent is in quickstart.png.")


if __name__ == "__main__":
    main()
