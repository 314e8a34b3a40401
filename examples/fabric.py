"""A training loop of one's own: SlowMo under Fabric, on two workers, with a validation, a checkpoint and a resume.

    python examples/fabric.py

Real handwritten digits (8 x 8 pixels, they come with scikit-learn), two processes on this machine's CPU.
"""

import os
import tempfile

os.environ["OMP_NUM_THREADS"] = "1"  # the workers share this machine: one thread each

import torch
from lightning.fabric import Fabric
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_slowmo import SlowMo, SlowMoFabricStrategy

EPOCHS, BATCH = 8, 16


def load():
    """Training and test images."""
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    return TensorDataset(images[:1440], labels[:1440]), TensorDataset(images[1440:], labels[1440:])


def make(fabric):
    """Everything that a checkpoint holds."""
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    model, optimizer = fabric.setup(net, optimizer)  # all workers get rank 0's model, and training begins
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "epoch": 0}


def train_epoch(fabric, state, loader):
    """Local steps; every twelfth ends with a sync."""
    for images, digits in loader:
        state["optimizer"].zero_grad()
        fabric.backward(nn.functional.cross_entropy(state["model"](images), digits))
        fabric.clip_gradients(state["model"], state["optimizer"], max_norm=1.0)
        state["optimizer"].step()
    state["scheduler"].step()
    state["epoch"] += 1


@torch.no_grad()
def accuracy(fabric, model, loader):
    """Of the workers' mean, in percent: each worker looks at its share of the test images."""
    with fabric.strategy.consensus():  # on all ranks
        right = sum((model(images).argmax(1) == digits).sum() for images, digits in loader)
    return 100 * fabric.all_reduce(right, reduce_op="sum").item() / len(loader.dataset)


def main():
    """Train half of the epochs, save, and go on with new objects, as another process would."""
    fabric = Fabric(accelerator="cpu", devices=2, strategy=SlowMoFabricStrategy(SlowMo(sync_every=12)))
    fabric.launch()
    fabric.seed_everything(0, verbose=False)
    path = os.path.join(fabric.broadcast(tempfile.mkdtemp()), "middle.ckpt")
    train, test = load()
    test_loader = fabric.setup_dataloaders(DataLoader(test, BATCH))
    loader = fabric.setup_dataloaders(DataLoader(train, BATCH, shuffle=True))

    state = make(fabric)
    with fabric.strategy.training():  # at its end, all workers hold the mean
        while state["epoch"] < EPOCHS // 2:
            train_epoch(fabric, state, loader)
        fabric.print(f"epoch {state['epoch']}: {accuracy(fabric, state['model'], test_loader):.1f} % correct")
        fabric.save(path, state)  # the mean, and beside it what is each worker's own

    state = make(fabric)
    fabric.load(path, state)
    with fabric.strategy.training():
        while state["epoch"] < EPOCHS:
            train_epoch(fabric, state, loader)
            fabric.print(f"epoch {state['epoch']}: {accuracy(fabric, state['model'], test_loader):.1f} % correct")
    fabric.print(fabric.strategy.report)


if __name__ == "__main__":
    main()
