"""How long a step would take on your links, before you train: every preset beside DDP, from a simple model.

    python -m lightning_slowmo.plan --params 25.6e6 --step-ms 170 --workers 32 --bandwidth 1gbit --latency 0.2ms
    torchrun --nproc-per-node 4 -m lightning_slowmo.plan --measure --params 25.6e6

The model is the usual one of a latency and a bandwidth. With T the step of one worker alone, alpha the latency of a
message and beta the bandwidth, a communication of m messages after one another and B bytes takes ::

    t = m alpha + B / beta + compression + handling

where m and B are those of :mod:`lightning_slowmo.traffic`; a ring all-reduce of P bytes over n workers, say, has
m = 2 (n - 1) and B = 2 (n - 1) / n P. An algorithm that communicates every k steps takes T + t / k; if the messages
may travel behind d steps of computation, d T of their time is hidden. DDP sends a bucket of gradients as soon as the
backward pass has filled it, and waits for the last one. Computation is taken to be as fast while messages travel.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import Module

from lightning_slowmo.algorithms import Algorithm, LocalSGD, SlowMo
from lightning_slowmo.communication import Workers
from lightning_slowmo.communication.probe import Link, measure_link
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
from lightning_slowmo.engine import Engine
from lightning_slowmo.parameters import Scratch
from lightning_slowmo.presets import PRESETS
from lightning_slowmo.traffic import Sync, bytes_per_step, layout_of, state_numel, syncs

BACKWARD_SHARE = 0.6
"""Share of a step's computation that is the backward pass, behind which DDP sends."""

DDP_BUCKETS = (2**20, 25 * 2**20)
"""Bytes of DDP's first bucket of gradients, and of all others."""

SECONDS_HANDLED = 5e-9
"""Seconds per element for packing, an outer step and unpacking, on one core of a server (measured)."""

TENSORS = 160
"""Parameters of a model of which only the size is known, all of one size; ResNet-50 has 161."""

LONG = 12
"""Presets that by default wait at least so many steps take ``--sync-every``; the others keep their own."""

GOOD_ENOUGH = 1.1
"""A step that takes no more than so many times the computation alone leaves little to gain."""


@dataclass(frozen=True)
class Costs:
    """Seconds per element of a vector.

    Attributes:
        compress: to compress it.
        decompress: to decompress it.
    """

    compress: float
    decompress: float


COSTS: dict[type[Compressor], Costs] = {
    Identity: Costs(9e-9, 1e-9),
    Cast: Costs(3e-9, 1e-9),
    Sign: Costs(3e-9, 3e-9),
    QSGD: Costs(10e-9, 3.3e-9),
    TopK: Costs(7e-9, 2e-9),
    SignTopK: Costs(7e-9, 2e-9),
    RandomK: Costs(3.2e-9, 3.1e-9),
    CountSketch: Costs(6e-9, 30e-9),
}
"""What ``docs/compression.md`` has measured, with a nanosecond for copying an element (8 GB/s)."""


@dataclass(frozen=True)
class DDP:
    """DistributedDataParallel, for comparison.

    Args:
        element_bytes: bytes of a gradient's element on the wire: 4, or 2 with a bf16 hook.
        powersgd_rank: rank of PowerSGD's matrices; 0 for no such hook.
    """

    element_bytes: int = 4
    powersgd_rank: int = 0

    def wire_bytes(self, shape: Sequence[int]) -> int:
        """Bytes of one gradient on the wire."""
        numel = math.prod(shape)
        if self.powersgd_rank and len(shape) > 1:
            rows, columns = shape[0], numel // shape[0]
            rank = min(rows, columns, self.powersgd_rank)
            if 2 * (rows + columns) * rank < numel:  # the hook's min_compression_rate
                return 4 * (rows + columns) * rank
        return self.element_bytes * numel


@dataclass(frozen=True)
class Prediction:
    """What the model says of one way to train.

    Attributes:
        step: seconds per optimizer step.
        sent: bytes that a worker sends per step, the mean over workers.
        memory: bytes that a worker keeps beside parameters, gradients and the optimizer's state.
    """

    step: float
    sent: float
    memory: float


