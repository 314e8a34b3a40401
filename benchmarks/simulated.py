"""What simulated workers cost beside one worker's own steps, and the images per second that come of it.

    python -m benchmarks.simulated                                      # this machine's GPU if it has one, else its CPU
    python -m benchmarks.simulated --workers 4 --batch 16 --steps 3     # minutes on a CPU
    python -m benchmarks.simulated --workers 256 --memory               # what a million parameters take, on a CPU
    python -m benchmarks.simulated --host                               # Python's part of a worker's step, on a CPU

Trains the ResNet-18 of the recipes on random images of CIFAR-10's size through the Trainer, once with one worker under
Lightning's single device strategy and once with simulated ones, in turns, and compares the time of a worker's step.
"""

from __future__ import annotations

import argparse
import logging
import resource
import time
import warnings
from functools import partial
from itertools import pairwise
from statistics import median, quantiles

import lightning as L
import torch
from torch.utils.data import DataLoader

from lightning_slowmo import PRESETS, LocalSGD, SimulatedStrategy, SlowMo
from lightning_slowmo.replicas import Stage
from recipes.images import ImageClassifier
from recipes.images.data import InMemoryImages
from recipes.images.module import GRAPHS
from recipes.images.networks import cifar_resnet18
from recipes.schedules import constant

BATCHES = 390
"""Of CIFAR-10 with 128 images each: in an epoch, at whose end Lightning and the workers have other work to do."""


class RandomImages(InMemoryImages):
    """Noise of the shape of CIFAR-10."""

    def __init__(self, batch_size, examples):
        super().__init__(batch_size, crop=4, flip=True)
        self.examples = examples

    def read(self):
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (self.examples, 3, 32, 32), dtype=torch.uint8, generator=generator)
        labels = torch.randint(10, (self.examples,), generator=generator)
        return {"train_images": images, "train_labels": labels, "test_images": images[:10], "test_labels": labels[:10]}


class Clock(L.Callback):
    """Notes when steps end, from the end of the warm-up on."""

    def __init__(self, warmup):
        self.warmup, self.times = warmup, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step in (self.warmup, trainer.max_steps):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())


def seconds_per_worker_step(strategy, workers, batch, steps, warmup, compile, precision):
    """Train, and divide the time after the warm-up by steps and workers."""
    L.seed_everything(1, verbose=False)
    capture = torch.cuda.is_available() and compile not in GRAPHS
    sgd = partial(torch.optim.SGD, lr=0.01, momentum=0.9, fused=torch.cuda.is_available())
    model = ImageClassifier(cifar_resnet18(), sgd, constant, channels_last=True, compile=compile, capture=capture)
    clock = Clock(warmup)
    trainer = L.Trainer(
        strategy=strategy,
        devices=1,
        accelerator="auto",
        precision=precision,
        max_steps=warmup + steps,
        limit_val_batches=0,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        benchmark=True,
    )
    trainer.fit(model, datamodule=RandomImages(batch, batch * max(BATCHES, 2 * workers)))
    start, end = clock.times
    return (end - start) / (steps * workers)


class Wide(L.LightningModule):
    """A million parameters that take no time."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(5, 142858), torch.nn.Linear(142858, 1))

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


def peak_memory(workers):
    """Bytes at the peak of four steps with two syncs of SlowMo, beyond what the process had before."""
    model = Wide()
    trainer = L.Trainer(
        strategy=SimulatedStrategy(SlowMo(sync_every=2), workers),
        devices=1,
        accelerator="cpu",
        max_steps=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    trainer.fit(model, DataLoader([torch.randn(2, 5)] * 4 * workers, batch_size=None))
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


class Given(torch.autograd.Function):
    """A loss with a gradient of zeros for everything, which takes no time to compute."""

    @staticmethod
    def forward(ctx, *parameters):
        ctx.save_for_backward(*parameters)
        return torch.zeros(())

    @staticmethod
    def backward(ctx, gradient):
        return tuple(map(torch.zeros_like, ctx.saved_tensors))


class Small(L.LightningModule):
    """As many parameters and buffers as ResNet-18 has, 62 and 60, of a few elements each."""

    def __init__(self):
        super().__init__()
        pairs = [(torch.nn.Linear(4, 4, bias=False), torch.nn.BatchNorm1d(4)) for _ in range(20)]
        self.net = torch.nn.Sequential(*(layer for pair in pairs for layer in pair), torch.nn.Linear(4, 4))

    def training_step(self, batch, batch_idx):
        return Given.apply(*self.net.parameters())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Processor(L.Callback):
    """Notes the processor's time at the end of each step, which other work on the machine hardly changes."""

    def on_train_start(self, trainer, pl_module):
        self.times = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.times.append(time.process_time())


