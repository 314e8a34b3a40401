"""Draws a problem: its measure over steps, megabytes and seconds, and over what was swept."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from statistics import fmean
from textwrap import wrap
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from recipes.report.predicted import Network
from recipes.report.runs import EVERY_STEP, Group, Problem, spread, with_unit

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A3B00", "#4B0082")
"""Okabe and Ito's colours, which colour-blind readers can tell apart, without the yellow that white swallows; then a
brown and an indigo, darker than all of them."""

MOST_LINES = 8
"""More curves than that cannot be told apart: then each strategy's best stands for it, and of these the best ones."""

INK = "#010203"
"""Stands for the text's colour, which in a page is the reader's."""

AXES = {"steps": "optimizer steps", "mb": "MB sent per worker", "seconds": "seconds of training"}
_SOURCES = {"mb": "progress/mb_sent", "seconds": "progress/seconds"}
_SWEEPS = {"sync_every": "sync_every (τ), steps", "slow_momentum": "slow_momentum (β)"}

STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
}
"""What all plots of results look like, as arguments of ``matplotlib.rc_context``."""

_INKED: dict[Any, Any] = STYLE | {
    "axes.titlesize": 12,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "path",
}


@dataclass(frozen=True)
class Picture:
    """A drawn figure.

    Attributes:
        name: of its file, without a suffix.
        caption: what it shows, in a line.
        png: for files; black on white.
        svg: for pages; on the page's background, with text in the page's colour.
    """

    name: str
    caption: str
    png: bytes
    svg: str


@dataclass(frozen=True)
class Look:
    """How a group is drawn."""

    colour: str
    dashes: str | tuple
    marker: str


def draw(problem: Problem, metric: str, network: Network | None = None) -> list[Picture]:
    """All pictures for which there are data.

    Args:
        problem: the groups.
        metric: what is followed through training, such as ``val/accuracy``.
        network: over which to predict seconds, if any.

    Returns:
        The pictures: curves first, then sweeps.
    """
    pictures = []
    logged = [group for group in problem.groups if curve(group, metric, "steps")]
    shown = _shown(logged)
    best = "" if len(shown) == len(logged) else f", {_choice(logged)}"
    looks = _looks(shown)
    for axis, label in AXES.items():
        curves = {group: points for group in shown if (points := curve(group, metric, axis))}
        if curves:
            caption = f"{metric} over {label}{best}"
            plot = _curve_plot(problem, curves, looks, metric, label, log=axis == "mb")
            pictures.append(_picture(f"over_{axis}", caption, plot))
    if network is not None:
        taken = {group: seconds for group in shown if (seconds := network.seconds_per_step(group)) is not None}
        predicted = {
            group: [(step * seconds, y, band) for step, y, band in curve(group, metric, "steps")]
            for group, seconds in taken.items()
        }
        label = f"predicted seconds, {network.name}"
        if predicted:
            plot = _curve_plot(problem, predicted, looks, metric, label, log=True)
            pictures.append(_picture("over_predicted_seconds", f"{metric} over {label}{best}", plot))
    for name, label in _SWEEPS.items():
        if lines := sweeps(problem, name):
            caption = f"{problem.record.metric} over {label.partition(' ')[0]}"
            pictures.append(_picture(name, caption, _sweep_plot(problem, lines, name, label)))
    return pictures


def curve(group: Group, metric: str, axis: str) -> list[tuple[float, float, float]]:
    """The mean line of a group, with its band.

    Args:
        group: its runs.
        metric: what is on the vertical axis.
        axis: ``"steps"``, ``"mb"`` or ``"seconds"``.

    Returns:
        Points (x, mean, spread) at the steps that all seeds logged; x is a mean too.
    """
    runs = []
    for run in group.runs:
        points = {}
        for step, row in run.history.items():
            x = row.get(_SOURCES[axis]) if axis in _SOURCES else step + 1.0  # loggers count from 0
            if x is not None and isfinite(row.get(metric, float("nan"))):
                points[step] = (x, row[metric])
        runs.append(points)
    shared = sorted(set(runs[0]).intersection(*runs))
    return [
        (fmean(run[step][0] for run in runs), fmean(ys), spread(ys) or 0.0)
        for step in shared
        for ys in [[run[step][1] for run in runs]]
    ]


def sweeps(problem: Problem, name: str) -> dict[str, list[Group]]:
    """The series of groups that differ in one number alone.

    Args:
        problem: the groups.
        name: ``"sync_every"`` or ``"slow_momentum"``.

    Returns:
        By what a series is called, its groups in the order of that number; series of two and more.
    """
    other = "slow_momentum" if name == "sync_every" else "sync_every"
    series: dict[tuple, list[Group]] = {}
    for group in problem.groups:
        record = group.record
        if getattr(record, name) is not None:
            series.setdefault((record.label, getattr(record, other), group.settings), []).append(group)
    long = {
        key: sorted(groups, key=lambda group: getattr(group.record, name))
        for key, groups in series.items()
        if len({getattr(group.record, name) for group in groups}) > 1
    }
    labels = [key[0] for key in long]
    symbol = "β" if other == "slow_momentum" else "τ"
    named: dict[str, list[Group]] = {}
    for (label, value, rest), groups in long.items():
        apart = [f"{symbol} = {value:g}"] if value is not None and labels.count(label) > 1 else []
        called = ", ".join([label, *apart])
        named[called if called not in named else f"{called}, {' '.join(rest)}"] = groups
    return named


def _shown(logged: list[Group]) -> list[Group]:
    """The groups that get a curve: all of them, or each strategy's best."""
    if len(logged) <= MOST_LINES:
        return logged
    best: dict[str, Group] = {}
    for group in logged:
        held = best.setdefault(group.record.label, group)
        if _merit(group) > _merit(held):
            best[group.record.label] = group
    enough = sorted(best.values(), key=_merit, reverse=True)[:MOST_LINES]
    return [group for group in best.values() if group in enough]