# The model ------------------------------------------------------------------------------------------------------------


def predict(
    way: Algorithm | DDP,
    shapes: Sequence[Sequence[int]],
    workers: int,
    step: float,
    link: Link,
    costs: Mapping[str, Costs] | None = None,
    handling: float = SECONDS_HANDLED,
) -> Prediction:
    """What a way to train would take.

    Args:
        way: a configuration, or DDP.
        shapes: of the parameters, float32.
        workers: how many.
        step: seconds of a step of one worker alone.
        link: of each worker.
        costs: of compressors, by their representation, where :data:`COSTS` is not to be used.
        handling: seconds per element of a sync's own work, compression aside.

    Raises:
        ValueError: if the algorithm is not known to :mod:`lightning_slowmo.traffic`, or does not fit the workers.
    """
    layout = layout_of(shapes)
    if isinstance(way, DDP):
        return _ddp(way, shapes, workers, step, link)
    if workers == 1:
        return Prediction(step, 0.0, 4.0 * state_numel(way, layout, 1))
    every = syncs(way, layout, workers)
    waits = 0.0
    for sync in every:
        hidden = min(transfer_seconds(sync, link), sync.behind * step)
        waits += (transfer_seconds(sync, link) - hidden + work_seconds(sync, costs, handling)) / sync.every
    scratch = 4 * Scratch().count * max((b.numel for b in layout.buckets if not b.in_place), default=0)
    return Prediction(step + waits, bytes_per_step(every), 4 * state_numel(way, layout, workers) + scratch)


def transfer_seconds(sync: Sync, link: Link) -> float:
    """Seconds that the messages of a communication travel."""
    return sync.messages * link.latency + 8 * sync.busiest / link.bandwidth


def work_seconds(sync: Sync, costs: Mapping[str, Costs] | None = None, handling: float = SECONDS_HANDLED) -> float:
    """Seconds of a worker's own work in a communication."""
    seconds = handling * sync.handled
    if sync.compressor is not None:
        cost = (costs or {}).get(repr(sync.compressor)) or COSTS[type(sync.compressor)]
        seconds += cost.compress * sync.compressed + cost.decompress * sync.decompressed
    return seconds


def _ddp(way: DDP, shapes: Sequence[Sequence[int]], workers: int, step: float, link: Link) -> Prediction:
    """Buckets of gradients in the order of the backward pass, each sent when it is full and the one before is through.

    A bucket is full when its share of all elements is: the backward pass takes as long for each element.
    """
    numel = sum(math.prod(shape) for shape in shapes)
    buckets: list[tuple[int, int]] = []  # elements done at its end, bytes on the wire
    done = size = wire = 0
    for shape in reversed(shapes):
        done += math.prod(shape)
        size += 4 * math.prod(shape)
        wire += way.wire_bytes(shape)
        if size >= DDP_BUCKETS[min(len(buckets), 1)]:
            buckets.append((done, wire))
            size = wire = 0
    if size:
        buckets.append((done, wire))
    messages = (3 if way.powersgd_rank else 1) * 2 * (workers - 1)
    end = (1 - BACKWARD_SHARE) * step
    backward, sent = BACKWARD_SHARE * step, 0.0
    if workers > 1:
        for done, wire in buckets:
            through = 2 * (workers - 1) / workers * wire
            ready = (1 - BACKWARD_SHARE) * step + backward * done / numel
            end = max(end, ready) + messages * link.latency + 8 * through / link.bandwidth
            sent += through
    flag = math.ceil(math.log2(workers)) * link.latency  # Lightning's broadcast before every batch
    return Prediction(max(step, end) + flag, sent, 4.0 * numel)


def at_period(algorithm: Algorithm, sync_every: int) -> Algorithm:
    """A configuration with another ``sync_every``, if by default it waits :data:`LONG` steps or more."""
    if getattr(algorithm, "sync_every", 0) < LONG:
        return algorithm
    changes: dict[str, Any] = {"sync_every": sync_every}
    if isinstance(getattr(algorithm, "base", None), LocalSGD):
        changes["base"] = None  # follows sync_every
    return replace(algorithm, **changes)  # type: ignore[type-var]


