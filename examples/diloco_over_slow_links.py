"""DiLoCo beside DDP between two hosts that a slow link connects. Linux and root.

    sudo python examples/diloco_over_slow_links.py

The hosts are network namespaces on this machine, with 20 Mbit/s each (benchmarks/network.py). Both train the same
steps; what differs is how often they talk. On hosts of your own, leave out ``Network`` and start this file's ``host``
on each with the same variables.
"""

import logging
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).parents[1]
HOSTS, RATE, STEPS = 2, 20e6, 40


def host(name):
    """What runs on each host: MASTER_ADDR, MASTER_PORT and NODE_RANK say who is who."""
    import lightning as L
    import torch
    from sklearn.datasets import load_digits
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    from lightning_slowmo import DiLoCo, SlowMoStrategy

    class Digits(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))

        def training_step(self, batch, _):
            images, labels = batch
            return nn.functional.cross_entropy(self.net(images), labels)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

        def on_train_start(self):
            self.start = time.perf_counter()

        def on_train_end(self):
            self.seconds = time.perf_counter() - self.start

    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore")
    L.seed_everything(1, workers=True, verbose=False)
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    strategy = {"ddp": "ddp", "diloco": SlowMoStrategy(DiLoCo(sync_every=20))}[name]
    trainer = L.Trainer(
        strategy=strategy, accelerator="cpu", devices=1, num_nodes=HOSTS, max_steps=STEPS, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = Digits()
    trainer.fit(module, DataLoader(TensorDataset(images, labels), 16, shuffle=True))
    if trainer.is_global_zero:
        right = (module.eval().net(images).argmax(1) == labels).float().mean()
        print(f"{name:8}{module.seconds:8.1f} s{right:12.1%} of the training images right", flush=True)


def main():
    """Make the network, and start both hosts for each strategy."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.network import Network

    print(f"{HOSTS} hosts, {RATE / 1e6:.0f} Mbit/s, {STEPS} steps")
    with Network(HOSTS, RATE) as network:
        for name in ("ddp", "diloco"):
            where = {"MASTER_ADDR": network.address(0), "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": "eth0"}
            processes = [
                subprocess.Popen(
                    ["ip", "netns", "exec", network.name(rank), sys.executable, __file__, name],
                    env={**os.environ, **where, "NODE_RANK": str(rank), "LOCAL_RANK": "0"},
                )
                for rank in range(HOSTS)
            ]
            codes = [process.wait() for process in processes]
            if any(codes):
                raise SystemExit(f"{name} failed.")


if __name__ == "__main__":
    host(sys.argv[1]) if len(sys.argv) > 1 else main()
