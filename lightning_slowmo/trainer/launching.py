"""What comes back from spawned and forked workers beside the weights: the report of their syncs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

from lightning_slowmo.algorithms import SyncReport


def bring_report_back(launcher: Any) -> None:
    """Let Lightning's launcher bring rank 0's report to the process that started the workers.

    Args:
        launcher: which sends results back if it has a way to; others, whose workers outlive the fit, stay as they are.
    """
    if hasattr(launcher, "get_extra_results") and "get_extra_results" not in vars(launcher):
        launcher.get_extra_results = partial(_send, launcher.get_extra_results)
        launcher.update_main_process_results = partial(_take, launcher.update_main_process_results)


def _send(results: Callable[[Any], dict[str, Any]], trainer: Any) -> dict[str, Any]:
    """On rank 0: what Lightning sends back, and the report."""
    report = trainer.strategy.report
    return results(trainer) | {"sync_report": None if report is None else asdict(report)}


def _take(update: Callable[[Any, dict[str, Any]], None], trainer: Any, extra: dict[str, Any]) -> None:
    """In the process that started the workers: take the report; what was not a fit leaves the last one's."""
    report = extra.pop("sync_report", None)
    if report is not None:
        trainer.strategy.core.returned = SyncReport(**report)
    update(trainer, extra)