def _choice(logged: list[Group]) -> str:
    """In words, which groups :func:`_shown` has chosen."""
    labels = {group.record.label for group in logged}
    return (
        "each strategy at its best" if len(labels) <= MOST_LINES else f"the best {MOST_LINES} strategies at their best"
    )


def _merit(group: Group) -> float:
    """How good a group is: larger is better."""
    return group.mean if group.record.mode == "max" else -group.mean


def _curve_plot(
    problem: Problem, lines: dict[Group, list], looks: dict[Group, Look], metric: str, label: str, log: bool
) -> Callable[[Axes], None]:
    def plot(axes: Axes) -> None:
        for group, points in lines.items():
            xs, ys, bands = zip(*points, strict=True)
            look = looks[group]
            # What others are measured against is broad, so that it is seen below a line that does the same.
            axes.plot(xs, ys, color=look.colour, linestyle=look.dashes, label=problem.name(group),
                      linewidth=3.2 if group.record.label in EVERY_STEP else 1.8,
                      marker=look.marker if len(xs) <= 30 else "", markersize=3.5)  # fmt: skip
            low, high = ([y + sign * band for y, band in zip(ys, bands, strict=True)] for sign in (-1, 1))
            axes.fill_between(xs, low, high, color=look.colour, alpha=0.12, linewidth=0)
        ends = [points[-1][0] for points in lines.values()]
        firsts = [points[0][0] for points in lines.values()]
        if log and min(firsts) > 0 and max(ends) > 8 * min(ends):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlabel(f"{label} (log scale)")
        else:
            axes.set_xlabel(label)
        axes.set_ylabel(with_unit(metric))

    return plot


def _sweep_plot(problem: Problem, lines: dict[str, list[Group]], name: str, label: str) -> Callable[[Axes], None]:
    def plot(axes: Axes) -> None:
        ticks = sorted({getattr(group.record, name) for groups in lines.values() for group in groups})
        log = name == "sync_every" and min(ticks) > 0
        apart = min(b - a for a, b in pairwise(ticks))
        for i, (called, groups) in enumerate(lines.items()):
            # Beside one another, so that no bar hides another one.
            shift = 0.06 * (i - (len(lines) - 1) / 2)
            xs = [getattr(group.record, name) for group in groups]
            axes.errorbar(
                [x * 2**shift if log else x + shift * apart for x in xs],
                [group.mean for group in groups],
                [group.spread or 0.0 for group in groups],
                color=PALETTE[i % len(PALETTE)],
                linestyle=("-", "--", ":")[i // len(PALETTE) % 3],
                marker="osD^vP"[i % 6],
                markersize=5,
                capsize=4,
                label=called,
            )
        if log:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        for group in _references(problem, lines):
            dashes = (0, (1, 1.5)) if group.record.label in EVERY_STEP else (0, (5, 2))
            axes.axhline(group.mean, color="#808080", linestyle=dashes, linewidth=1.6, label=problem.name(group))
        axes.set_xlabel(label)
        axes.set_ylabel(with_unit(problem.record.metric))

    return plot


def _references(problem: Problem, lines: dict[str, list[Group]]) -> Iterable[Group]:
    """The groups of strategies that the swept ones are to be seen against."""
    swept = {group for groups in lines.values() for group in groups}
    below = {*EVERY_STEP, *(group.base for group in swept if group.slow)}
    found = [group for group in problem.groups if group not in swept and group.record.label in below]
    return found if len(found) <= 3 else [group for group in found if group.record.label in EVERY_STEP][:3]


def _looks(groups: Sequence[Group]) -> dict[Group, Look]:
    """A colour for each base and its SlowMo, the base dashed; where several are of a kind, a colour for each."""
    nth: dict[Group, tuple[str, int]] = {}
    kinds: dict[tuple[str, bool], int] = {}
    for group in groups:
        kind = (group.base, bool(group.slow))
        nth[group] = group.base, kinds.get(kind, 0)
        kinds[kind] = kinds.get(kind, 0) + 1
    coloured = list(dict.fromkeys(key for key in nth.values() if key[0] not in EVERY_STEP))
    greys = ("#808080", "#404040", "#A8A8A8")
    looks = {}
    for group, (base, index) in nth.items():
        if base in EVERY_STEP:
            looks[group] = Look(greys[index % len(greys)], "-" if group.slow else (0, (1, 1.5)), "s")
            continue
        place = coloured.index((base, index))
        both = any(other.base == base and other.slow != group.slow for other in groups)
        dashes = "-" if group.slow or not both else (0, (5, 2))
        looks[group] = Look(PALETTE[place % len(PALETTE)], dashes, "oD^vPXp*"[place % len(PALETTE)])
    return looks


def _picture(name: str, caption: str, plot: Callable[[Axes], None]) -> Picture:
    with rc_context(_INKED):
        figure = Figure(figsize=(5.6, 3.6), layout="constrained")
        axes = figure.subplots()
        plot(axes)
        axes.set_title("\n".join(wrap(caption, 62)), loc="left")
        names = axes.get_legend_handles_labels()[1]
        columns = max(1, min(3, 60 // (max(map(len, names)) + 10)))
        figure.set_figheight(3.6 + 0.24 * -(-len(names) // columns))  # the legend is below, never on the lines
        figure.legend(loc="outside lower left", ncols=columns, frameon=False, fontsize=10, handlelength=2.8)
        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png", dpi=150, metadata={"Software": None})
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn = svg.getvalue()
    drawn = drawn[drawn.index("<svg") :].replace(INK, "currentColor")
    return Picture(name, caption, png.getvalue(), drawn)
