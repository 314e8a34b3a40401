"""A rating at equal steps over bytes: a table with 95 % intervals, and a picture with the Pareto front."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite, sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.problems import Measure
from recipes.report.plots import PALETTE, STYLE

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t at 97.5 % for 1 to 10 degrees of freedom; the last one for more, too."""

MOST_NAMES = 8
"""More names than that cover one another."""

FEW = 0.1
"""Share of DDP's bytes up to which rows are held against it."""

Choice = tuple[float, float | None]
"""A rate, and a momentum if that was searched."""

_KEY = re.compile(r"(?P<row>[^|]+) \| rate (?P<rate>\S+)( \| momentum (?P<momentum>\S+))? \| seed (?P<seed>\d+)")


@dataclass(frozen=True)
class Entry:
    """A row of the table.

    Attributes:
        row: which of the benchmark's rows.
        inner: the optimizer inside.
        rate: the tuned one.
        momentum: the tuned one; None if it was not searched.
        values: rating by seed of the runs that did not diverge.
        diverged: how many did.
        mb: MB sent per worker.
        searched: ratings by held-out examples, by rate, or by rate and momentum.
        measure: what the ratings are.
    """

    row: str
    inner: str
    rate: float
    momentum: float | None
    values: Mapping[int, float]
    diverged: int
    mb: float
    searched: Mapping[str, float | None]
    measure: Measure

    @property
    def name(self) -> str:
        """What it is called: a row whose momentum was searched, too, stands beside the one whose was not."""
        return self.row if self.momentum is None else f"{self.row}, momentum searched"

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return fmean(self.values.values())

    @property
    def merit(self) -> float:
        """Higher if the mean is better."""
        return self.measure.merit(self.mean)

    @property
    def half(self) -> float:
        """Half the 95 % interval of the mean."""
        return half_interval(list(self.values.values()))


def half_interval(values: Sequence[float]) -> float:
    """Half the 95 % interval of a mean, by Student's t; NaN of a single value.

    Example:
        >>> round(half_interval([1.0, 2.0, 3.0]), 3)
        2.484
    """
    if len(values) < 2:
        return float("nan")
    return T_975[min(len(values) - 2, len(T_975) - 1)] * stdev(values) / sqrt(len(values))


def entries(known: Mapping[str, Sequence[float | None]], inner: Mapping[str, str], measure: Measure) -> list[Entry]:
    """The rows with final runs, best first; one whose momentum was searched is a row of its own.

    Args:
        known: rating, None if it diverged, and MB of each run, by its key.
        inner: the optimizer of each row.
        measure: what the ratings are.
    """
    finals: dict[tuple[str, bool], dict[Choice, dict[int, Sequence[float | None]]]] = {}
    searches: dict[tuple[str, bool], dict[Choice, float | None]] = {}
    for key, outcome in known.items():
        found = _KEY.match(key)
        assert found is not None
        momentum = float(found["momentum"]) if found["momentum"] else None
        row, choice = (found["row"], momentum is not None), (float(found["rate"]), momentum)
        if key.endswith("held out"):
            searches.setdefault(row, {})[choice] = outcome[0]
        else:
            finals.setdefault(row, {}).setdefault(choice, {})[int(found["seed"])] = outcome
    made = []
    for row, choices in finals.items():
        scores = searches.get(row, {})
        choice = max(choices, key=lambda each: measure.merit(scores.get(each)))
        runs = sorted(choices[choice].items())
        values = {seed: value for seed, (value, _) in runs if value is not None}
        if values:
            named = {
                " ".join(f"{x:g}" for x in each if x is not None): scores[each] for each in sorted(scores, key=str)
            }
            mb = fmean(sent for _, (value, sent) in runs if value is not None and sent is not None)
            diverged = len(runs) - len(values)
            made.append(Entry(row[0], inner[row[0]], *choice, values, diverged, mb, named, measure))
    return sorted(made, key=lambda entry: -entry.merit)


def front(rows: Sequence[Entry]) -> list[Entry]:
    """Those that no other one beats without sending more, from the fewest bytes on."""
    kept: list[Entry] = []
    for entry in sorted(rows, key=lambda entry: (entry.mb, -entry.merit)):
        if not kept or entry.merit > kept[-1].merit:
            kept.append(entry)
    return kept