def plan(
    shapes: Sequence[Sequence[int]], workers: int, step: float, link: Link, sync_every: int | None = None
) -> dict[str, Prediction | str]:
    """DDP and all presets, by name; a text says why there is no prediction.

    Args:
        shapes: of the parameters.
        workers: how many.
        step: seconds of a step of one worker alone.
        link: of each worker.
        sync_every: optimizer steps between averages, see :func:`at_period`; None keeps the presets' own.
    """
    rows: dict[str, Prediction | str] = {"ddp": predict(DDP(), shapes, workers, step, link)}
    for name, preset in PRESETS.items():
        algorithm = preset if sync_every is None else at_period(preset, sync_every)
        try:
            rows[name] = predict(algorithm, shapes, workers, step, link)
        except ValueError as error:
            rows[name] = str(error)
    return rows


def recommend(shapes: Sequence[Sequence[int]], workers: int, step: float, link: Link, sync_every: int = 12) -> str:
    """What to do, in words.

    The order is that of how little training changes: DDP, local steps with slow momentum, fewer syncs, fewer bits.
    """
    ddp = predict(DDP(), shapes, workers, step, link).step
    if workers == 1:
        return "There is one worker: nothing to communicate."
    if ddp <= GOOD_ENOUGH * step:
        return f"Stay with ddp: it takes {ddp / step:.2f} times the computation, so there is little to gain."
    slowmo = at_period(PRESETS["slowmo"], sync_every)
    takes = predict(slowmo, shapes, workers, step, link).step
    if takes <= GOOD_ENOUGH * step:
        text = f"Use slowmo with sync_every={sync_every}: {ddp / takes:.1f} times as fast as ddp"
        return f"{text}, {takes / step:.2f} times the computation."
    text = f"slowmo with sync_every={sync_every} takes {takes / step:.2f} times the computation"
    text += f" ({ddp / takes:.1f} times as fast as ddp)" if ddp > takes else ", more than ddp"
    quantized = predict(at_period(PRESETS["qprsgd"], sync_every), shapes, workers, step, link).step
    needed = math.ceil(sync_every * (takes - step) / ((GOOD_ENOUGH - 1) * step))
    text += f"; {GOOD_ENOUGH:g} times would need sync_every={needed}."
    if quantized < takes:
        text += f" qprsgd, which sends 4 bits an element, takes {quantized / step:.2f} times at {sync_every}."
    if quantized > GOOD_ENOUGH * step:
        text += " At such a period expect to tune: diloco is made for hundreds of steps between syncs."
    return text


# What is measured -----------------------------------------------------------------------------------------------------


def measure_costs(compressor: Compressor, numel: int = 2**20, repeats: int = 5) -> Costs:
    """Seconds per element of a compressor on this processor, the median of some repeats."""
    flat = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    generator = seeded_generator(0, 0)
    times: list[tuple[float, float]] = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        payload = compressor.compress(flat, None, generator)
        middle = time.perf_counter()
        compressor.decompress(payload, (numel,))
        times.append((middle - start, time.perf_counter() - middle))
    compress, decompress = (statistics.median(column) / numel for column in zip(*times[1:], strict=True))
    return Costs(compress, decompress)


