"""Training over slow links: step time, traffic and accuracy of every strategy, beside DDP and beside computing alone.

    sudo python -m benchmarks.slow_links                                        # 4 hosts, 100 Mbit/s, every row
    sudo python -m benchmarks.slow_links --rate 10mbit --hosts 8 --strategies ddp slowmo
    sudo python -m benchmarks.slow_links --strategies ddp slowmo --seconds 300 --data cifar10.tar.xz
    sudo python -m benchmarks.slow_links --strategies ddp slowmo --steps 1000 --rate 10gbit --data cifar10.tar.xz

Hosts are network namespaces of this machine, see :mod:`benchmarks.network`; the same LightningModule runs through the
Trainer under each strategy. ``compute`` trains every worker alone, all at once, so it is the computation that the
others do too, on the same share of the machine. Rows alternate within a run, and ratios are taken within it.

* ms and MB per step: after a warm-up, whole periods of traffic; medians over periods and runs. MB are what a host's
  interface has sent, headers of all protocols included.
* "÷ compute" is the step time in units of the compute-only step, "ddp ÷" how often a row's step fits in one of DDP's,
  and "÷ limit" in units of the compute-only step plus the time that the row's MB take at the nominal rate, none of it
  hidden.
* "predicted ÷" is what ``lightning_slowmo.plan`` expects, given the compute-only step and the measured link.
* ``--seconds`` and ``--steps`` also train for so long, and test now and then (which does not count as time).

Writes ``.json``, ``.md`` and ``.png``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import signal
import statistics
import sys
import tempfile
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import images
from benchmarks.contenders import ROWS, Setting
from benchmarks.network import Network, Unavailable, check, enter, interface_bytes
from benchmarks.processes import WorkerFailed, run_trainers
from lightning_slowmo.communication.probe import Link
from lightning_slowmo.plan import (
    DDP,
    SECONDS_HANDLED,
    Costs,
    measure_costs,
    measure_handling,
    parse_bandwidth,
    predict,
)
from lightning_slowmo.traffic import layout_of, syncs

EVALUATIONS = 10
"""How often a run for accuracy is tested."""

LEAST_WARMUP = 4
"""Steps that are not measured, at least: whole periods of those rows that have one."""


CALM = 1e-6
"""The learning rate where only time is measured, which it does not change: nothing diverges at it."""


@dataclass(frozen=True)
class Job:
    """One run of the Trainer on all hosts.

    Attributes:
        name: of the row.
        setting: of all rows.
        steps: how many.
        evaluate_every: steps between tests; 0 for none.
        batch: examples per worker and step.
        lr: largest learning rate.
        seed: of model and data.
        test_images: how many of them.
    """

    name: str
    setting: Setting
    steps: int
    evaluate_every: int = 0
    batch: int = 8
    lr: float = 1e-3
    seed: int = 0
    test_images: int = 2000


@dataclass
class Outcome:
    """What a worker has seen.

    Attributes:
        marks: at the end of each step: seconds of training and bytes sent at the interface so far.
        tests: steps, seconds of training, right answers, and questions at each test.
    """

    marks: list[tuple[float, int]] = field(default_factory=list)
    tests: list[tuple[int, float, int, int]] = field(default_factory=list)


# On the hosts ---------------------------------------------------------------------------------------------------------


def train(rank: int, namespaces: list[str], folder: str, job: Job, progress: Any) -> Outcome:
    """Train on one host."""
    enter(namespaces[rank])
    import lightning as L
    import torch

    from benchmarks.images import Batches, Classifier, TestShare, loader

    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    size, path = len(namespaces), Path(folder)
    outcome = Outcome()
    questions = TestShare(path, rank, size, job.test_images)

    class Clock(L.Callback):
        """Seconds and bytes of training; those of validation are left out."""

        seconds, sent = 0.0, 0
        began: tuple[float, int] | None = None

        def now(self) -> tuple[float, int]:
            assert self.began is not None
            return self.seconds + time.perf_counter() - self.began[0], self.sent + interface_bytes()[0] - self.began[1]

        def on_train_batch_start(self, *_: Any) -> None:
            if self.began is None:
                self.began = time.perf_counter(), interface_bytes()[0]

        def on_train_batch_end(self, *_: Any) -> None:
            outcome.marks.append(self.now())
            if rank == 0:
                progress.send(len(outcome.marks))

        def on_validation_start(self, *_: Any) -> None:
            self.seconds, self.sent = self.now()
            self.began = None

        def on_validation_end(self, trainer: L.Trainer, module: Classifier) -> None:  # type: ignore[override]
            outcome.tests.append((len(outcome.marks), self.seconds, module.right[-1], len(questions.labels)))

    row = ROWS[job.name](job.setting)
    torch.manual_seed(job.seed)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=size,
        strategy=row.strategy(),
        max_steps=job.steps,
        max_epochs=-1,
        val_check_interval=job.evaluate_every or None,
        check_val_every_n_epoch=None,
        limit_val_batches=None if job.evaluate_every else 0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Clock()],
    )
    data = loader(Batches(path, rank, size, job.batch, job.seed))
    module = Classifier(
        job.lr if job.evaluate_every else CALM, job.steps if job.evaluate_every else None, job.seed, row.plain
    )
    trainer.fit(module, data, loader(questions) if job.evaluate_every else None)
    return outcome


def calibrate(rank: int, namespaces: list[str], compressors: Sequence[Any]) -> tuple[Link, dict[str, Costs], float]:
    """The link, and seconds per element of each compressor and of a sync, with all hosts at work at once."""
    enter(namespaces[rank])
    from datetime import timedelta

    import torch.distributed as dist

    from lightning_slowmo import Workers
    from lightning_slowmo.communication.probe import measure_link

    dist.init_process_group("gloo", rank=rank, world_size=len(namespaces), timeout=timedelta(seconds=60))
    workers = Workers.from_world(timedelta(seconds=60))
    link = measure_link(workers)
    workers.gather([0.0])
    costs = {repr(compressor): measure_costs(compressor) for compressor in compressors}
    workers.gather([0.0])
    return link, costs, measure_handling()


# From the marks to a table --------------------------------------------------------------------------------------------


def windows(marks: Sequence[tuple[float, int]], warmup: int, period: int) -> tuple[list[float], float]:
    """Seconds per step of each whole period after the warm-up, and bytes per step over all of them."""
    ends = list(range(warmup - 1, len(marks), period))
    if len(ends) < 2:
        raise ValueError(f"{len(marks)} steps hold no period of {period} after {warmup} of warm-up.")
    seconds = [(marks[end][0] - marks[start][0]) / period for start, end in itertools.pairwise(ends)]
    return seconds, (marks[ends[-1]][1] - marks[ends[0]][1]) / (ends[-1] - ends[0])


def warmup_of(period: int) -> int:
    """Whole periods of at least :data:`LEAST_WARMUP` steps."""
    return -(-LEAST_WARMUP // period) * period


def steps_for(budget: float, period: int, step: float) -> int:
    """Steps to measure for about ``budget`` seconds: a warm-up and whole periods, 2 at least (3 of single steps)."""
    count = max(2 if period > 1 else 3, min(60, round(budget / (period * step))))
    return warmup_of(period) + count * period


def measure(outcomes: Sequence[Outcome], period: int) -> tuple[float, float]:
    """Seconds and bytes per step: the median over periods of the mean over workers, and the mean over workers."""
    by_worker = [windows(outcome.marks, warmup_of(period), period) for outcome in outcomes]
    seconds = [statistics.mean(column) for column in zip(*(seconds for seconds, _ in by_worker), strict=True)]
    return statistics.median(seconds), statistics.mean(sent for _, sent in by_worker)


def curve(outcomes: Sequence[Outcome]) -> list[tuple[int, float, float]]:
    """Steps, seconds and accuracy in percent at each test."""
    points = []
    for tests in zip(*(outcome.tests for outcome in outcomes), strict=True):
        right, asked = sum(test[2] for test in tests), sum(test[3] for test in tests)
        points.append((tests[0][0], statistics.mean(test[1] for test in tests), 100 * right / asked))
    return points


def summarize(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One row of numbers per strategy; what was not measured is None.

    Args:
        result: what :func:`main` writes as JSON.
    """
    timings, rows = result["timings"], []
    compute, ddp = timings.get("compute"), timings.get("ddp")

    def ratio(of: Sequence[float], to: Sequence[float] | None) -> float | None:
        # In the middle of a run, some rows have been timed once more than others.
        return statistics.median(a / b for a, b in zip(of, to, strict=False)) if to else None

    for name in dict.fromkeys([*timings, *result["accuracy"]]):
        row: dict[str, Any] = {"strategy": name}
        if name in timings:
            seconds, sent = timings[name]["seconds"], timings[name]["bytes"]
            row["ms"], row["mb"] = 1e3 * statistics.median(seconds), statistics.median(sent) / 1e6
            row["to_compute"] = ratio(seconds, compute and compute["seconds"])
            row["ddp_to"] = ratio(ddp["seconds"], seconds) if ddp else None
            row["mb_to_ddp"] = ratio(sent, ddp and ddp["bytes"])
            if compute:
                pairs = zip(compute["seconds"], sent, strict=False)
                row["to_limit"] = ratio(seconds, [alone + 8 * each / result["rate"] for alone, each in pairs])
        predicted = result["predicted"].get(name)
        if predicted and row.get("ms"):
            row["predicted_to"] = predicted * 1e3 / row["ms"]
        if name in result["accuracy"]:
            row["steps"], row["seconds"], row["accuracy"] = result["accuracy"][name][-1]
        rows.append(row)
    return rows


