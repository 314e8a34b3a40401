"""What steps would take over a given link: for runs on simulated workers, whose seconds say nothing of a network."""

from __future__ import annotations

import ast
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import lightning_slowmo
from lightning_slowmo import Algorithm, compression
from lightning_slowmo.plan import predict
from lightning_slowmo.plan.model import DDP, Link
from recipes.record import Record
from recipes.report.runs import Group


@dataclass(frozen=True)
class Network:
    """The link that is asked about.

    Attributes:
        link: of each worker.
        step: seconds of a step of one worker alone; None: of a simulated run, what a worker's step took there.
    """

    link: Link
    step: float | None = None

    @property
    def name(self) -> str:
        """The link in words."""
        return f"{self.link.bandwidth / 1e6:g} Mbit/s and {1e3 * self.link.latency:g} ms"

    def seconds_per_step(self, group: Group) -> float | None:
        """What the model of ``docs/plan.md`` predicts for a step of a group; None if it cannot."""
        record = group.record
        step = self.step
        if step is None and "trainer=simulated" in record.overrides:
            step = group.average("ms_per_step") / 1e3 / record.workers
        way = algorithm_of(record)
        if step is None or way is None or not record.shapes:
            return None
        try:
            return predict(way, record.shapes, record.workers, step, self.link).step
        except ValueError:  # the algorithm does not say what it sends
            return None


def algorithm_of(record: Record) -> Algorithm | DDP | None:
    """The configuration that a record names; None if its text is more than names of configurations and plain values.

    Nothing of the text is executed.
    """
    if record.label == "ddp":
        return DDP()
    try:
        made = _made(ast.parse(record.algorithm, mode="eval").body)
    except (SyntaxError, ValueError, TypeError):
        return None
    return made if isinstance(made, Algorithm) else None


def _made(node: ast.expr) -> Any:
    if not isinstance(node, ast.Call):
        return ast.literal_eval(node)
    name = node.func.id if isinstance(node.func, ast.Name) else ""
    kind = getattr(lightning_slowmo, name, None) or getattr(compression, name, None)
    if not (isinstance(kind, type) and is_dataclass(kind)):
        raise ValueError(name)
    settable = {field.name for field in fields(kind) if field.init}
    named = {keyword.arg: _made(keyword.value) for keyword in node.keywords if keyword.arg in settable}
    return kind(*map(_made, node.args), **named)