def measure_handling(numel: int = 2**21, repeats: int = 5) -> float:
    """Seconds per element of a slow update on this processor, all but the messages: the median of some repeats."""
    parameters = [torch.nn.Parameter(torch.zeros(numel // 8)) for _ in range(8)]
    engine = Engine(SlowMo(sync_every=1), [torch.optim.SGD(parameters, lr=0.1)], Workers())
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        engine.after_step()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) / numel


def measure_step(step: Callable[[], Any], workers: Workers, repeats: int = 10) -> float:
    """Seconds of a training step, the mean over workers that all take it at once; the same on all of them."""
    times = []
    for repeat in range(repeats + 2):
        workers.gather([0.0], "the beginning of a measured step")
        start = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if repeat >= 2:  # the first ones allocate
            times.append(time.perf_counter() - start)
    everyone = workers.gather([statistics.median(times)], "a measured step")
    return statistics.mean(row[0] for row in everyone)


def synthetic(params: float, batch: int = 32) -> tuple[Module, Callable[[], Any]]:
    """A stack of square dense layers of about so many parameters, and a training step of it."""
    width = max(8, min(1024, int(math.sqrt(params))))
    layers = [torch.nn.Linear(width, width) for _ in range(max(1, round(params / (width * width + width))))]
    model = torch.nn.Sequential(*(module for layer in layers for module in (layer, torch.nn.ReLU())))
    optimizer, inputs = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9), torch.randn(batch, width)

    def step() -> None:
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()

    return model, step


# Units ----------------------------------------------------------------------------------------------------------------


def parse_bandwidth(text: str) -> float:
    """Bits per second from ``1gbit``, ``100mbit``, ``10Gbit/s``.

    Raises:
        ValueError: if it is anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)([kmgt]?)bit(?:/s)?", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise ValueError(f"{text!r} is no bandwidth: write 100mbit, 1gbit or 10Gbit/s.")
    return float(match[1]) * 1000 ** " kmgt".index(match[2].lower() or " ")


def parse_seconds(text: str) -> float:
    """Seconds from ``0.2ms``, ``50us``, ``1s``.

    Raises:
        ValueError: if it is anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e-?\d+)?)(us|ms|s)", text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no duration: write 0.2ms, 50us or 1s.")
    return float(match[1]) * {"us": 1e-6, "ms": 1e-3, "s": 1.0}[match[2]]