COLUMNS = {
    "ms": ("ms / step", "{:.0f}"),
    "to_compute": ("÷ compute", "{:.2f}"),
    "to_limit": ("÷ limit", "{:.3f}"),
    "ddp_to": ("ddp ÷", "{:.1f}"),
    "mb": ("MB / step", "{:.4g}"),
    "mb_to_ddp": ("÷ ddp's", "{:.4f}"),
    "predicted_to": ("predicted ÷", "{:.2f}"),
    "steps": ("steps", "{:.0f}"),
    "seconds": ("seconds", "{:.0f}"),
    "accuracy": ("accuracy, %", "{:.1f}"),
}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as Markdown, without columns that nobody has."""
    used = {key: column for key, column in COLUMNS.items() if any(row.get(key) is not None for row in rows)}
    lines = [["strategy", *(title for title, _ in used.values())], ["---"] * (len(used) + 1)]
    for row in rows:
        cells = ["" if row.get(key) is None else form.format(row[key]) for key, (_, form) in used.items()]
        lines.append([f"`{row['strategy']}`", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def heading(result: dict[str, Any]) -> str:
    """What was measured, in one line."""
    link = result["link"]
    text = f"{result['hosts']} hosts, {result['rate'] / 1e6:g} Mbit/s"
    text += f" (measured {link['bandwidth'] / 1e6:.4g} Mbit/s, {1e3 * link['latency']:.2g} ms a message)"
    text += f", buckets of {result['burst_ms']:g} ms" if result["burst_ms"] != 1 else ""
    return f"{text}, sync_every={result['sync_every']}, {result['runs']} run{'s' * (result['runs'] != 1)}"


KINDS = {"no communication": "#808080", "torch's own": "#D55E00", "this package": "#0072B2"}
"""What bars stand for, and their colours."""


def _colour(name: str) -> str:
    """The colour of a strategy's bars."""
    own = "ddp" not in name and name != "periodic_averaging"
    return KINDS["no communication" if name == "compute" else "this package" if own else "torch's own"]