def markdown(rows: Sequence[Entry], whole: float) -> str:
    """The table, with the front in bold.

    Args:
        rows: best first.
        whole: MB that are 100 %.
    """
    best, measure = {entry.name for entry in front(rows)}, rows[0].measure
    lines = [
        f"| | inside | rate | {measure.name} | MB sent per worker | % of `ddp` | seeds |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for e in rows:
        name = f"**{e.name}**" if e.name in best else e.name
        rate = f"{e.rate:g}" + ("" if e.momentum is None else f", momentum {e.momentum:g}")
        sent = f"{e.mb:.3g} | {100 * e.mb / whole:.3g}"
        seeds = f"{len(e.values)}" + (f", and {e.diverged} diverged" if e.diverged else "")
        mean, half = (f"{value:.{measure.digits}f}" for value in (e.mean, e.half))
        lines.append(f"| {name} | {e.inner} | {rate} | {mean} ± {half} | {sent} | {seeds} |")
    return "\n".join(lines)


def against(rows: Sequence[Entry], reference: Entry) -> list[str]:
    """By how much rows that send few bytes differ from the reference, seed by seed; best first."""
    lines = []
    for entry in rows:
        seeds = sorted(set(entry.values) & set(reference.values))
        if entry.mb > FEW * reference.mb or len(seeds) < 2:
            continue
        above = [entry.values[seed] - reference.values[seed] for seed in seeds]
        mean, half = (
            f"{value:{sign}.{entry.measure.digits}f}"
            for value, sign in ((fmean(above), "+"), (half_interval(above), ""))
        )
        lines.append(
            f"* {entry.name} ({100 * entry.mb / reference.mb:.2g} % of the bytes): {mean} ± {half}, {len(seeds)} seeds"
        )
    return lines


def as_csv(rows: Sequence[Entry]) -> str:
    """All rows with their numbers unrounded."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
        ["row", "inside", "rate", "momentum", "mean", "half_interval", "mb_sent", "seeds", "values", "searched"]
    )
    for e in rows:
        seeds, values = " ".join(map(str, e.values)), " ".join(f"{value:g}" for value in e.values.values())
        searched = "; ".join(f"{choice}: {score}" for choice, score in e.searched.items())
        writer.writerow([e.name, e.inner, e.rate, e.momentum, e.mean, e.half, e.mb, seeds, values, searched])
    return file.getvalue()


def highlights(rows: Sequence[Entry]) -> list[str]:
    """DDP, the ends of the front, and what gains most on what sends less."""
    best = front(rows)
    gains = {after.name: after.merit - before.merit for before, after in pairwise(best)}
    ddp = [entry.name for entry in rows if entry.row == "ddp"]
    order = [*ddp, best[-1].name, best[0].name, *sorted(gains, key=lambda name: -gains[name])]
    return list(dict.fromkeys(order))[:MOST_NAMES]


def picture(rows: Sequence[Entry], named: Sequence[str]) -> bytes:
    """The plot as PNG: points with their intervals, the front as a line.

    Args:
        rows: all of them.
        named: rows with a name beside them; the others are pale.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(8.5, 5.5), layout="constrained")
        axes = figure.subplots()
        best = front(rows)
        steps: dict[str, Any] = {"color": "#404040", "linewidth": 1.2, "drawstyle": "steps-post", "zorder": 1}
        axes.plot([e.mb for e in best], [e.mean for e in best], label="Pareto front", **steps)
        for number, inner in enumerate(dict.fromkeys(e.inner for e in rows)):
            for shown in (True, False):
                points = [e for e in rows if e.inner == inner and (e.name in named) == shown]
                halves = [e.half if isfinite(e.half) else 0.0 for e in points]
                look: dict[str, Any] = {
                    "fmt": "osD^v"[number % 5],
                    "color": PALETTE[number],
                    "elinewidth": 1,
                    "capsize": 2,
                }
                look |= {"alpha": 1.0, "markersize": 7} if shown else {"alpha": 0.3, "markersize": 5}
                axes.errorbar([e.mb for e in points], [e.mean for e in points], halves, **look)
            axes.plot([], [], "osD^v"[number % 5], color=PALETTE[number], label=f"over {inner}")
        _rate_upwards(axes, rows)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("MB sent per worker (log scale)")
        axes.legend(loc="lower right", frameon=False)
        _name(axes, [e for e in rows if e.name in named])
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=130, metadata={"Software": None})
    return file.getvalue()