def parse_count(text: str) -> float:
    """A number of parameters from ``25.6e6``, ``25.6M``, ``1.5B``, ``25557032``.

    Raises:
        ValueError: if it is anything else, or less than 1.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)([KMB]?)", text.strip(), re.IGNORECASE)
    number = float(match[1]) * {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9}[match[2].lower()] if match else 0.0
    if number < 1:
        raise ValueError(f"{text!r} is no number of parameters: write 25.6e6, 25.6M or 1.5B.")
    return number


def shapes_of(params: float) -> list[tuple[int, ...]]:
    """Shapes of a model of which only the size is known: :data:`TENSORS` matrices, as nearly square as may be."""
    each = max(1, round(params / TENSORS))
    side = max(1, round(math.sqrt(each)))
    count = max(1, round(params / (side * side)))
    return [(side, side)] * count


# The command ----------------------------------------------------------------------------------------------------------


def table(rows: Mapping[str, Prediction | str], step: float) -> str:
    """Predictions as Markdown."""
    ddp = rows["ddp"]
    assert isinstance(ddp, Prediction)
    lines = [["strategy", "ms / step", "÷ computation", "speed-up over ddp", "MB sent / step", "extra memory, MB"]]
    lines.append(["---"] * len(lines[0]))
    notes = []
    for name, row in rows.items():
        if isinstance(row, str):
            notes.append(f"`{name}`: {row}")
            continue
        cells = [f"{1e3 * row.step:.1f}", f"{row.step / step:.2f}", f"{ddp.step / row.step:.2f}"]
        lines.append([f"`{name}`", *cells, f"{row.sent / 1e6:.4g}", f"{row.memory / 1e6:.4g}"])
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), *notes])


def load(path: str) -> Any:
    """What ``module:function`` names.

    Raises:
        ValueError: if there is no such function.
    """
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{path!r} cannot be found, it must be module:function: {error}") from error


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    arguments = argparse.ArgumentParser(
        "python -m lightning_slowmo.plan", description="How long a training step would take under each strategy."
    )

    def checked(parse: Callable[[str], float]) -> Callable[[str], float]:
        def read(text: str) -> float:
            try:
                return parse(text)
            except ValueError as error:
                raise argparse.ArgumentTypeError(str(error)) from None

        return read

    arguments.add_argument("--params", type=checked(parse_count), help="number of parameters, such as 25.6e6 or 25.6M")
    arguments.add_argument("--step-ms", type=float, help="milliseconds of a training step on one worker alone")
    arguments.add_argument("--workers", type=int, help="how many; with --measure, as many as are running by default")
    arguments.add_argument("--bandwidth", type=checked(parse_bandwidth), help="of each worker's link, such as 1gbit")
    arguments.add_argument("--latency", type=checked(parse_seconds), help="of a message, such as 0.2ms (default)")
    arguments.add_argument("--sync-every", type=int, help="steps between averages, for presets that wait 12 or more")
    arguments.add_argument("--measure", action="store_true", help="under torchrun: measure what is not given")
    arguments.add_argument(
        "--step", metavar="MODULE:FUNCTION", help="with --measure: a function that returns a model and a training step"
    )
    arguments.add_argument("--json", action="store_true", help="print JSON")
    return arguments


def main(command: Sequence[str] | None = None) -> None:
    """Plan, as the command line says."""
    reader = parser()
    given = reader.parse_args(command)
    link, step, workers, shapes = given.latency, given.step_ms, given.workers, None
    needed = ["params"] if given.measure and not given.step else []
    needed = needed or ([] if given.measure else ["params", "step_ms", "workers", "bandwidth"])
    missing = [f"--{name.replace('_', '-')}" for name in needed if getattr(given, name) is None]
    if missing:
        reader.error(f"{' and '.join(missing)} must be given{'' if given.measure else ', or --measure under torchrun'}")
    if given.step and not given.measure:
        reader.error("--step needs --measure")
    for name, least in (("step_ms", 0), ("workers", 1), ("sync_every", 1)):
        value = getattr(given, name)
        if value is not None and (value < least or value == 0):
            reader.error(f"--{name.replace('_', '-')} must be {'above 0' if not least else 'at least 1'}, got {value}")
    if given.measure:
        measured = _measure(reader, given)
        if measured is None:
            return
        shapes, step, link, workers = measured
    else:
        shapes, step = shapes_of(given.params), given.step_ms / 1e3
        link = Link(given.bandwidth, 2e-4 if given.latency is None else given.latency)
    rows = plan(shapes, workers, step, link, given.sync_every)
    advice = recommend(shapes, workers, step, link, given.sync_every or 12)
    numel = sum(math.prod(shape) for shape in shapes)
    if given.json:
        known = {name: asdict(row) if isinstance(row, Prediction) else row for name, row in rows.items()}
        link_values = {field.name: getattr(link, field.name) for field in fields(link)}
        inputs = {"params": numel, "step": step, "workers": workers, **link_values}
        print(json.dumps({"inputs": inputs, "predicted": known, "recommendation": advice}, indent=2))
        return
    print(f"{numel:,} parameters, {1e3 * step:.1f} ms of computation a step, {workers} workers,")
    print(f"{link.bandwidth / 1e6:.4g} Mbit/s, {1e3 * link.latency:.3g} ms a message: predicted")
    print(f"\n{table(rows, step)}\n\n{advice}")


def _measure(
    reader: argparse.ArgumentParser, given: argparse.Namespace
) -> tuple[list[tuple[int, ...]], float, Link, int] | None:
    """Measure what is not given; None on all workers but the first."""
    if not dist.is_torchelastic_launched():
        reader.error("--measure needs torchrun: torchrun --nproc-per-node 4 -m lightning_slowmo.plan --measure ...")
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    try:
        workers = Workers.from_world()
        model, step = load(given.step)() if given.step else synthetic(given.params)
        shapes = [tuple(parameter.shape) for parameter in model.parameters() if parameter.requires_grad]
        if not given.step:
            shapes = shapes_of(given.params)
        seconds = measure_step(step, workers) if given.step_ms is None else given.step_ms / 1e3
        if given.bandwidth is not None and given.latency is not None:
            link = Link(given.bandwidth, given.latency)
        else:
            measured = measure_link(workers)
            link = Link(
                given.bandwidth or measured.bandwidth, measured.latency if given.latency is None else given.latency
            )
        return (shapes, seconds, link, given.workers or workers.size) if workers.rank == 0 else None
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