def microseconds_per_worker_step(strategy, workers, steps):
    """The lower quartile over the steps, after the first ten."""
    clock = Processor()
    trainer = L.Trainer(
        strategy=strategy,
        devices=1,
        accelerator="cpu",
        max_steps=steps + 10,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Small(), DataLoader([torch.zeros(1)] * (steps + 10) * workers, batch_size=None))
    times = clock.times[9:]
    return 1e6 * quantiles([b - a for a, b in pairwise(times)], n=4)[0] / workers


def microseconds_on_stage(static):
    """What one worker's coming and going takes, with gradients, apart from everything that the Trainer does."""
    module = Small()
    optimizer = module.configure_optimizers()
    stage = Stage(module, [optimizer], 8, static)
    took = []
    for _ in range(100):
        for index in range(8):
            start = time.process_time()
            stage.put(index)
            middle = time.process_time()
            module.training_step(None, 0).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            end = time.process_time()
            stage.clear(drop_gradients=True)
            took.append(time.process_time() - end + middle - start)
    return 1e6 * quantiles(took[80:], n=4)[0]


def report_host(workers, steps, repeats):
    """Print what Python takes of a worker's step."""
    for _ in range(repeats):
        alone = microseconds_per_worker_step("auto", 1, 10 * steps)
        ours = {
            name: microseconds_per_worker_step(SimulatedStrategy(algorithm, workers), workers, steps)
            for name, algorithm in {"without syncs": LocalSGD(10**9), "slowmo": SlowMo(sync_every=12)}.items()
        }
        said = ", ".join(f"{name} {took:.0f} ({took - alone:+.0f})" for name, took in ours.items())
        print(f"us per worker's step: Lightning alone {alone:.0f}, {workers} workers {said}")
        stage = [f"{what} {microseconds_on_stage(static):.0f}" for what, static in (("pointed to", 0), ("copied", 1))]
        print(f"us of coming to the stage and leaving it: {', '.join(stage)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=32)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=24, help="of all workers, after the warm-up")
    parser.add_argument("--algorithms", default="slowmo", help="presets, with commas between them")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--compile", help="a mode of torch.compile; on a GPU default, captured as one graph")
    parser.add_argument("--memory", action="store_true", help="measure memory instead of time")
    parser.add_argument("--host", action="store_true", help="measure Python's part instead, of no network")
    arguments = parser.parse_args()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    if arguments.memory:
        peak, state = peak_memory(arguments.workers), 4 * 4 * sum(p.numel() for p in Wide().parameters())
        print(f"{peak / 1e9:.2f} GB, {peak / (arguments.workers * state):.2f} x parameters, momentum and slow state")
        return
    if arguments.host:
        report_host(arguments.workers, arguments.steps, arguments.repeats)
        return
    gpu = torch.cuda.is_available()
    compile = arguments.compile or ("default" if gpu else None)
    precision = "bf16-mixed" if gpu else "32-true"
    print(torch.cuda.get_device_name() if gpu else "CPU", f"torch {torch.__version__} {precision} compile={compile}")
    measure = partial(seconds_per_worker_step, batch=arguments.batch, compile=compile, precision=precision)
    steps, workers = arguments.steps, arguments.workers
    alone: list[float] = []
    simulated: dict[str, list[float]] = {name: [] for name in arguments.algorithms.split(",")}
    for _ in range(arguments.repeats):
        alone.append(measure("auto", 1, steps=steps * workers, warmup=24 if gpu else 2))
        for name, times in simulated.items():
            strategy = SimulatedStrategy(PRESETS[name], workers)
            times.append(measure(strategy, workers, steps=steps, warmup=13 if gpu else 1))  # a sync compiles kernels
    print(
        f"{'one worker':24} {1000 * median(alone):8.3f} ms a step   {arguments.batch / median(alone):10,.0f} images/s"
    )
    for name, times in simulated.items():
        ratio = median(each / one for each, one in zip(times, alone, strict=True))
        rate = arguments.batch / median(times)
        label = f"{workers} x {name}"
        print(f"{label:24} {1000 * median(times):8.3f} ms a step   {rate:10,.0f} images/s   {ratio:.3f} x one worker's")


if __name__ == "__main__":
    main()
