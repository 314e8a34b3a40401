"""Tables and plots of finished runs.

    python -m recipes.report outputs/cifar10_small
    python -m recipes.report outputs/simulated --bandwidth 100mbit --latency 1ms --step-ms 20
    python -m recipes.report multirun outputs/2025-01-31 --out recipes/results/digits --title "Digits" --metric val/loss

Reads every ``result.json`` below the folders, with ``csv/metrics.csv`` beside it, and puts together the runs that
differ in the seed alone. Writes ``table.md``, ``table.csv``, plots as PNG, and ``index.html``, which holds all of it.
With --bandwidth it says too what steps would take over such links, by the model of ``docs/plan.md``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_slowmo.communication.probe import Link
from lightning_slowmo.plan.units import parse_bandwidth, parse_seconds
from recipes.report import summary
from recipes.report.page import page
from recipes.report.plots import Picture, draw
from recipes.report.predicted import Network
from recipes.report.runs import Problem, find, group


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, print and write.

    Args:
        arguments: of the command line.

    Raises:
        SystemExit: if there is nothing to report.
    """
    parser = argparse.ArgumentParser(
        prog="python -m recipes.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, help="of runs, or of folders of runs")
    parser.add_argument("--out", type=Path, help="where to write; FOLDER/report if left out")
    parser.add_argument("--title", help="the page's heading; the name of what is reported if left out")
    parser.add_argument("--metric", help="what the curves follow; if left out, val/NAME of a measure test/NAME")
    parser.add_argument("--bandwidth", type=parse_bandwidth, help="of each worker's link, such as 100mbit")
    parser.add_argument("--latency", type=parse_seconds, default=2e-4, help="of a message; 0.2ms if left out")
    parser.add_argument("--step-ms", type=float, help="of one worker alone; what it took in simulated runs if left out")
    a = parser.parse_args(arguments)
    network = None
    if a.bandwidth is not None:
        network = Network(Link(a.bandwidth, a.latency), None if a.step_ms is None else a.step_ms / 1e3)
    try:
        runs, unread = find(a.folders)
    except FileNotFoundError as error:
        sys.exit(str(error))
    problems, replaced = group(runs)
    remarks = [*unread, *replaced]
    for line in remarks:
        print(line, file=sys.stderr)
    if not problems:
        sys.exit(f"No finished run in {', '.join(map(str, a.folders))}: a run that has finished leaves a result.json.")
    drawn = [(problem, draw(problem, a.metric or curve_metric(problem), network)) for problem in problems]
    if a.metric and not any(name.name.startswith("over_") for _, pictures in drawn for name in pictures):
        logged = sorted({name for run in runs for row in run.history.values() for name in row})
        sys.exit(f"No run logged {a.metric!r}. They logged: {', '.join(logged) or 'nothing'}.")
    out = a.out or a.folders[0] / "report"
    title = a.title or out.resolve().name.replace("report", out.resolve().parent.name)
    text = write(out, title, drawn, remarks, network)
    print(text)
    print(f"\nWritten to {out}: table.md, table.csv, plots, and all of it in index.html.")


def curve_metric(problem: Problem) -> str:
    """What is followed through training: the measure as validation logs it."""
    return problem.record.metric.replace("test/", "val/")


def write(
    out: Path,
    title: str,
    drawn: Sequence[tuple[Problem, Sequence[Picture]]],
    remarks: Sequence[str] = (),
    network: Network | None = None,
) -> str:
    """Write all files.

    Args:
        out: folder.
        title: heading.
        drawn: each problem with its pictures.
        remarks: lines on runs that are not in it.
        network: over which steps are predicted, if any.

    Returns:
        The tables, and what follows from them, as ``table.md`` has them.
    """
    out.mkdir(parents=True, exist_ok=True)
    sections = []
    for problem, pictures in drawn:
        record = problem.record
        prefix = f"{record.data}_{record.model}_" if len(drawn) > 1 else ""
        for picture in pictures:
            (out / f"{prefix}{picture.name}.png").write_bytes(picture.png)
        lines = [*summary.slowmo_lines(problem), *summary.order_lines(problem)]
        common = [f"All with {', '.join(problem.common)}."] if problem.common else []
        heading = f"## {record.model} on {record.data}, {record.parameters:,} parameters"
        sections.append("\n\n".join([heading, *common, summary.markdown(problem, network), *_bullets(lines)]))
    text = "\n\n".join([f"# {title}", *sections])
    extra = [
        *_named("What the rows stand for", [line for problem, _ in drawn for line in summary.paper_lines(problem)]),
        "## Commands\n\n```bash\n" + "\n".join(c for problem, _ in drawn for c in summary.commands(problem)) + "\n```",
        *_named("Versions", summary.versions([problem for problem, _ in drawn])),
    ]
    (out / "table.md").write_text("\n\n".join([text, *extra]) + "\n")
    (out / "table.csv").write_text(summary.as_csv([problem for problem, _ in drawn]))
    (out / "index.html").write_text(page(title, drawn, remarks, network))
    return text


def _bullets(lines: Sequence[str]) -> list[str]:
    return ["\n".join(f"* {line}" for line in lines)] if lines else []


def _named(name: str, lines: Sequence[str]) -> list[str]:
    return [f"## {name}\n\n{_bullets(lines)[0]}"] if lines else []


if __name__ == "__main__":
    main()
