"""Compressors on a GPU: time, kernel launches, and whether payloads are those of the CPU.

    python -m benchmarks.gpu_compressors                                     # on a GPU, less than 90 seconds
    python -m benchmarks.gpu_compressors --device cpu --elements 100000      # to see that it runs

Times are wall times of encoding and of decoding, the fastest of several, divided by that of a copy of the float32
vector on the device. An encoding ends with a wait for the device, in which a vector that is not finite is refused. The
vector is cut as ResNet-50 is, into 161 tensors, or is one tensor.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.compressors import name_of, resnet50_segments, timed
from lightning_slowmo.compression import (
    QSGD,
    Cast,
    Compressor,
    CountSketch,
    RandomK,
    Sign,
    SignTopK,
    TopK,
    seeded_generator,
)

COMPRESSORS: list[Compressor] = [
    Cast("bf16"),
    Cast("int8"),
    Sign("l1"),
    Sign("l2"),
    QSGD(bits=4),
    QSGD(bits=4, norm="max", bucket=512),
    QSGD(bits=8),
    TopK(fraction=0.01),
    TopK(fraction=0.01, values=QSGD(bits=8, norm="max")),
    SignTopK(fraction=0.01),
    RandomK(fraction=0.01),
    CountSketch(rows=5, columns=100_000),
]

HEADER = ["compressor", "tensors", "encode", "decode", "together", "launches", "bits/element"]


def launches(call: Callable[[], object], device: torch.device) -> int:
    """Kernels, copies and fills that a call starts on a GPU; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize(device)
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())


def table(device: torch.device, elements: int = 102_000_000, repeats: int = 7) -> list[list[str]]:
    """Rows below :data:`HEADER`: times of encoding and decoding in copies of the vector, and what was launched."""
    generator = seeded_generator(0)  # on the CPU, as for vectors anywhere
    flat = torch.randn(elements, generator=seeded_generator(0, device=device), device=device)
    out = torch.empty_like(flat)
    copies = [timed(lambda: out.copy_(flat), device) for _ in range(20)]
    copy = min(copies)
    rows = []
    for segments in (resnet50_segments(elements), (elements,)):
        for compressor in COMPRESSORS:

            def encode(compressor: Compressor = compressor, segments: tuple[int, ...] = segments) -> Tensor:
                return compressor.compress(flat, segments, generator)

            payload = encode()

            def decode(
                payload: Tensor = payload, compressor: Compressor = compressor, segments: tuple[int, ...] = segments
            ) -> Tensor:
                return compressor.decompress(payload, segments, out=out)

            decode()
            encoding = min(timed(encode, device) for _ in range(repeats)) / copy
            decoding = min(timed(decode, device) for _ in range(repeats)) / copy
            started = f"{launches(encode, device)} + {launches(decode, device)}"
            cells = [f"{encoding:.1f}", f"{decoding:.1f}", f"{encoding + decoding:.1f}", started]
            rows.append([f"`{name_of(compressor)}`", str(len(segments)), *cells, f"{8 * len(payload) / elements:.2f}"])
    return rows


def differences(device: torch.device, elements: int = 1_000_000) -> list[list[str]]:
    """How payloads and decoded vectors of the device differ from those of the CPU, from the same random numbers."""
    segments = (*resnet50_segments(elements - 20), 0, 1, 7, 12)
    rows = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        flat = torch.randn(elements, generator=seeded_generator(1), dtype=torch.float64).to(dtype)
        flat[:: elements // 1000] = 0
        there = flat.to(device)
        for compressor in COMPRESSORS:
            expected = compressor.compress(flat, segments, seeded_generator(2))
            payload = compressor.compress(there, segments, seeded_generator(2))
            mine = compressor.decompress(expected.to(device), segments, dtype).cpu()
            theirs = compressor.decompress(expected, segments, dtype)
            moved = compressor.decompress(payload, segments, dtype).cpu()
            unequal = int((payload.cpu() != expected).sum())
            largest = float((moved - theirs).abs().max() / theirs.abs().max())
            same = "the same" if torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8)) else "DIFFERENT"
            kind = str(dtype).removeprefix("torch.")
            rows.append([f"`{name_of(compressor)}`", kind, f"{unequal} of {len(expected)}", f"{largest:.1e}", same])
    return rows


def show(header: list[str], rows: list[list[str]]) -> None:
    """Print a Markdown table."""
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--elements", type=int, default=102_000_000)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    start = time.perf_counter()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{arguments.elements:,} float32 elements on {name}, torch {torch.__version__}\n")
    checked = min(arguments.elements, 1_000_000)
    show(
        ["compressor", "type", "payload bytes unlike the CPU's", "largest difference", "the CPU's payload decodes to"],
        differences(device, checked),
    )
    show(HEADER, table(device, arguments.elements, arguments.repeats))
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
