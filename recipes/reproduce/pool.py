"""Runs that need one process each, several at a time, without starting Python for every one."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf, open_dict
from tqdm import tqdm

from recipes.reproduce.launchers import Job
from recipes.reproduce.tables import CONF


def train_all(jobs: Sequence[Job], processes: int) -> list[str]:
    """Train what has not finished, with simulated workers.

    Args:
        jobs: the runs; each must have ``trainer=simulated`` among its overrides.
        processes: at a time.

    Returns:
        Names of those that failed; what they said has been printed.
    """
    wanted = [job for job in jobs if not job.done]
    failed = []
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _end_with, (os.getpid(),)) as pool:
        futures = {pool.submit(_train, job): job for job in wanted}
        try:
            for future in tqdm(as_completed(futures), total=len(futures), desc="runs", smoothing=0):
                said = future.result()
                if said:
                    failed.append(futures[future].name)
                    tqdm.write(f"{futures[future].name} failed:\n{said}")
        except BaseException:  # Ctrl-C: those under way end by themselves, and no more are begun
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def _end_with(parent: int) -> None:
    """End this process if the one that started it is killed, as it would wait for work for ever."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def composed(job: Job) -> DictConfig:
    """A job's configuration, as ``recipes.train`` would compose it."""
    overrides = [each for each in job.overrides if not each.startswith("hydra.")]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", overrides, return_hydra_config=True)
    choices = config.hydra.runtime.choices
    with open_dict(config):
        del config["hydra"]
        names = ("experiment", "strategy", "data", "model")
        config.run = {name: choices[name] for name in names} | {"folder": str(job.folder), "overrides": overrides}
    return config


def _train(job: Job) -> str:
    """Train in this process. Returns what went wrong, or an empty text."""
    import torch

    from recipes import config as configuration
    from recipes import job as one
    from recipes.simulated import simulated

    torch.set_num_threads(1)
    try:
        config = composed(job)
        config.trainer.enable_progress_bar = False
        config = DictConfig(OmegaConf.to_container(simulated(config), resolve=True))
        configuration.check(config)
        one.run(config)
    except Exception:  # a run that fails leaves the others alone
        return traceback.format_exc()
    return ""