def draw(result: dict[str, Any], path: Path) -> None:
    """Bars of step times and traffic, and curves of accuracy if there are any."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    rows = [row for row in summarize(result) if "ms" in row]
    accuracy = result["accuracy"]
    panels = (2 if rows else 0) + (1 if accuracy else 0)
    figure = Figure(figsize=(4.6 * panels, max(3.2, 0.27 * len(rows) + 1.2)), layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    figure.suptitle(textwrap.fill(heading(result), 70 * panels), fontsize=9)
    if rows:
        names = [row["strategy"] for row in rows]
        compute = next((row["ms"] for row in rows if row["strategy"] == "compute"), None)
        for axis, key, label in ((axes.pop(0), "ms", "ms per step"), (axes.pop(0), "mb", "MB per step and host")):
            values = [row[key] for row in rows]
            axis.barh(names, values, color=[_colour(name) for name in names])
            axis.set_ylim(len(names) - 0.4, -0.6)
            axis.set_xlabel(label)
            axis.tick_params(labelsize=8)
            for index, value in enumerate(values):
                text = f" {value:.0f}" if key == "ms" else f" {value:.2g}" if value > 1e-4 else " 0"
                axis.annotate(text, (max(value, 1e-3), index), va="center", fontsize=7)
            if key == "ms":
                axis.set_xlim(0, 1.15 * max(values))
                if compute is not None:
                    axis.axvline(compute, color="C7", linewidth=0.8, linestyle="--")
            else:
                axis.set(xscale="log", xlim=(1e-3, 4 * max(*values, 1e-2)), yticklabels=[])
        shown = [kind for kind in KINDS if any(_colour(name) == KINDS[kind] for name in names)]
        keys = [Patch(color=KINDS[kind], label=kind) for kind in shown]
        if compute is not None:
            keys.append(Line2D([], [], color="C7", linewidth=0.8, linestyle="--", label="its time"))
        figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), fontsize=8, frameon=False)
    if accuracy:
        axis = axes.pop(0)
        for index, (name, points) in enumerate(accuracy.items()):
            by = [point[1] if result["seconds"] else point[0] for point in points]
            axis.plot(by, [point[2] for point in points], "o-", color=f"C{index % 10}", markersize=3, label=name)
        axis.set(xlabel="seconds of training" if result["seconds"] else "steps", ylabel="test accuracy, %")
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=130)


# The whole ------------------------------------------------------------------------------------------------------------


class Bench:
    """Runs jobs on a network and shows how far they are.

    Args:
        network: the hosts.
        folder: where the images are.
    """

    def __init__(self, network: Network, folder: str) -> None:
        self.network = network
        self.folder = folder
        self.namespaces = [network.name(host) for host in range(network.hosts)]
        self.environment = {"MASTER_ADDR": network.address(0), "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}

    def call(self, function: Callable, *arguments: Any, limit: float) -> list[Any]:
        """Call a function on every host."""
        return run_trainers(
            self.network.hosts,
            function,
            self.namespaces,
            *arguments,
            environment=self.environment,
            limit=limit,
        )

    def train(self, job: Job, expected: float, bar: tqdm) -> list[Outcome]:
        """Run a job that is expected to take so many seconds; it is given five times as many, and some more."""
        receiver, sender = Pipe(duplex=False)
        bar.set_description(job.name)

        def follow() -> None:
            try:
                while True:
                    bar.set_postfix_str(f"step {receiver.recv()}/{job.steps}")
            except EOFError:
                pass

        follower = threading.Thread(target=follow, daemon=True)
        follower.start()
        try:
            outcomes = self.call(train, self.folder, job, sender, limit=5 * expected + 120)
        finally:
            sender.close()
        follower.join(5)
        bar.update()
        return outcomes

    def attempt(self, job: Job, expected: float, bar: tqdm, result: dict[str, Any]) -> list[Outcome] | None:
        """Run a job; if it fails, note that, forget the row, and let the others go on."""
        if job.name in result["failed"]:
            bar.update()
            return None
        try:
            return self.train(job, expected, bar)
        except WorkerFailed as error:
            if job.name == "compute":
                raise
            bar.write(f"{job.name} failed:\n{error}", file=sys.stderr)
            result["failed"][job.name] = str(error)
            result["timings"].pop(job.name, None)
            bar.update()
            return None

    def calibrate(self, compressors: Sequence[Any]) -> tuple[Link, dict[str, Costs], float]:
        """The link, the same for all hosts, and what compressors and a sync cost, on average."""
        outcomes = self.call(calibrate, compressors, limit=120)
        costs = {}
        for name in outcomes[0][1]:
            each = [vars(by_name[name]) for _, by_name, _ in outcomes]
            costs[name] = Costs(*(statistics.mean(c[key] for c in each) for key in ("compress", "decompress")))
        return outcomes[0][0], costs, statistics.mean(handling for _, _, handling in outcomes)


def model_shapes() -> list[tuple[int, ...]]:
    """The shapes of the model's parameters."""
    from benchmarks.images import Classifier

    return [tuple(parameter.shape) for parameter in Classifier().parameters()]


