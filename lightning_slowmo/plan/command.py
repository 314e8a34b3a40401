"""The command ``python -m lightning_slowmo.plan``: its arguments, and what it prints."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch.distributed as dist

from lightning_slowmo.algorithms.source import source
from lightning_slowmo.bucket_sizes import check_bucket_cap
from lightning_slowmo.communication import Workers
from lightning_slowmo.communication.probe import Link, measure_link
from lightning_slowmo.plan.advice import plan, recommend
from lightning_slowmo.plan.inside import inside
from lightning_slowmo.plan.measure import measure_step, synthetic
from lightning_slowmo.plan.model import Prediction
from lightning_slowmo.plan.units import parse_bandwidth, parse_bits, parse_count, parse_seconds, shapes_of
from lightning_slowmo.qsdp import QSDP

LATENCY = 2e-4
"""Seconds of a short message, there and back, where ``--latency`` is not given."""

Setting = tuple[list[tuple[int, ...]], float, Link, int]
"""Shapes of the parameters, seconds of a step, the link, and the number of workers."""


def table(rows: Mapping[str, Prediction | str], step: float, recommended: str | None = None) -> str:
    """Predictions as Markdown, the fastest first.

    Args:
        rows: predictions by name, ``"ddp"`` among them; a text says why there is none, and is added below the table.
        step: seconds of a step of one worker alone.
        recommended: name of the row to mark.
    """
    ddp = rows["ddp"]
    assert isinstance(ddp, Prediction)
    lines = [["", "strategy", "ms / step", "÷ computation", "speed-up over ddp", "GB sent / step", "extra memory, GB"]]
    lines.append(["---"] * len(lines[0]))
    predicted = {name: row for name, row in rows.items() if isinstance(row, Prediction)}
    for name, row in sorted(predicted.items(), key=lambda item: item[1].step):
        cells = [f"{1e3 * row.step:.1f}", f"{row.step / step:.2f}", f"{ddp.step / row.step:.2f}"]
        mark = "→" if name == recommended else ""
        lines.append([mark, f"`{name}`", *cells, f"{row.sent / 1e9:.4g}", f"{row.memory / 1e9:.4g}"])
    notes = [f"`{name}`: {row}" for name, row in rows.items() if isinstance(row, str)]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), *notes])


def load(path: str) -> Any:
    """Import the function that ``module:function`` names.

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

    def checked(parse: Callable[[str], Any]) -> Callable[[str], Any]:
        def read(text: str) -> Any:
            try:
                return parse(text)
            except ValueError as error:
                raise argparse.ArgumentTypeError(str(error)) from None

        return read

    arguments.add_argument("--params", type=checked(parse_count), help="number of parameters, such as 25.6e6 or 25.6M")
    arguments.add_argument("--step-ms", type=float, help="milliseconds of a training step on one worker alone")
    arguments.add_argument("--workers", type=int, help="how many; with --measure, as many as are running by default")
    arguments.add_argument("--bandwidth", type=checked(parse_bandwidth), help="of each worker's link, such as 1gbit")
    arguments.add_argument(
        "--latency", type=checked(parse_seconds), help="the round trip that ping shows, such as 0.2ms (default) or 0"
    )
    arguments.add_argument("--sync-every", type=int, help="steps between averages, for presets that wait 12 or more")
    arguments.add_argument("--bucket-cap-mb", type=float, help="size of messages in MiB, as the strategy's option")
    arguments.add_argument(
        "--shards", type=int, default=1, help="processes of a worker, each with a shard of the model"
    )
    arguments.add_argument(
        "--qsdp",
        metavar="WEIGHTS/GRADIENTS",
        type=checked(lambda text: QSDP(*parse_bits(text))),
        help="with --shards: bits of what FSDP2 sends inside a worker, such as 8/8 or 8/none",
    )
    arguments.add_argument("--measure", action="store_true", help="under torchrun: measure what is not given")
    arguments.add_argument(
        "--step", metavar="MODULE:FUNCTION", help="with --measure: a function that returns a model and a training step"
    )
    arguments.add_argument("--json", action="store_true", help="print JSON")
    return arguments


