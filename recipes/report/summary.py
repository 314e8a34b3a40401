"""The table of a problem's groups, and what it says about SlowMo and the paper's order."""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Sequence
from itertools import combinations
from math import isfinite
from typing import Any

from recipes.report.predicted import Network
from recipes.report.runs import EVERY_STEP, Group, Problem, shorten_path, with_unit

MISSING = "–"


def head(problem: Problem, network: Network | None = None) -> list[str]:
    """The table's first line."""
    paper = ["paper"] if any(paper_value(group) is not None for group in problem.groups) else []
    sent = "MB sent per worker"
    predicted = [] if network is None else [f"predicted ms per step, {network.name}"]
    took = ["ms per step", *predicted]
    return ["run", with_unit(problem.record.metric), *paper, sent, *took, "steps", "workers", "seeds"]


def rows(problem: Problem, network: Network | None = None) -> list[list[str]]:
    """The table's other lines, one for each group."""
    with_paper = "paper" in head(problem)
    lines = []
    for group in problem.groups:
        paper = paper_value(group)
        line = [problem.name(group), with_spread(group)]
        if with_paper:
            line.append(MISSING if paper is None else f"{paper:g}" if paper < 10 else f"{paper:.2f}")
        line += [number(group.average("mb_sent")), number(group.average("ms_per_step"))]
        if network is not None:
            seconds = network.seconds_per_step(group)
            line.append(MISSING if seconds is None else number(1e3 * seconds))
        line += [_extent(group, "steps"), _extent(group, "workers"), str(len(group.runs))]
        lines.append(line)
    return lines


