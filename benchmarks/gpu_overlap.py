"""What overlap hides and what offload costs on a GPU.

    python -m benchmarks.gpu_overlap                             # on one GPU, less than 3 minutes
    python -m benchmarks.gpu_overlap --device cpu --scale 0.01   # to see that it runs

**Offload.** One worker, alone, does a sync of SlowMo with ``offload_slow_state="cpu"``: anchor and momentum come up
from pinned memory, are moved, and go down again. Beside it stands the time that the same bytes take from and to pinned
memory in one piece each, both directions at once, measured in the same run. A sync should take at most 1.5 times as
long.

**Overlap.** Two workers on one card, which talk over NCCL as if they were on two hosts, multiply matrices and sync
every few steps. Wall times: a step without syncs, with syncs, and with syncs that overlap; what overlap hides is the
part of the syncs' time that it saves. A profile then says which part of what lies on other streams than the
computation's (NCCL, packing, adding up) lies under kernels of the computation. The two processes share the card in
turns, so a step takes about twice as long as on a card of its own; each profile counts what its process runs.
"""

from __future__ import annotations

import argparse
import bisect
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import Parameter
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import scaled, seconds, table, transformer_shapes, wait_for
from benchmarks.processes import run_trainers
from benchmarks.sync_round import resnet50_shapes
from lightning_slowmo.algorithms import Algorithm, LocalSGD, SlowMo
from lightning_slowmo.communication import Workers
from lightning_slowmo.engine import Engine

TARGET = 1.5
"""Times of the bytes' own time that an offloaded sync may take."""

TWO_HOSTS_ON_ONE_CARD = {
    "NCCL_SOCKET_IFNAME": "lo",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_IB_DISABLE": "1",
    "NCCL_P2P_DISABLE": "1",
    "NCCL_SHM_DISABLE": "1",
    "LOCAL_WORLD_SIZE": "1",
}

PERIOD, OVERLAP, PERIODS = 10, 8, 4
"""Steps between syncs, steps that a sync may take, and syncs that are measured."""

MULTIPLICATIONS = 8
"""Products of square matrices that a step consists of."""

Span = tuple[float, float]


# Offload --------------------------------------------------------------------------------------------------------------


def both_ways(numel: int, device: torch.device, repeats: int) -> float:
    """Seconds for a number of float32 elements to come up from pinned memory while as many others go down."""
    pinned = device.type == "cuda"
    source, target = (torch.zeros(numel, pin_memory=pinned) for _ in range(2))
    up, down = (torch.zeros(numel, device=device) for _ in range(2))
    streams = [torch.cuda.Stream(device), torch.cuda.Stream(device)] if pinned else [None, None]

    def copy() -> None:
        with torch.cuda.stream(streams[0]):
            up.copy_(source, non_blocking=True)
        with torch.cuda.stream(streams[1]):
            target.copy_(down, non_blocking=True)

    return seconds(copy, device, repeats)


def offload_row(name: str, shapes: list[tuple[int, ...]], device: torch.device, repeats: int) -> list[str]:
    """A sync with and without offload, and the time of the bytes that offload moves."""
    times = []
    for placement in ({}, {"offload_slow_state": "cpu"}):
        torch.manual_seed(0)
        model = [Parameter(torch.randn(shape, device=device)) for shape in shapes]
        options: dict[str, Any] = placement
        optimizer = torch.optim.SGD(model, lr=0.1)
        engine = Engine(SlowMo(sync_every=1), [optimizer], Workers.from_world(device=device), **options)
        times.append(seconds(engine.after_step, device, repeats))
        del engine, optimizer
    numel = sum(parameter.numel() for parameter in model)
    floor = both_ways(2 * numel, device, repeats)  # anchor and momentum
    there, offloaded = times
    gigabytes = 2 * numel * 4 / 1e9
    figures = [f"{gigabytes:.2f}", f"{gigabytes / floor:.1f}", *(f"{1e3 * t:.2f}" for t in (floor, there, offloaded))]
    return [name, *figures, f"{offloaded / floor:.2f}", f"{TARGET}"]


OFFLOAD_HEADER = ["offload", "GB each way", "GB/s each way", "bytes alone, ms", "sync on the GPU, ms"]
OFFLOAD_HEADER += ["sync offloaded, ms", "× bytes alone", "at most"]


# Overlap --------------------------------------------------------------------------------------------------------------


def union(spans: Sequence[Span]) -> list[Span]:
    """The same points in time, in order and without overlaps."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def covered(spans: Sequence[Span], by: Sequence[Span]) -> float:
    """The length of what some spans have in common with others; each point of the first counts once."""
    by, total = union(by), 0.0
    starts = [start for start, _ in by]
    for start, end in union(spans):
        for left, right in by[max(0, bisect.bisect_right(starts, start) - 1) :]:
            if left >= end:
                break
            total += max(0.0, min(end, right) - max(start, left))
    return total


def by_stream(trace: dict[str, Any]) -> dict[int, list[tuple[str, Span]]]:
    """Names and spans, in microseconds, of what a trace says that a GPU did, by stream."""
    streams: dict[int, list[tuple[str, Span]]] = defaultdict(list)
    for event in trace["traceEvents"]:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            streams[event["args"]["stream"]].append((event["name"], (event["ts"], event["ts"] + event["dur"])))
    return streams


def hidden_shares(trace: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Milliseconds on other streams than the computation's, and the share of them under its kernels.

    The computation's stream is the one with most time in kernels that are not NCCL's.
    """
    streams = by_stream(trace)
    own = {key: sum(e - s for name, (s, e) in found if "nccl" not in name) for key, found in streams.items()}
    main = max(own, key=lambda key: own[key])
    under = [span for _, span in streams[main]]
    beside = [(name, span) for key, found in streams.items() if key != main for name, span in found]
    kinds = {
        "NCCL": [span for name, span in beside if "nccl" in name],
        "packing and arithmetic": [span for name, span in beside if "nccl" not in name],
    }
    shares = {}
    for kind, spans in kinds.items():
        length = sum(end - start for start, end in union(spans))
        shares[kind] = length / 1e3, covered(spans, under) / length if length else 0.0
    return shares