def _rate_upwards(axes: Axes, rows: Sequence[Entry]) -> None:
    """Better is higher, whatever the measure; some intervals are wide, and may end outside."""
    means, measure = [e.mean for e in rows], rows[0].measure
    low, high = min(means), max(means)
    above, below = 0.17 * (high - low), 0.12 * (high - low)
    axes.set_ylim(*((high + below, low - above) if measure.lower else (low - below, high + above)))
    axes.set_ylabel(measure.name + (" (upside down)" if measure.lower else ""))


def _name(axes: Axes, rows: Sequence[Entry]) -> None:
    """Names above their points, from the lowest up, each above those below that it would cover."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    point = figure.dpi / 72
    taken: list[tuple[float, float, float]] = []
    for entry in sorted(rows, key=lambda entry: entry.merit):
        x, y = axes.transData.transform((entry.mb, entry.mean)) / point
        width, height = 6.0 * len(entry.name), 13.0
        right, place = max(x - 6, axes.bbox.x0 / point + width + 2), y + 7
        for start, end, level in sorted(taken, key=lambda box: box[2]):
            if right - width < end and start < right and abs(place - level) < height:
                place = level + height
        taken.append((right - width, right, place))
        line = {"arrowstyle": "-", "color": "#808080", "linewidth": 0.6, "shrinkB": 4} if place - y > 12 else None
        place_of_name: dict[str, Any] = {"xytext": (right - x, place - y), "textcoords": "offset points"}
        axes.annotate(entry.name, (entry.mb, entry.mean), ha="right", fontsize=10, arrowprops=line, **place_of_name)


def sweep(rows: Sequence[Entry]) -> bytes | None:
    """The rating over the period, with SlowMo and without; None if there are no such rows."""
    series: dict[str, list[tuple[int, Entry]]] = {}
    for entry in rows:
        stem, _, every = entry.name.partition(", every ")
        if stem in ("local_sgd", "slowmo") and (every.isdigit() or entry.name == stem):
            series.setdefault(stem, []).append((int(every or 12), entry))
    if not series or any(len(points) < 2 for points in series.values()):
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for number, (stem, points) in enumerate(sorted(series.items())):
            points.sort(key=lambda point: point[0])
            xs = [every * 2 ** (0.06 * (number - 0.5)) for every, _ in points]
            means, halves = [e.mean for _, e in points], [e.half for _, e in points]
            axes.errorbar(xs, means, halves, fmt="osD"[number] + "-", color=PALETTE[number], capsize=4, label=stem)
        for entry in rows:
            if entry.row == "ddp":
                axes.axhline(entry.mean, color="#808080", linestyle=":", label="ddp")
        ticks = sorted({every for points in series.values() for every, _ in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("steps between syncs (τ), log scale")
        axes.set_ylabel(rows[0].measure.name)
        if rows[0].measure.lower:
            axes.invert_yaxis()
        axes.legend(frameon=False)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=130, metadata={"Software": None})
    return file.getvalue()


def write(known: Mapping[str, Sequence[float | None]], inner: Mapping[str, str], measure: Measure, out: Path) -> None:
    """Write ``table.md``, ``table.csv`` and the pictures.

    Args:
        known: rating and MB of each run, by its key.
        inner: the optimizer of each row.
        measure: what the ratings are.
        out: folder.
    """
    rows = entries(known, inner, measure)
    synchronous = [e for e in rows if e.row.startswith("ddp") and "batches" not in e.row]
    reference = min(synchronous, key=lambda e: e.row != "ddp", default=None)
    if reference is None:
        print("There are no final runs of ddp yet, so there is no table.")
        return
    text = markdown(rows, reference.mb)
    if few := against(rows, reference):
        what = f"seed by seed{', lower is better' if measure.lower else ''}, with at most {FEW:.0%} of its bytes"
        text += f"\n\nAgainst {reference.name}, {what}:\n\n" + "\n".join(few)
    (out / "table.md").write_text(text + "\n")
    (out / "table.csv").write_text(as_csv(rows))
    (out / "over_mb.png").write_bytes(picture(rows, highlights(rows)))
    if (swept := sweep(rows)) is not None:
        (out / "sync_every.png").write_bytes(swept)
    print(text)
