"""One run of a composed configuration: what each of its workers executes."""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig, OmegaConf

import lightning_slowmo
from recipes.callbacks import OURS, Progress
from recipes.record import Record


def run(config: DictConfig) -> Record | None:
    """Train, test, and write the record. Called on all workers together.

    Args:
        config: all groups of ``conf/``, see ``conf/train.yaml``.

    Returns:
        The record; None on other workers than the first.

    Raises:
        ValueError: if the metric was not logged; lists those that were.
    """
    for package in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric"):
        logging.getLogger(package).setLevel(logging.WARNING)  # the last import of them logs for both
    if not sys.warnoptions:  # `python -W default` shows all
        warnings.filterwarnings("ignore", ".*does not have many workers.*|.*LeafSpec.*is deprecated.*")
        for category in (DeprecationWarning, FutureWarning):  # news for the libraries' authors
            warnings.filterwarnings("ignore", category=category)
    L.seed_everything(config.seed, workers=True, verbose=False)
    data = instantiate(config.data, _convert_="all")
    model = instantiate(
        config.model,
        optimizer=instantiate(config.optimizer, _convert_="all"),
        schedule=instantiate(config.schedule, _convert_="all"),
        _convert_="all",
    )
    trainer = make_trainer(config)
    settings: Any = OmegaConf.to_container(config)
    for logger in trainer.loggers:
        logger.log_hyperparams({**settings, "versions": versions()})
    trainer.fit(model, datamodule=data, ckpt_path=config.ckpt_path)
    measured = measure(trainer)
    metrics = dict(trainer.callback_metrics)
    if not config.metric.startswith("val/"):  # else something is being chosen, which the test data must not be asked
        trainer.test(model, datamodule=data, verbose=False)
        metrics |= trainer.callback_metrics
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()  # or the next run of this process would be logged as more of this one
    if not trainer.is_global_zero:
        return None
    if config.metric not in metrics:
        raise ValueError(f"metric={config.metric} was not logged. There are: {', '.join(sorted(metrics))}.")
    algorithm = getattr(trainer.strategy, "algorithm", None)
    about = config.run
    record = Record(
        experiment=about.experiment,
        label=about.strategy,
        algorithm=repr(algorithm) if algorithm is not None else type(trainer.strategy).__name__,
        data=about.data,
        model=about.model,
        overrides=list(about.overrides),
        seed=config.seed,
        metric=config.metric,
        mode=config.mode,
        value=float(metrics[config.metric]),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        sync_every=every if isinstance(every := getattr(algorithm, "sync_every", None), int) else None,
        slow_momentum=beta if isinstance(beta := getattr(algorithm, "slow_momentum", None), (int, float)) else None,
        shapes=[list(parameter.shape) for parameter in model.parameters() if parameter.requires_grad],
        versions=versions(),
        paper=settings["paper"],
        **measured,
    )
    record.write(about.folder)
    print(farewell(record, {name: float(value) for name, value in metrics.items()}, about.folder), flush=True)
    return record


def farewell(record: Record, metrics: Mapping[str, float], folder: str) -> str:
    """What a run ends with: its metrics, what they took, its folder, and the next command.

    Args:
        record: of the run.
        metrics: all that were logged last.
        folder: of the run.
    """
    tested = [f"{name} {value:.4g}" for name, value in sorted(metrics.items()) if name.startswith("test/")]
    took = f"{record.steps} steps on {record.workers} worker{'s' if record.workers > 1 else ''}"
    where = os.path.relpath(folder)
    return "\n".join(
        [
            ", ".join(tested or [f"{record.metric} {record.value:.4g}"]),
            f"{took}, {record.ms_per_step:.1f} ms a step, {record.mb_sent:.4g} MB sent per worker",
            f"In {where}: result.json, csv/metrics.csv, .hydra. A table and plots: slowmo-report {shlex.quote(where)}",
        ]
    )


def make_trainer(config: DictConfig) -> L.Trainer:
    """The Trainer with its strategy, callbacks and loggers; it makes checkpoints if a callback does."""
    callbacks = [instantiate(each, _convert_="all") for each in (config.callbacks or {}).values()]
    loggers = [instantiate(each, _convert_="all") for each in (config.logger or {}).values()]
    return instantiate(
        config.trainer,
        strategy=instantiate(config.strategy, _convert_="all"),
        callbacks=callbacks,
        logger=loggers or False,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        _convert_="all",
    )


def measure(trainer: L.Trainer) -> dict[str, Any]:
    """What a fit took, under the names of the record. Called on all workers together: bytes are a mean over them."""
    strategy: Any = trainer.strategy
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    progress = next((each for each in callbacks if isinstance(each, Progress)), Progress())
    sent = strategy.reduce(torch.tensor(progress.megabytes(trainer), device=strategy.root_device), reduce_op="mean")
    return {
        "steps": trainer.global_step,
        "epochs": trainer.current_epoch,
        "workers": strategy.workers.size if isinstance(strategy, OURS) else trainer.world_size,
        "seconds": round(progress.seconds, 3),
        "ms_per_step": round(1000 * progress.seconds / max(1, trainer.global_step), 3),
        "mb_sent": round(float(sent), 6),
    }


def versions() -> dict[str, str | None]:
    """Versions of what a result depends on, and the commit of this code if it is in a git repository."""
    packages = {"lightning_slowmo": lightning_slowmo, "torch": torch, "lightning": L}
    found: dict[str, str | None] = {name: package.__version__ for name, package in packages.items()}
    command = ["git", "rev-parse", "HEAD"]
    try:
        answer = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
        found["code"] = answer.stdout.strip() if answer.returncode == 0 else None
    except (OSError, subprocess.TimeoutExpired):  # no git
        found["code"] = None
    return found
