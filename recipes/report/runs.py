"""Finds finished runs, and groups those that differ in the seed alone."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

from lightning_slowmo import PRESETS
from recipes.record import FILE, Record

METRICS = Path("csv", "metrics.csv")
"""What the CSV logger writes, in a run's folder."""

NAMED = 3
"""How many unfinished runs are named; the others are counted."""

NOT_SETTINGS = (
    *("seed", "experiment", "strategy", "data", "model", "metric", "mode", "sweep_name", "ckpt_path"),
    *("data.root", "data.cache", "data.num_workers", "trainer.enable_progress_bar", "trainer.enable_model_summary"),
)
"""Overrides that are the seed, that a record names by themselves, or that do not change a result."""

SWEPT = ("sync_every", "slow_momentum")
"""Numbers of a record that sweeps are over."""

EVERY_STEP = ("ddp", "allreduce")
"""Strategies that do the same, and that others are measured against."""

_UNCOUNTED_GROUPS = ("logger", "callbacks", "hydra")
_NUMBERS = {f"strategy.algorithm.{name}" for name in SWEPT}
_ORDER = (*EVERY_STEP, *PRESETS)


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: where it wrote.
        record: what it came to.
        history: what it logged: by step, by name.
    """

    folder: Path
    record: Record
    history: dict[int, dict[str, float]]


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ in the seed alone.

    Attributes:
        runs: one for each seed.
        settings: what else the command line changed, as ``name=value``.
    """

    runs: tuple[Run, ...]
    settings: tuple[str, ...]

    @property
    def record(self) -> Record:
        """The first run's, for what they all share."""
        return self.runs[0].record

    @property
    def seeds(self) -> list[int]:
        """The runs' seeds."""
        return [run.record.seed for run in self.runs]

    @property
    def values(self) -> list[float]:
        """The measure of each run."""
        return [run.record.value for run in self.runs]

    @property
    def mean(self) -> float:
        """The mean measure."""
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float | None:
        """The sample standard deviation over the seeds; None of a single one."""
        return spread(self.values)

    @property
    def base(self) -> str:
        """The strategy without SlowMo."""
        label = self.record.label
        if label != "slowmo":
            return label.removeprefix("slowmo_")
        return "allreduce" if "base=AllReduce(" in self.record.algorithm else "local_sgd"

    @property
    def slow(self) -> bool:
        """Whether the strategy has slow momentum."""
        return self.base != self.record.label and self.record.slow_momentum != 0

    def average(self, name: str) -> float:
        """The mean over the runs of one of the record's numbers."""
        return statistics.fmean(getattr(run.record, name) for run in self.runs)


@dataclass(frozen=True)
class Problem:
    """The groups that can be compared: the same data, model and measure.

    Attributes:
        groups: in the order of the table.
    """

    groups: tuple[Group, ...]

    @property
    def record(self) -> Record:
        """Any record, for what they all share."""
        return self.groups[0].record

    @property
    def common(self) -> tuple[str, ...]:
        """The settings that all groups share."""
        shared = set(self.groups[0].settings).intersection(*(group.settings for group in self.groups))
        return tuple(sorted(shared))

    def name(self, group: Group) -> str:
        """What a reader calls a group: its experiment or strategy, and what sets it apart from others of that name."""
        stem = _stem(group)
        namesakes = [other.record for other in self.groups if _stem(other) == stem]
        numbers = [name for name in SWEPT if len({getattr(record, name) for record in namesakes}) > 1]
        apart = [_short(setting) for setting in group.settings if setting not in self.common]
        return ", ".join([stem, *(f"{name}={getattr(group.record, name)}" for name in numbers), *apart])


def spread(values: Sequence[float]) -> float | None:
    """The sample standard deviation; None of a single value, NaN if a value is not finite."""
    if len(values) < 2:
        return None
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def with_unit(metric: str) -> str:
    """A measure as a table's or an axis's heading."""
    return f"{metric}, %" if metric.endswith("accuracy") else metric


