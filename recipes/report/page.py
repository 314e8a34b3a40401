"""One HTML page that needs nothing else: no network, no script, light or dark as the reader's device is."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from recipes.report import summary
from recipes.report.plots import Picture
from recipes.report.predicted import Network
from recipes.report.runs import Problem

MOST_LINES = 6
"""More lines on SlowMo than that are folded."""

_STYLE = """
:root { color-scheme: light dark;
        --text: #1b1f24; --soft: #59636e; --paper: #ffffff; --line: #d1d9e0; --shade: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e9ee; --soft: #9aa4b0; --paper: #14171c; --line: #343b45; --shade: #1d222a; }
}
body { margin: 0 auto; max-width: 74rem; padding: 1.2rem 1rem 3rem; color: var(--text); background: var(--paper);
       font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; }
h2 { font-size: 1.2rem; margin: 2rem 0 .4rem; }
p, li { max-width: 46rem; }
.soft { color: var(--soft); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 8.5rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: 1.2rem;
         margin-top: 1.2rem; }
figure { margin: 0; }
figure svg { width: 100%; height: auto; max-width: 36rem; }
pre { background: var(--shade); padding: .8rem; overflow-x: auto; border-radius: .4rem; font-size: .85rem; }
summary { cursor: pointer; margin-top: 1rem; }
"""


def page(
    title: str,
    drawn: Sequence[tuple[Problem, Sequence[Picture]]],
    remarks: Sequence[str],
    network: Network | None = None,
) -> str:
    """The report as a page.

    Args:
        title: its heading.
        drawn: each problem with its pictures.
        remarks: lines on runs that are not in it.
        network: over which steps are predicted, if any.

    Returns:
        HTML.
    """
    parts = [f"<h1>{escape(title)}</h1>"]
    for problem, pictures in drawn:
        record = problem.record
        parts.append(f"<h2>{escape(record.model)} on {escape(record.data)}</h2>")
        about = [f"{record.parameters:,} parameters"]
        about += [f"all with {', '.join(problem.common)}"] if problem.common else []
        about += ["± is the sample standard deviation over the seeds"]
        parts.append(f'<p class="soft">{escape("; ".join(about))}.</p>')
        parts.append(_table(problem, network))
        parts.append(_list(summary.order_lines(problem)))
        pairs = summary.slowmo_lines(problem)
        parts.append(_list(pairs) if len(pairs) <= MOST_LINES else _folded("With SlowMo and without", _list(pairs)))
        figures = [f'<figure role="img" aria-label="{escape(p.caption)}">{p.svg}</figure>' for p in pictures]
        parts.append(f'<div class="plots">{"".join(figures)}</div>' if figures else "")
        stands_for = summary.paper_lines(problem)
        parts.append(_folded("What the rows stand for", _list(stands_for)) if stands_for else "")
        lines = escape("\n".join(summary.commands(problem)))
        parts.append(_folded("The commands that made these runs", f"<pre>{lines}</pre>"))
    parts.append(_folded("Versions", _list(summary.versions([problem for problem, _ in drawn]))))
    parts.append(_folded("Left out", _list(remarks)) if remarks else "")
    body = "\n".join(filter(None, parts))
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    top = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{viewport}\n<title>{escape(title)}</title>'
    )
    return f"{top}\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"


def _table(problem: Problem, network: Network | None) -> str:
    first = "".join(f"<th>{escape(cell)}</th>" for cell in summary.head(problem, network))
    rows = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in summary.rows(problem, network)]
    lines = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="wide"><table>\n<thead><tr>{first}</tr></thead>\n<tbody>\n{lines}\n</tbody></table></div>'


def _list(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" if lines else ""


def _folded(name: str, content: str) -> str:
    return f"<details><summary>{escape(name)}</summary>{content}</details>"
