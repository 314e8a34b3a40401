"""A training that goes on by itself from its newest checkpoint: handwritten digits, a small network, slow momentum.

It runs in processes that a test starts and kills, and as a script under torchrun::

    python -m torch.distributed.run --nproc-per-node 2 --max-restarts 3 -m tests.faults.digits FOLDER STEPS

Without torchrun, Lightning itself starts the second process.
"""

import json
import os
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from sklearn.datasets import load_digits

from lightning_slowmo import SlowMo, SlowMoStrategy
from tests.trainer.models import Regression, trainer

SYNC_EVERY = 5
SAVE_EVERY = 10


class Digits:
    """Batches of a worker's share, in a new order each epoch, which remembers where it was."""

    def __init__(self, rank, size, batch_size=32):
        images, labels = load_digits(return_X_y=True)
        self.images, self.labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
        self.rank, self.size, self.batch_size = rank, size, batch_size
        self.epoch = self.batch = 0

    def __len__(self):
        return len(self.labels) // self.size // self.batch_size

    def __iter__(self):
        if self.batch >= len(self):
            self.epoch, self.batch = self.epoch + 1, 0
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(self.epoch))
        batches = order[self.rank :: self.size].split(self.batch_size)
        while self.batch < len(self):
            chosen = batches[self.batch]
            self.batch += 1
            yield self.images[chosen], self.labels[chosen]

    def state_dict(self):
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state):
        self.epoch, self.batch = state["epoch"], state["batch"]


class Classifier(Regression):
    def __init__(self):
        super().__init__(lr=0.02)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            linear = torch.nn.Linear
            self.net = torch.nn.Sequential(linear(64, 16), torch.nn.BatchNorm1d(16), torch.nn.Tanh(), linear(16, 10))

    def loss(self, batch):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])


class Diary(Callback):
    """Writes down from where rank 0 started, and how it ended."""

    def __init__(self, folder):
        self.folder = Path(folder, "lives")
        self.folder.mkdir(exist_ok=True)

    def on_train_start(self, trainer, module):
        # The strategy begins to train after the callbacks; a file that is there means that it may be killed.
        momentum = [float(m.norm()) for unit in trainer.strategy.engine.units for m in unit.momentum]
        self.write("start", trainer, step=trainer.global_step, momentum=momentum, size=trainer.world_size)

    def on_fit_end(self, trainer, module):
        everything = Digits(0, 1, batch_size=1797)
        module.eval()
        with torch.no_grad():
            loss = module.loss(next(iter(everything)))
        weights = {name: tensor.double().flatten().tolist() for name, tensor in module.state_dict().items()}
        self.write("end", trainer, step=trainer.global_step, loss=float(loss), weights=weights)

    def on_exception(self, trainer, module, exception):
        self.write("exception", step=trainer.global_step, error=type(exception).__name__)

    def write(self, name, trainer=None, **entry):
        if trainer is None or trainer.is_global_zero:
            path = self.folder / f"{name} {time.monotonic_ns()}.json"
            path.with_suffix(".part").write_text(json.dumps(entry | {"time": time.monotonic()}))
            path.with_suffix(".part").rename(path)


def diary(folder, name):
    """What was written down, in order of time."""
    paths = sorted(Path(folder, "lives").glob(f"{name} *.json"), key=lambda path: int(path.stem.split()[1]))
    return [json.loads(path.read_text()) for path in paths]


def steps_saved(folder):
    """The steps of all completed checkpoints, in order."""
    return sorted(int(path.stem.removeprefix("step=")) for path in Path(folder).glob("step=*.ckpt"))


def train(rank, size, folder, steps, seconds_per_step=0.002, limit=timedelta(seconds=20)):
    """Train to a number of steps from the newest checkpoint, if there is one; return warnings about it."""
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=SAVE_EVERY, save_top_k=2, monitor="step", mode="max")
    strategy = SlowMoStrategy(SlowMo(sync_every=SYNC_EVERY, slow_momentum=0.7), sync_timeout=limit, timeout=limit)
    callbacks = [Diary(folder), saving, Pace(seconds_per_step)]
    here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    fitting = trainer(
        here,
        strategy,
        num_nodes=size // here,
        callbacks=callbacks,
        enable_checkpointing=True,
        max_epochs=-1,
        max_steps=steps,
    )
    saved = steps_saved(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitting.fit(Classifier(), Digits(rank, size), ckpt_path=f"{folder}/step={saved[-1]}.ckpt" if saved else None)
    return [str(warning.message) for warning in caught if "checkpoint" in str(warning.message)]


class Pace(Callback):
    """Makes steps long enough to be killed in."""

    def __init__(self, seconds):
        self.seconds = seconds

    def on_train_batch_end(self, *_):
        time.sleep(self.seconds)


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0)))
    train(rank, int(os.environ.get("WORLD_SIZE", 2)), sys.argv[1], int(sys.argv[2]), 0.01, timedelta(minutes=3))
