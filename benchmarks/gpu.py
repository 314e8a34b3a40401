"""What a sync costs on a GPU beside the transfer: time, kernel launches and memory, as ratios to a copy of the model.

    python -m benchmarks.gpu                              # on a GPU, less than 3 minutes
    python -m benchmarks.gpu --device cpu --scale 0.01    # to see that it runs

One worker, alone, does everything that it does among others: it looks whether parameters are finite, packs them, moves
anchor and momentum, measures the drift and writes the new parameters; only the transfer is missing. Times are wall
times from an idle device to an idle device, the median of several. A copy reads and writes all parameters once. A sync
that does nothing but read and write what it must costs 4.5 copies with SlowMo and 2.5 with LocalSGD: 0.5 to look
whether parameters are finite, 1 to pack them, and 3 or 1 to make new ones.

The tables of the compressors are those of ``benchmarks/gpu_compressors.py``.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.profiler import ProfilerActivity, profile

from benchmarks.sync_round import resnet50_shapes
from lightning_slowmo.algorithms import Algorithm, DiLoCo, LocalSGD, SlowMo
from lightning_slowmo.communication import Workers
from lightning_slowmo.engine import Engine

Shapes = list[tuple[int, ...]]

TARGETS = {
    ("LocalSGD", "25.6 M"): 8,
    ("SlowMo", "25.6 M"): 12,
    ("LocalSGD", "302 M"): 3,
    ("SlowMo", "302 M"): 5,
}
"""Copies that a sync may cost at most."""

LAUNCHES = 60
"""Launches that a sync of the larger model may need at most."""


def transformer_shapes(layers: int = 24, width: int = 1024) -> Shapes:
    """The blocks of a transformer: 302 million elements, 12 tensors a layer."""
    norm: Shapes = [(width,), (width,)]
    attention: Shapes = [(3 * width, width), (3 * width,), (width, width), (width,)]
    feed_forward: Shapes = [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [*norm, *attention, *norm, *feed_forward] * layers


def scaled(shapes: Shapes, scale: float) -> Shapes:
    """The same number of tensors, with about ``scale`` times the elements."""
    return shapes if scale == 1 else [(max(1, int(torch.Size(shape).numel() * scale)),) for shape in shapes]


def seconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median wall time of a call, from an idle device to an idle device, after three calls to warm up."""
    times = []
    for repeat in range(repeats + 3):
        wait_for(device)
        start = time.perf_counter()
        call()
        wait_for(device)
        if repeat >= 3:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def launches(call: Callable[[], object], device: torch.device) -> tuple[int, float]:
    """Kernels, copies and fills that a call starts on a GPU, and the seconds that they take there; zeros on a CPU."""
    if device.type != "cuda":
        return 0, 0.0
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize(device)
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return len(events), sum(event.time_range.elapsed_us() for event in events) * 1e-6


def allotted(device: torch.device) -> int:
    """Bytes of the GPU's memory that tensors hold; 0 on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def row(
    algorithm: Algorithm, shapes: Shapes, dtype: torch.dtype, device: torch.device, repeats: int, copy: float
) -> list[str]:
    """Measure one algorithm: time, launches, and memory beyond parameters, in the columns of ``main``'s tables."""
    torch.manual_seed(0)
    model = [Parameter(torch.randn(shape, device=device).to(dtype)) for shape in shapes]
    bytes_of_model = sum(tensor.numel() * tensor.element_size() for tensor in model)
    before = allotted(device)
    optimizer = torch.optim.SGD(model, lr=0.1)
    engine = Engine(algorithm, [optimizer], Workers.from_world(device=device))
    engine.after_step()
    kept = allotted(device) - before
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    taken = seconds(engine.after_step, device, repeats)
    peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else 0
    count, in_kernels = launches(engine.after_step, device)
    name = type(algorithm).__name__ + ("" if dtype is torch.float32 else f", {str(dtype).removeprefix('torch.')}")
    figures = [taken * 1e3, taken / copy, in_kernels / copy]
    memory = [kept / bytes_of_model, peak / bytes_of_model]
    return [name, *(f"{figure:.2f}" for figure in figures), str(count), *(f"{part:.2f}" for part in memory)]


def copy_seconds(shapes: Shapes, device: torch.device, repeats: int) -> float:
    """Seconds for a copy of all parameters, in float32, as one tensor."""
    source = torch.randn(sum(torch.Size(shape).numel() for shape in shapes), device=device)
    target: Tensor = torch.empty_like(source)
    return seconds(lambda: target.copy_(source), device, repeats)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--scale", type=float, default=1.0, help="of the models' sizes")
    parser.add_argument("--no-compressors", action="store_true", help="leave the compressors' tables out")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}; at most {LAUNCHES} launches and, in copies, {TARGETS}\n", flush=True)
    header = ["sync", "ms", "copies", "copies in kernels", "launches", "memory kept / model", "peak / model"]
    for title, shapes in (("25.6 M", resnet50_shapes()), ("302 M", transformer_shapes())):
        shapes = scaled(shapes, arguments.scale)
        numel = sum(torch.Size(shape).numel() for shape in shapes)
        copy = copy_seconds(shapes, device, arguments.repeats)
        print(f"{title}: {len(shapes)} tensors, {numel:,} elements, copy {copy * 1e3:.3f} ms\n", flush=True)
        rows = []
        for algorithm in (LocalSGD(1), SlowMo(sync_every=1), DiLoCo(sync_every=1)):
            rows.append(row(algorithm, shapes, torch.float32, device, arguments.repeats, copy))
        rows.append(row(SlowMo(sync_every=1), shapes, torch.bfloat16, device, arguments.repeats, copy))
        print(table(header, rows) + "\n", flush=True)
    if not arguments.no_compressors and find_spec("benchmarks.gpu_compressors") is not None:
        compressors = importlib.import_module("benchmarks.gpu_compressors")
        print(table(compressors.HEADER, compressors.table(device)), flush=True)


if __name__ == "__main__":
    main()