def compressors_of(names: Sequence[str], setting: Setting, hosts: int) -> list[Any]:
    """What the rows compress with, each once."""
    found: dict[str, Any] = {}
    layout = layout_of(model_shapes())
    for name in names:
        with suppress(ValueError):  # rows that the plan does not know, or that do not fit the hosts
            planned = ROWS[name](setting).planned
            for sync in [] if isinstance(planned, DDP) else syncs(planned, layout, hosts):
                if sync.compressor is not None:
                    found[repr(sync.compressor)] = sync.compressor
    return list(found.values())


def expected_steps(
    names: Sequence[str],
    setting: Setting,
    hosts: int,
    step: float,
    link: Link,
    costs: dict[str, Costs],
    handling: float = SECONDS_HANDLED,
) -> dict[str, float]:
    """Predicted seconds per step of the rows that the plan knows, and that fit the hosts."""
    shapes, predicted = model_shapes(), {}
    for name in names:
        with suppress(ValueError):
            predicted[name] = predict(ROWS[name](setting).planned, shapes, hosts, step, link, costs, handling).step
    return predicted


def run(bench: Bench, names: Sequence[str], arguments: argparse.Namespace, bar: tqdm) -> dict[str, Any]:
    """All jobs; what they gave, for JSON."""
    setting, hosts = Setting(arguments.sync_every), bench.network.hosts
    base = Job("compute", setting, 0, batch=arguments.batch, lr=arguments.lr, seed=arguments.seed)
    bar.set_description("calibrating")
    link, costs, handling = bench.calibrate(compressors_of(names, setting, hosts))
    result: dict[str, Any] = {"hosts": hosts, "rate": bench.network.rate, "link": asdict(link), "handling": handling}
    result |= {"sync_every": setting.sync_every, "runs": arguments.runs, "batch": arguments.batch}
    result["burst_ms"] = arguments.burst_ms
    result |= {"seconds": arguments.seconds, "timings": {}, "accuracy": {}, "predicted": {}, "failed": {}}
    result["costs"] = {name: asdict(cost) for name, cost in costs.items()}
    step, predicted = arguments.guess, {}
    for _ in range(arguments.runs):
        for name in names:
            row = ROWS[name](setting)
            expected = predicted.get(name) or step + 8 * 13e6 / link.bandwidth
            job = replace(base, name=name, steps=steps_for(arguments.budget, row.period, expected))
            outcomes = bench.attempt(job, job.steps * expected, bar, result)
            if outcomes is None:
                continue
            seconds, sent = measure(outcomes, row.period)
            timing = result["timings"].setdefault(name, {"seconds": [], "bytes": []})
            timing["seconds"].append(seconds)
            timing["bytes"].append(sent)
            if name == "compute":
                step = statistics.median(timing["seconds"])
                predicted = expected_steps(names, setting, hosts, step, link, costs, handling)
            result["predicted"] = predicted
            write(result, arguments.out)
    if arguments.seconds or arguments.steps:
        for name in [name for name in names if name in result["timings"] and name != "compute"]:
            row = ROWS[name](setting)
            takes = statistics.median(result["timings"][name]["seconds"])
            wanted = arguments.steps or arguments.seconds / takes
            every = max(1, round(wanted / EVALUATIONS / row.period)) * row.period
            steps = max(1, round(wanted / every)) * every
            longer = replace(setting, warmup_steps=max(1, steps // 5))
            job = replace(base, name=name, setting=longer, steps=steps, evaluate_every=every)
            job = replace(job, test_images=arguments.test_images)
            outcomes = bench.attempt(job, 2 * steps * takes, bar, result)
            if outcomes is not None:
                result["accuracy"][name] = curve(outcomes)
                write(result, arguments.out)
    return result


def write(result: dict[str, Any], path: Path) -> str:
    """Write what is known so far as JSON and Markdown; returns the latter."""
    failed = f"\nFailed: {', '.join(result['failed'])}.\n" if result["failed"] else ""
    text = f"{heading(result)}\n\n{table(summarize(result))}\n{failed}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(result, indent=1))
    path.with_suffix(".md").write_text(text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=parse_bandwidth, default=100e6, help="of each link, such as 10mbit or 1gbit")
    parser.add_argument(
        "--burst-ms", type=float, default=1.0, help="size of the links' token buckets, as their traffic"
    )
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--strategies", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--sync-every", type=int, default=12, help="steps between averages")
    parser.add_argument("--runs", type=int, default=3, help="how often each row is timed")
    parser.add_argument("--budget", type=float, default=6.0, help="seconds of steps to measure, per row and run")
    parser.add_argument("--seconds", type=float, default=0.0, help="train so long, for accuracy at equal time")
    parser.add_argument("--steps", type=int, default=0, help="train so many steps, for accuracy at equal steps")
    parser.add_argument("--data", type=Path, help="a tar of JPEG files by class; generated images if left out")
    parser.add_argument("--batch", type=int, default=8, help="examples per worker and step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--guess", type=float, default=0.15, help="seconds of a compute-only step, before it is known")
    parser.add_argument("--out", type=Path, default=Path("slow_links"), help="results, without a suffix")
    arguments = parser.parse_args()
    if arguments.hosts < 2 or arguments.runs < 1 or (arguments.seconds and arguments.steps):
        parser.error("--hosts must be at least 2, --runs at least 1, and only one of --seconds and --steps be given")
    for number in (signal.SIGINT, signal.SIGTERM):  # so that the network is removed
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    os.environ |= {"TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}
    # Others are measured against computing alone, so that comes first.
    names = list(dict.fromkeys(["compute", *arguments.strategies]))
    accuracy = len(names) - 1 if arguments.seconds or arguments.steps else 0
    try:
        check()
        with (
            tempfile.TemporaryDirectory() as folder,
            Network(arguments.hosts, arguments.rate, arguments.burst_ms / 1e3) as network,
            tqdm(total=len(names) * arguments.runs + accuracy, dynamic_ncols=True) as bar,
        ):
            images.save(arguments.data, Path(folder))
            result = run(Bench(network, folder), names, arguments, bar)
    except Unavailable as error:
        sys.exit(f"error: {error}")
    print(write(result, arguments.out))
    draw(result, arguments.out.with_suffix(".png"))
    if result["failed"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