class Training:
    """Matrix products, and a model beside them that is synced: what is measured is who waits for whom."""

    def __init__(self, algorithm: Algorithm | None, workers: Workers, shapes: list, device: torch.device, width: int):
        torch.manual_seed(0)
        self.device = device
        self.model = [Parameter(torch.randn(shape, device=device)) for shape in shapes]
        optimizer = torch.optim.SGD(self.model, lr=0.1)
        self.engine = Engine(algorithm, [optimizer], workers) if algorithm is not None else None
        self.matrix = torch.randn(width, width, device=device) / width**0.5
        self.ended: list[torch.cuda.Event] = []

    def step(self) -> None:
        """A step; the host is at most one ahead of the GPU, as where a loader and a progress bar follow it."""
        for _ in range(MULTIPLICATIONS):
            torch.mm(self.matrix, self.matrix)
        if self.engine is not None:
            self.engine.after_step()
        if self.device.type == "cuda":
            self.ended.append(torch.cuda.Event())
            self.ended[-1].record()
            if len(self.ended) > 1:
                self.ended.pop(0).synchronize()

    def steps(self, count: int) -> float:
        """Seconds a step, over a number of steps."""
        wait_for(self.device)
        start = time.perf_counter()
        for _ in range(count):
            self.step()
        wait_for(self.device)
        return (time.perf_counter() - start) / count


def measure(rank: int, device_name: str, scale: float, width: int) -> list[list[str]]:
    """Rows of the table, on one of two workers."""
    os.environ |= {"NCCL_HOSTID": f"host{rank}", "GROUP_RANK": str(rank), "LOCAL_RANK": "0"}
    device = torch.device(device_name)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    shapes = scaled(resnet50_shapes(), scale)
    workers = Workers.from_world(timedelta(seconds=60), device)
    alone = Training(None, workers, shapes, device, width)
    alone.steps(PERIOD)
    without = alone.steps(PERIOD * PERIODS)
    say(rank, f"without syncs {1e3 * without:.2f} ms a step")
    rows = []
    for algorithm in (LocalSGD(PERIOD), SlowMo(sync_every=PERIOD)):
        times = []
        for overlap in (0, OVERLAP):
            training = Training(replace(algorithm, overlap=overlap), workers, shapes, device, width)
            training.steps(2 * PERIOD)
            times.append(training.steps(PERIOD * PERIODS))
            say(rank, f"{type(algorithm).__name__}, overlap={overlap}: {1e3 * times[-1]:.2f} ms a step")
        shares = profiled(training)
        synced, overlapped = times
        saved = (synced - overlapped) / (synced - without) if synced > without else float("nan")
        figures = [f"{1e3 * seconds_:.2f}" for seconds_ in (without, synced, overlapped)]
        parts = [f"{ms / PERIODS:.2f} ms, {share:.0%}" for ms, share in shares.values()] or ["-", "-"]
        rows.append([type(algorithm).__name__, *figures, f"{saved:.0%}", *parts])
    return rows


def say(rank: int, what: str) -> None:
    """Tell on standard error how far the measurement is."""
    if rank == 0:
        print(f"{time.strftime('%X')} {what}", file=sys.stderr, flush=True)


def profiled(training: Training) -> dict[str, tuple[float, float]]:
    """What lies under the computation in some periods; nothing on a CPU."""
    if training.device.type != "cuda":
        training.steps(PERIOD * PERIODS)
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        training.steps(PERIOD * PERIODS)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        return hidden_shares(json.loads(path.read_text()))


OVERLAP_HEADER = ["overlap", "no sync, ms a step", "sync", "overlapped", "of the syncs' time hidden"]
OVERLAP_HEADER += ["NCCL a sync, under computation", "packing a sync, under computation"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--scale", type=float, default=1.0, help="of the models' sizes")
    parser.add_argument("--only", choices=("offload", "overlap"), help="one of the two parts")
    parser.add_argument("--width", type=int, default=0, help="of the matrices of the computation")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    print(f"{torch.cuda.get_device_name(device) if on_gpu else 'CPU'}, torch {torch.__version__}\n", flush=True)
    if arguments.only != "overlap":
        report_offload(device, arguments.scale, arguments.repeats)
    if arguments.only != "offload":
        report_overlap(device, arguments.scale, arguments.width or (4096 if on_gpu else 256))


def report_offload(device: torch.device, scale: float, repeats: int) -> None:
    """Print what offload costs."""
    rows = []
    for title, shapes in (("25.6 M", resnet50_shapes()), ("302 M", transformer_shapes())):
        rows.append(offload_row(f"SlowMo, {title}", scaled(shapes, scale), device, repeats))
    print(table(OFFLOAD_HEADER, rows) + "\n", flush=True)
    if device.type == "cuda":
        torch.cuda.empty_cache()


def report_overlap(device: torch.device, scale: float, width: int) -> None:
    """Print what overlap hides."""
    environment = TWO_HOSTS_ON_ONE_CARD if device.type == "cuda" else {}
    first, _ = run_trainers(
        2, measure, str(device), scale, width, environment=environment, limit=240, expect_failure=False
    )
    print(table(OVERLAP_HEADER, first), flush=True)


if __name__ == "__main__":
    main()
