"""Speed and size of every compressor, as ratios to a memory copy of the same vector in the same run.

python benchmarks/compressors.py [--elements 25600000] [--repeats 7] [--threads 2] [--device cpu]

Each row is measured in turn with the copy, repeatedly. Medians are compared, and in column "best" the fastest of each.
The two differ on a machine that others use: a compressor is some hundred short kernels, each of which waits for the
slowest thread, where the copy is one.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from lightning_slowmo.compression import (
    QSGD,
    Cast,
    Compressor,
    CountSketch,
    Identity,
    RandomK,
    Sign,
    SignTopK,
    TopK,
    seeded_generator,
)

COMPRESSORS: list[Compressor] = [
    Identity(),
    Cast(to="bf16"),
    Cast("int8"),
    Sign("l1"),
    Sign("l2"),
    QSGD(bits=4),
    QSGD(bits=4, norm="max", bucket=512),
    QSGD(bits=3, norm="max", bucket=512),
    QSGD(bits=8),
    TopK(fraction=0.01),
    TopK(fraction=0.01, values=QSGD(bits=8, norm="max")),
    SignTopK(fraction=0.01),
    RandomK(fraction=0.01),
    CountSketch(rows=5, columns=100_000),
]


def resnet50_segments(elements: int) -> tuple[int, ...]:
    """Lengths of 161 tensors in the proportions of ResNet-50, scaled to ``elements``."""
    lengths = [64 * 3 * 49, 64, 64]
    width_in = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolutions = [width_in * width, width * width * 9, width * width * 4]
            outputs = [width, width, width * 4]
            if block == 0:
                convolutions.append(width_in * width * 4)
                outputs.append(width * 4)
            for size, features in zip(convolutions, outputs, strict=True):
                lengths += [size, features, features]
            width_in = width * 4
    lengths += [2048 * 1000, 1000]
    scale = elements / sum(lengths)
    scaled = [int(length * scale) for length in lengths]
    scaled[-2] += elements - sum(scaled)
    return tuple(scaled)


def name_of(compressor: Compressor) -> str:
    """The call that builds it, without settings left at their default."""
    changed = [
        f"{field.name}={name_of(value) if isinstance(value, Compressor) else repr(value)}"
        for field in dataclasses.fields(compressor)  # type: ignore[arg-type]
        if field.init and (value := getattr(compressor, field.name)) != getattr(type(compressor)(), field.name)
    ]
    return f"{type(compressor).__name__}({', '.join(changed)})"


def timed(function: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=25_600_000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device, elements = torch.device(arguments.device), arguments.elements
    generator = seeded_generator(seed=0, device=device)
    flat = torch.randn(elements, generator=generator, device=device)
    copy, out = torch.empty_like(flat), torch.empty_like(flat)

    print(f"{elements:,} float32 elements on {device}, {arguments.threads} threads, median of {arguments.repeats}")
    for name, segments in (("1 tensor", (elements,)), ("161 tensors", resnet50_segments(elements))):
        print(f"\n| {name} | encode | decode | together | best | bits/element |\n|---|---|---|---|---|---|")
        for compressor in COMPRESSORS:
            payload = compressor.compress(flat, segments, generator)
            compressor.decompress(payload, segments, out=out)
            steps = [
                partial(copy.copy_, flat),
                partial(compressor.compress, flat, segments, generator),
                partial(compressor.decompress, payload, segments, out=out),
            ]
            times = [[timed(step, device) for step in steps] for _ in range(arguments.repeats)]
            columns = list(zip(*times, strict=True))
            baseline, encode, decode = map(statistics.median, columns)
            fastest, *best = map(min, columns)
            ratios = [encode / baseline, decode / baseline, (encode + decode) / baseline, sum(best) / fastest]
            cells = [f"{ratio:.1f}" for ratio in ratios] + [f"{8 * payload.numel() / elements:.2f}"]
            print(f"| `{name_of(compressor)}` | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
