"""One run of a composed configuration: what each of its workers executes."""

from __future__ import annotations

import logging
import subprocess
import warnings
from pathlib import Path

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig, OmegaConf

import lightning_slowmo
from recipes.callbacks import Progress, megabytes_sent
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
    for package in ("pytorch", "fabric"):
        logging.getLogger(f"lightning.{package}").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*|.*LeafSpec.*is deprecated.*")
    L.seed_everything(config.seed, workers=True, verbose=False)
    data = instantiate(config.data, _convert_="all")
    model = instantiate(
        config.model,
        optimizer=instantiate(config.optimizer, _convert_="all"),
        schedule=instantiate(config.schedule, _convert_="all"),
        _convert_="all",
    )
    callbacks = [instantiate(each, _convert_="all") for each in (config.callbacks or {}).values()]
    loggers = [instantiate(each, _convert_="all") for each in (config.logger or {}).values()]
    trainer = instantiate(
        config.trainer,
        strategy=instantiate(config.strategy, _convert_="all"),
        callbacks=callbacks,
        logger=loggers or False,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        _convert_="all",
    )
    for logger in loggers:
        logger.log_hyperparams({**OmegaConf.to_container(config), "versions": versions()})
    trainer.fit(model, datamodule=data, ckpt_path=config.ckpt_path)
    fitted = dict(trainer.callback_metrics)
    steps, epochs = trainer.global_step, trainer.current_epoch
    sent = float(trainer.strategy.reduce(torch.tensor(megabytes_sent(trainer), device=trainer.strategy.root_device)))
    tested = trainer.test(model, datamodule=data, verbose=False)
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()  # or the next run of this process would be logged as more of this one
    if not trainer.is_global_zero:
        return None
    metrics = {name: float(value) for name, value in [*fitted.items(), *(tested[0] if tested else {}).items()]}
    if config.metric not in metrics:
        raise ValueError(f"metric={config.metric} was not logged. There are: {', '.join(sorted(metrics))}.")
    seconds = sum(callback.seconds for callback in callbacks if isinstance(callback, Progress))
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
        value=metrics[config.metric],
        steps=steps,
        epochs=epochs,
        workers=trainer.world_size,
        seconds=round(seconds, 3),
        ms_per_step=round(1000 * seconds / max(1, steps), 3),
        mb_sent=sent,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        sync_every=getattr(algorithm, "sync_every", None),
        slow_momentum=getattr(algorithm, "slow_momentum", None),
        versions=versions(),
        paper=OmegaConf.to_container(config.paper) if config.paper else None,
    )
    record.write(about.folder)
    return record


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
