"""Trains one experiment, or a sweep of them.

    python -m recipes.train experiment=cifar10/slowmo_local_sgd seed=1 data.root=data/cifar10
    python -m recipes.train --multirun experiment=digits/slowmo seed=1,2,3 strategy.algorithm.slow_momentum=0,0.4,0.6

Hydra composes ``conf/``; ``--help`` lists the groups, and ``--cfg job`` prints the configuration. Every run has its own
folder with its configuration, its metrics and ``result.json``.

Each run gets fresh processes, so nothing is left in this one for the next run of a sweep. torch's elastic agent starts
and watches them, as in torchrun; Lightning's own launcher would repeat the command line in its children, which for a
sweep is the whole sweep. Processes that torchrun or srun started, on several machines say, are themselves the workers.
"""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from recipes.record import Record

# Torch and Lightning are imported where a run begins: what only shows the configuration needs neither.


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
def main(config: DictConfig) -> float | None:
    """Run what Hydra has composed.

    Returns:
        The metric, for sweepers; None on other workers than the first.

    Raises:
        ValueError: if the configuration does not fit what it configures.
        FileNotFoundError: if data is missing.
    """
    from hydra.utils import instantiate

    from recipes import config as configuration
    from recipes import job
    from recipes.simulated import is_simulated, simulated

    alone = is_simulated(config) and HydraConfig.get().mode == RunMode.RUN
    config = DictConfig(OmegaConf.to_container(simulated(config), resolve=True))
    configuration.check(config)
    if config.trainer.num_nodes == 1 and config.strategy.get("workers_per_node") == "all":
        print("On one machine each process is a worker: strategy.workers_per_node=all would make one of them all.")
        config.strategy.workers_per_node = None
    if started_outside():
        record = job.run(config)
        return record.value if record is not None else None
    processes = processes_of(config.trainer)
    instantiate(config.strategy, _convert_="all")  # whatever is wrong with it or the data fails here, once
    instantiate(config.data, _convert_="all").prepare_data()
    record = start_workers(config, processes)
    if alone:  # what a newcomer wants to see, and others in a second
        from recipes.report.__main__ import main as report

        report([config.run.folder])
    return record.value


def started_outside() -> bool:
    """Whether torchrun, srun or the like has started this process as one of the workers."""
    from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

    tasks = int(os.environ.get("SLURM_NTASKS", "1"))
    return (
        TorchElasticEnvironment.detect()
        or (SLURMEnvironment.detect() and tasks > 1)
        or LightningEnvironment().creates_processes_externally
    )


def processes_of(trainer: DictConfig) -> int:
    """How many processes a Trainer's configuration asks for on this machine.

    Raises:
        ValueError: if it asks for several machines, whose processes cannot be started from here.
    """
    if trainer.num_nodes > 1:
        raise ValueError(
            f"trainer.num_nodes={trainer.num_nodes}: start the processes on each machine with torchrun or srun, for "
            f"example `torchrun --nnodes {trainer.num_nodes} --nproc-per-node {trainer.devices} --rdzv-backend c10d "
            "--rdzv-endpoint HOST:PORT -m recipes.train ...`. Or train on this machine alone, with trainer=cpu or "
            "trainer=gpu, and a data.batch_size that makes up for it."
        )
    devices = trainer.devices
    if isinstance(devices, int) and devices > 0:
        return devices
    if OmegaConf.is_list(devices):
        return len(devices)
    if trainer.accelerator == "cpu":
        return 1
    import torch

    return max(1, torch.cuda.device_count())  # "auto", -1


def start_workers(config: DictConfig, processes: int) -> Record:
    """Run a job in fresh processes, and wait for them.

    The processes are forked from a server that has imported what they need, so they start in no time.

    Returns:
        The first worker's record.

    Raises:
        RuntimeError: if a worker failed; says how. The others have been ended.
    """
    import multiprocessing

    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from recipes import job

    modules = {config[group]._target_.rpartition(".")[0] for group in ("data", "model")}
    multiprocessing.get_context("forkserver").set_forkserver_preload([job.__name__, *sorted(modules)])
    with tempfile.TemporaryDirectory() as scratch:  # where workers leave word of their errors
        launch = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id="run",
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            monitor_interval=0.5,
            start_method="forkserver",
            logs_specs=DefaultLogsSpecs(log_dir=scratch),
        )
        try:
            return elastic_launch(launch, job.run)(config)[0]
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            said = failure.message["message"] if isinstance(failure.message, dict) else failure.message
            raise RuntimeError(
                f"Worker {rank} of {processes} failed with exit code {failure.exitcode}. {said}"
            ) from None


if __name__ == "__main__":
    main()
