"""What a SlowMo round costs next to the bare all-reduce of the same bytes, and how much memory it takes.

    python -m benchmarks.sync_round              # 2 and 4 gloo processes on this machine

The model has ResNet-50's 161 parameters, 25.6 million in all. "bare" is one ``all_reduce`` of one preallocated buffer
of that size. All variants alternate within one run, so that their ratios hold on a noisy machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import Parameter, ParameterList

from lightning_slowmo.algorithms import DiLoCo, LocalSGD, SlowMo
from lightning_slowmo.communication import Workers
from lightning_slowmo.engine import Engine


def resnet50_shapes() -> list[tuple[int, ...]]:
    """The shapes of ResNet-50's parameters, in order: 161 of them, 25,557,032 elements."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            out = 4 * width
            shapes += [(width, channels, 1, 1), (width,), (width,), (width, width, 3, 3), (width,), (width,)]
            shapes += [(out, width, 1, 1), (out,), (out,)]
            if block == 0:
                shapes += [(out, channels, 1, 1), (out,), (out,)]
            channels = out
    return [*shapes, (1000, 2048), (1000,)]


def bytes_of(tensors: object) -> int:
    """Bytes of all distinct storages that are reachable from an object's attributes, lists and dicts."""
    storages: dict[int, int] = {}
    seen: set[int] = set()

    def visit(value: object) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item)
        elif type(value).__module__.startswith("lightning_slowmo"):
            visit(vars(value))

    visit(tensors)
    return sum(storages.values())


def worker(rank: int, size: int, repeats: int, results: mp.SimpleQueue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    workers = Workers.from_world()
    buffer = torch.randn(sum(torch.Size(shape).numel() for shape in resnet50_shapes()))

    def running(algorithm: object) -> Callable[[], None]:
        torch.manual_seed(0)  # all workers start from the same model
        model = ParameterList([Parameter(torch.randn(shape)) for shape in resnet50_shapes()])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine = Engine(algorithm, [optimizer], workers)
        own = bytes_of(list(model.parameters()))
        engines.append((type(algorithm).__name__, lambda: bytes_of(engine.units) / own - 1))
        return lambda: engine.after_step()

    engines: list[tuple[str, Callable[[], float]]] = []
    variants = {
        "bare": lambda: dist.all_reduce(buffer),
        "LocalSGD": running(LocalSGD(sync_every=1)),
        "SlowMo": running(SlowMo(sync_every=1)),
        "DiLoCo": running(DiLoCo(sync_every=1)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(repeats + 1):
        for name, run in variants.items():
            dist.barrier()
            start = time.perf_counter()
            run()
            if repeat:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - start)
        buffer.clamp_(-1, 1)
    if rank == 0:
        memory = {name: measure() for name, measure in engines}
        results.put(({name: statistics.median(times) for name, times in seconds.items()}, memory))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29531", OMP_NUM_THREADS="1")
    print(f"{'workers':>7}  {'variant':10}  {'ms':>7}  {'/ bare':>6}  extra memory / parameters")
    for size in arguments.workers:
        results = mp.get_context("spawn").SimpleQueue()
        mp.spawn(worker, (size, arguments.repeats, results), size)
        times, memory = results.get()
        for name, median in times.items():
            extra = f"{memory[name]:.2f}" if name in memory else ""
            print(f"{size:>7}  {name:10}  {median * 1e3:7.1f}  {median / times['bare']:6.2f}  {extra}")


if __name__ == "__main__":
    main()