def markdown(problem: Problem, network: Network | None = None) -> str:
    """The table as Markdown."""
    first, *rest = [head(problem, network), *rows(problem, network)]
    marks = ["---", *["---:"] * (len(first) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [first, marks, *rest])


def as_csv(problems: Sequence[Problem]) -> str:
    """All problems' tables with their numbers unrounded, for other programs."""
    names = [
        *("data", "model", "run", "experiment", "strategy", "sync_every", "slow_momentum", "settings", "metric"),
        *("mode", "mean", "spread", "paper", "mb_sent", "ms_per_step", "steps", "workers", "seeds", "values"),
    ]
    file = io.StringIO()
    writer = csv.DictWriter(file, names, lineterminator="\n")
    writer.writeheader()
    for problem in problems:
        for group in problem.groups:
            r = group.record
            row: dict[str, Any] = {name: getattr(r, name) for name in ("data", "model", "experiment", "metric", "mode")}
            row |= {name: getattr(r, name) for name in ("sync_every", "slow_momentum", "workers")}
            row |= {name: group.average(name) for name in ("mb_sent", "ms_per_step", "steps")}
            row |= {"run": problem.name(group), "strategy": r.label, "settings": " ".join(group.settings)}
            row |= {"mean": group.mean, "spread": group.spread, "paper": paper_value(group)}
            row |= {"seeds": " ".join(map(str, group.seeds)), "values": " ".join(map(repr, group.values))}
            writer.writerow(row)
    return file.getvalue()


def slowmo_lines(problem: Problem) -> list[str]:
    """For each strategy that ran without and with SlowMo: whether they differ by more than their spread."""
    lines = []
    for slow in problem.groups:
        if not slow.slow:
            continue
        names = EVERY_STEP if slow.base in EVERY_STEP else (slow.base,)
        bases = [group for group in problem.groups if group.record.label in names and _comparable(group, slow)]
        lines += [f"{problem.name(slow)} against {problem.name(base)}: {_verdict(base, slow)}" for base in bases]
    return lines


def order_lines(problem: Problem) -> list[str]:
    """For each of the paper's tables: how many of its orderings between two rows are seen here."""
    tables: dict[tuple, list[Group]] = {}
    for group in problem.groups:
        if paper_value(group) is not None:
            paper = group.record.paper or {}
            tables.setdefault((paper.get("title"), paper.get("table")), []).append(group)
    lines = []
    for (title, table), groups in tables.items():
        pairs = [(a, b) for a, b in combinations(groups, 2) if paper_value(a) != paper_value(b)]
        if not pairs:
            continue
        seen = reversed_ = 0
        for a, b in pairs:
            theirs = (paper_value(b) or 0) - (paper_value(a) or 0)
            size, tolerance = b.mean - a.mean, _tolerance(a, b)
            if tolerance is not None and abs(size) > tolerance:
                seen += size * theirs > 0
                reversed_ += size * theirs < 0
        lines.append(
            f"{title}, {table}: of its {len(pairs)} orderings of two of these rows, {seen} are seen here by more than "
            f"the spread, {reversed_} are the other way round by more than the spread, and "
            f"{len(pairs) - seen - reversed_} cannot be told."
        )
    return lines


def paper_lines(problem: Problem) -> list[str]:
    """For each paper what it leaves unstated, then which of its rows each group stands for."""
    papers: dict[str, list[str]] = {}
    for group in problem.groups:
        paper = group.record.paper
        if not paper:
            continue
        about = f"{paper.get('title')} (arXiv:{paper.get('arxiv')})."
        if paper.get("unstated"):
            about += f" Not stated there: {'; '.join(paper['unstated'])}."
        place = ", ".join(filter(None, [paper.get("table"), paper.get("row")]))
        value = paper_value(group)
        figure = "its figure is unknown" if value is None else f"{value} {paper.get('unit') or ''}".strip()
        papers.setdefault(about, []).append(f"{problem.name(group)} stands for {place}: {figure}.")
    return [line for about, rows in papers.items() for line in (about, *rows)]


def commands(problem: Problem) -> list[str]:
    """What to type to make these runs again."""
    lines = []
    for group in problem.groups:
        kept = [o for o in group.record.overrides if o.partition("=")[0] != "seed"]
        words = ["python", "-m", "recipes.train"]
        seeds = ",".join(map(str, group.seeds))
        words += ["--multirun"] if len(group.seeds) > 1 else []
        parts = [override.partition("=") for override in kept]
        words += [shlex.quote(f"{name}{sign}{shorten_path(value)}") for name, sign, value in parts]
        lines.append(" ".join([*words, f"seed={seeds}"]))
    return lines


def versions(problems: Sequence[Problem]) -> list[str]:
    """Each set of versions that made some of the runs."""
    found = {
        ", ".join(f"{name} {version or 'unknown'}" for name, version in run.record.versions.items())
        for problem in problems
        for group in problem.groups
        for run in group.runs
    }
    return sorted(found - {""})


def paper_value(group: Group) -> float | None:
    """The paper's figure; None if there is none."""
    return (group.record.paper or {}).get("value")


def with_spread(group: Group) -> str:
    """``mean ± spread``."""
    return number(group.mean) + ("" if group.spread is None else f" ± {number(group.spread, like=group.mean)}")


def number(value: float, like: float | None = None) -> str:
    """A number with as many digits as its size, or another's, deserves."""
    size = abs(value if like is None else like)
    return f"{value:.0f}" if size >= 1000 else f"{value:.2f}" if size >= 1 else f"{value:.4f}"


def _extent(group: Group, name: str) -> str:
    """The one value of all runs, or the smallest and largest."""
    low, *between = sorted({getattr(run.record, name) for run in group.runs})
    return f"{low} to {between[-1]}" if between else str(low)


def _comparable(base: Group, slow: Group) -> bool:
    a, b = base.record, slow.record
    same_period = a.sync_every == b.sync_every or base.base != "local_sgd"
    return a.workers == b.workers and same_period and _others(base) == _others(slow)


def _others(group: Group) -> set[str]:
    return {setting for setting in group.settings if not setting.startswith("strategy.")}


def _tolerance(a: Group, b: Group) -> float | None:
    """The larger of two spreads; None if there is none to go by."""
    if a.spread is None or b.spread is None or not (isfinite(a.spread) and isfinite(b.spread)):
        return None
    return max(a.spread, b.spread)


def _verdict(base: Group, slow: Group) -> str:
    size, tolerance = slow.mean - base.mean, _tolerance(base, slow)
    theirs = [paper_value(group) for group in (base, slow)]
    paper = f" The paper has {theirs[1] - theirs[0]:+.2f}." if None not in theirs else ""  # type: ignore[operator]
    said = f"{size:+.{2 if abs(base.mean) >= 1 else 4}f}"
    if tolerance is None:
        return f"{said}; without several seeds of both, there is no spread to hold that against.{paper}"
    better = (size > 0) == (base.record.mode == "max")
    found = "better" if better else "worse"
    verdict = (
        f"more than the larger spread ({number(tolerance, like=base.mean)}): {found} with SlowMo"
        if abs(size) > tolerance
        else f"within the larger spread ({number(tolerance, like=base.mean)}): no difference to be seen"
    )
    steps = "" if base.record.steps == slow.record.steps else " (with other numbers of steps)"
    return f"{said}{steps}, {verdict}.{paper}"
