"""What is left of a finished run: ``result.json`` in its folder."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

FILE = "result.json"


@dataclass(frozen=True)
class Record:
    """A finished run.

    Attributes:
        experiment: file of ``conf/experiment``; None if there was none.
        label: file of ``conf/strategy``.
        algorithm: the configuration as Python prints it.
        data: file of ``conf/data``.
        model: file of ``conf/model``.
        overrides: what the command line changed.
        seed: of everything random.
        metric: name of the measure.
        mode: ``"max"`` if more is better, ``"min"`` if less is.
        value: the measure at the end; accuracies are in percent.
        steps: optimizer steps of each worker.
        epochs: passes over the data.
        workers: number of workers.
        seconds: of training, without validation.
        ms_per_step: milliseconds of training per step.
        mb_sent: megabytes (10^6 bytes) that one worker sent.
        parameters: number of the model's parameters.
        sync_every: optimizer steps between meetings; None if there is no such number.
        slow_momentum: SlowMo's beta; None if there is none.
        versions: of packages, and the code's commit.
        paper: which row of which paper this stands for, as the experiment's file says it.
        shapes: of the parameters that are trained.
    """

    experiment: str | None
    label: str
    algorithm: str
    data: str
    model: str
    overrides: list[str]
    seed: int
    metric: str
    mode: str
    value: float
    steps: int
    epochs: int
    workers: int
    seconds: float
    ms_per_step: float
    mb_sent: float
    parameters: int
    sync_every: int | None = None
    slow_momentum: float | None = None
    versions: dict[str, str | None] = field(default_factory=dict)
    paper: dict[str, Any] | None = None
    shapes: list[list[int]] = field(default_factory=list)

    def write(self, folder: str | Path) -> None:
        """Write the file, whole or not at all."""
        path = Path(folder) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(self), indent=2) + "\n")
        os.replace(part, path)

    @classmethod
    def read(cls, folder: str | Path) -> Record:
        """Read the file of a run's folder.

        Raises:
            FileNotFoundError: if the run has not finished.
            ValueError: if the file is not such a record.
        """
        path = Path(folder) / FILE
        values = json.loads(path.read_text())
        known = {f.name for f in fields(cls)}
        try:
            return cls(**{name: value for name, value in values.items() if name in known})
        except (TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not the record of a run: {error}.") from None