def run() -> None:
    """The command of the process's arguments; what is wrong with them is an error without a traceback."""
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")


def main(command: Sequence[str] | None = None) -> None:
    """Plan, as the command line says, and print it.

    Args:
        command: the arguments; by default those of the process.

    Raises:
        SystemExit: with status 2 and a message if an argument is wrong.
        ValueError: if ``--step`` names no function.
    """
    reader = parser()
    given = reader.parse_args(command)
    _check(reader, given)
    setting = _measured(reader, given) if given.measure else _given(given)
    if setting is None:
        return
    shapes, step, link, workers = setting
    rows = plan(shapes, workers, step, link, given.sync_every, given.bucket_cap_mb, given.shards)
    advice = recommend(
        shapes, workers, step, link, given.sync_every or 12, given.bucket_cap_mb, given.shards, given.qsdp
    )
    sharded = {} if given.shards == 1 else {"full precision": inside(shapes, given.shards)}
    if given.qsdp is not None:
        sharded[source(given.qsdp)] = inside(shapes, given.shards, given.qsdp)
    numel = sum(math.prod(shape) for shape in shapes)
    if given.json:
        known = {name: asdict(row) if isinstance(row, Prediction) else row for name, row in rows.items()}
        inputs = {"params": numel, "step": step, "workers": workers, "shards": given.shards, **asdict(link)}
        told: dict[str, Any] = {"recommendation": advice.text, "recommended": advice.name, "strategy": advice.strategy}
        if sharded:
            told["inside"] = {name: asdict(messages) for name, messages in sharded.items()}
        print(json.dumps({"inputs": inputs, "predicted": known, **told}, indent=2))
        return
    print(f"{numel:,} parameters, {1e3 * step:.1f} ms of computation a step, {workers} workers,")
    print(f"{link.bandwidth / 1e9:.4g} Gbit/s, {1e3 * link.latency:.3g} ms a message: predicted")
    if given.shards > 1:
        print(
            f"each worker {given.shards} shards that share its link; bytes and memory are those of one shard, and ddp"
        )
        print("averages the gradients of equal shards at every step (HSDP); inside a worker a shard sends")
        for name, messages in sharded.items():
            print(
                f"{messages.sent / 1e9:.4g} GB a step with {name}: {messages.gathered / 1e9:.4g} of weights, gathered "
                f"twice, and {messages.reduced / 1e9:.4g} of gradients"
            )
    print(f"\n{table(rows, step, advice.name)}\n\n{advice.text}\n\n{textwrap.indent(advice.written, ' ' * 4)}")


def _check(reader: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """Exit with a message if an argument is missing or out of its range."""
    needed = ["params", "step_ms", "workers", "bandwidth"]
    if given.measure:
        needed = [] if given.step else ["params"]
    missing = [f"--{name.replace('_', '-')}" for name in needed if getattr(given, name) is None]
    if missing:
        reader.error(f"{' and '.join(missing)} must be given{'' if given.measure else ', or --measure under torchrun'}")
    if given.step and not given.measure:
        reader.error("--step needs --measure")
    if given.step_ms is not None and not 0 < given.step_ms < math.inf:
        reader.error(f"--step-ms must be above 0 and finite, got {given.step_ms}")
    for name in ("workers", "sync_every", "shards"):
        value = getattr(given, name)
        if value is not None and value < 1:
            reader.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if given.qsdp is not None and given.shards == 1:
        reader.error("--qsdp needs --shards of at least 2: one shard alone sends nothing inside its worker")
    try:
        check_bucket_cap(given.bucket_cap_mb)
    except ValueError as error:
        reader.error(str(error).replace("bucket_cap_mb", "--bucket-cap-mb"))


def _given(given: argparse.Namespace) -> Setting:
    """The setting of which all is given."""
    link = Link(given.bandwidth, LATENCY if given.latency is None else given.latency)
    return shapes_of(given.params), given.step_ms / 1e3, link, given.workers


def _measured(reader: argparse.ArgumentParser, given: argparse.Namespace) -> Setting | None:
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