def find(folders: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """Read all finished runs in some folders and below.

    Args:
        folders: of single runs, or of many.

    Returns:
        The runs; one line that counts those that have not finished, and one on each that cannot be read.
    """
    runs: list[Run] = []
    remarks: list[str] = []
    unfinished: list[str] = []
    for folder in sorted({found.resolve() for top in folders for found in _candidates(top)}):
        try:
            record = Record.read(folder)
            _check(record)
            runs.append(Run(folder, record, read_history(folder / METRICS)))
        except FileNotFoundError:
            unfinished.append(_tail(folder))
        except ValueError as error:
            remarks.append(f"{_tail(folder)} cannot be read: {' '.join(str(error).split())}")
    if unfinished:
        named = ", ".join(unfinished[:NAMED]) + (", ..." if len(unfinished) > NAMED else "")
        remarks.insert(0, f"Not finished, or failed: {len(unfinished)} ({named}).")
    return runs, remarks


def read_history(path: Path) -> dict[int, dict[str, float]]:
    """What a CSV logger wrote, by step; empty if it wrote nothing.

    Raises:
        ValueError: if the file is not such a table.
    """
    history: dict[int, dict[str, float]] = {}
    if not path.is_file():
        return history
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            try:
                step = int(row.pop("step"))
                values = {name: float(value) for name, value in row.items() if value}
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{METRICS} is damaged ({error!r})") from None
            history.setdefault(step, {}).update(values)
    return history


def group(runs: Iterable[Run]) -> tuple[list[Problem], list[str]]:
    """Put together what belongs together.

    Args:
        runs: any.

    Returns:
        The problems, and one line on each run that a later one with the same seed replaces.
    """
    seeds: dict[tuple, dict[int, Run]] = {}
    remarks = []
    for run in sorted(runs, key=lambda run: ((run.folder / FILE).stat().st_mtime, run.folder)):
        record = run.record
        numbers = tuple(getattr(record, name) for name in SWEPT)
        changed = settings(record.overrides)
        key = (record.data, record.model, record.metric, record.experiment, record.label, *numbers, changed)
        replaced = seeds.setdefault(key, {}).get(record.seed)
        if replaced is not None:
            remarks.append(f"{_tail(replaced.folder)} is left out: {_tail(run.folder)} ran the same later.")
        seeds[key][record.seed] = run
    problems: dict[tuple, list[Group]] = {}
    for key, by_seed in seeds.items():
        made = Group(tuple(by_seed[seed] for seed in sorted(by_seed)), key[-1])
        problems.setdefault(key[:3], []).append(made)
    return [Problem(tuple(sorted(problems[key], key=_rank))) for key in sorted(problems)], remarks


def settings(overrides: Iterable[str]) -> tuple[str, ...]:
    """The overrides that make a run another one, sorted; of paths, the last part alone.

    Without the seed, and without those numbers that the record has by themselves.
    """
    kept = set()
    for override in overrides:
        name, _, value = override.partition("=")
        name = name.lstrip("+~")
        if (
            name not in _NUMBERS
            and name not in NOT_SETTINGS
            and name.partition(".")[0].partition("/")[0] not in _UNCOUNTED_GROUPS
        ):
            kept.add(f"{name}={shorten_path(value)}")
    return tuple(sorted(kept))


def shorten_path(value: str) -> str:
    """The last part of an absolute path, which differs by machine; anything else as it is."""
    return f".../{Path(value).name}" if value.startswith(("/", "~")) else value


def _candidates(top: Path) -> Iterable[Path]:
    if not top.is_dir():
        raise FileNotFoundError(f"There is no folder {top}.")
    for path in [top, *sorted(top.rglob("*"))]:
        if path.name in (FILE, ".hydra"):
            yield path.parent
        elif path.parts[-2:] == METRICS.parts:
            yield path.parents[1]


def _check(record: Record) -> None:
    for name in ("value", "seed", "steps", "workers", "ms_per_step", "mb_sent"):
        if not isinstance(getattr(record, name), Real):
            raise ValueError(f"{name} is {getattr(record, name)!r}, not a number")
    if record.mode not in ("max", "min"):
        raise ValueError(f"mode is {record.mode!r}, neither 'max' nor 'min'")


def _stem(group: Group) -> str:
    record = group.record
    if record.experiment is None:
        return record.label
    swapped = any(override.startswith("strategy=") for override in record.overrides)
    return record.label if swapped else record.experiment.rpartition("/")[2]


def _short(setting: str) -> str:
    name, _, value = setting.partition("=")
    return f"{name.rpartition('.')[2]}={value}"


def _rank(group: Group) -> tuple:
    """By what is under SlowMo, then without it before with it, then by numbers."""
    record = group.record
    place = _ORDER.index(group.base) if group.base in _ORDER else len(_ORDER)
    numbers = (record.sync_every or 0, record.slow_momentum or 0.0)
    return (place, group.base, group.slow, numbers, record.experiment or "", group.settings)


def _tail(folder: Path) -> str:
    """Enough of a path to find it again, and no more of the machine than that."""
    return "/".join(folder.parts[-3:])
