"""Real runs on digits, short ones, many of them in the same two processes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from tests.harness import run_trainers

CONF = Path(__file__).parents[2] / "conf"


def configuration(folder: Path, overrides: Sequence[str]) -> DictConfig:
    """What ``python -m recipes.train`` composes for a run in a folder."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", [*overrides, f"hydra.run.dir={folder}"], return_hydra_config=True)
    config.hydra.runtime.output_dir = str(folder)
    HydraConfig.instance().set_config(config)
    plain = {name: config[name] for name in config if name != "hydra"}
    return OmegaConf.create(OmegaConf.to_container(OmegaConf.create(plain), resolve=True))


def run_all(runs: Mapping[Path, Sequence[str]], limit: float = 300) -> None:
    """Train each run on two workers; they leave in their folders what ``recipes.train`` leaves."""
    quiet = "trainer.enable_progress_bar=false"
    composed = {
        str(folder): OmegaConf.to_container(configuration(folder, [*overrides, quiet]))
        for folder, overrides in runs.items()
    }
    run_trainers(2, _train, composed, limit=limit)


def _train(rank: int, runs: dict[str, dict]) -> None:
    from recipes import job  # here, not in the process that only starts the workers

    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for folder, config in runs.items():
        Path(folder).mkdir(parents=True, exist_ok=True)
        job.run(OmegaConf.create(config))
