"""Which experiments make up which table, and with which seeds."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

CONF = Path(__file__).parents[2] / "conf"


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: what it shows.
        experiments: files of ``conf/experiment``, each a row, or a sweep of several.
        seeds: of each row.
    """

    title: str
    experiments: tuple[str, ...]
    seeds: tuple[int, ...]


def _in(folder: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{folder}/{name}" for name in names)


_SLOWMO = ("local_sgd", "slowmo_local_sgd", "osgp", "slowmo_osgp", "sgp", "slowmo_sgp", "ar_sgd", "slowmo_ar_sgd")
_VARIANTS = ("double_averaging_local_sgd", "double_averaging_sgp", "slowmo_sgp_noaverage")
_SMALL = ("ddp", "local_sgd", "slowmo", "sgp", "slowmo_sgp")
_COMPRESSORS = ("qsgd_16bit", "qsgd_8bit", "qsgd_4bit", "qsgd_2bit", "random_50", "random_10", "random_1", "top_50",
                "top_10", "top_1", "sign")  # fmt: skip

TABLES = {
    "digits": Table("Handwritten digits", _in("digits", *_SMALL), (1, 2, 3)),
    "digits_tau_sweep": Table("Handwritten digits, steps between meetings", _in("digits", "tau_sweep"), (1, 2, 3)),
    "cifar10_small": Table("CIFAR-10, a small network", _in("cifar10_small", *_SMALL), (1, 2, 3)),
    "cifar10_small_tau_sweep": Table(
        "CIFAR-10, a small network, steps between meetings", _in("cifar10_small", "tau_sweep"), (1, 2, 3)
    ),
    "multi30k": Table("Multi30k, a small transformer", _in("multi30k", "allreduce", "local_adam", "slowmo"), (1, 2)),
    "text": Table("A small GPT, whole and sharded", _in("text", "ddp", "slowmo_fsdp"), (1, 2, 3)),
    "cifar10": Table("SlowMo, Table 1: CIFAR-10", _in("cifar10", *_SLOWMO), (1, 2, 3, 4, 5)),
    "cifar10_tau_sweep": Table("SlowMo, Figure 2", _in("cifar10", "tau_sweep"), (1, 2, 3, 4, 5)),
    "imagenet": Table("SlowMo, Table 1: ImageNet", _in("imagenet", *_SLOWMO, *_VARIANTS), (1,)),
    "wmt16": Table(
        "SlowMo, Table 1: WMT'16 En-De",
        _in("wmt16", "local_adam", "slowmo_local_adam", "sgp", "slowmo_sgp", "slowmo_sgp_noaverage", "ar_adam"),
        (1,),
    ),
    "qprsgd": Table("QPRSGD", _in("qprsgd", "local_sgd", "ring", "gossip"), (1, 2, 3)),
    "squarm": Table("SQuARM-SGD", _in("squarm", "dpsgd", "choco_sgd", "sparq_sgd", "squarm_sgd"), (1, 2, 3)),
    "choco": Table("CHOCO-SGD, Table 1", _in("choco", "all_reduce", *_COMPRESSORS), (1, 2, 3)),
    "apmsqueeze": Table("APMSqueeze: ResNet-18", _in("apmsqueeze", "resnet18_adam", "resnet18"), (1, 2, 3)),
    "apmsqueeze_wmt16": Table("APMSqueeze: transformer", _in("wmt16", "ar_adam", "apmsqueeze"), (1,)),
}
"""Every table, by the name that the command line takes."""


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        name: for folders and jobs.
        overrides: what the command line of ``recipes.train`` gets.
        nodes: machines that the experiment is meant for.
        processes: on each of them; None if that is the number of its GPUs.
    """

    name: str
    overrides: tuple[str, ...]
    nodes: int
    processes: int | None


def rows(table: Table) -> list[Row]:
    """The rows of a table; a sweep has one for each of its choices.

    Raises:
        hydra.errors.HydraException: if there is no such experiment.
    """
    found = []
    for experiment in table.experiments:
        config = composed(experiment)
        processes = config.trainer.devices if isinstance(config.trainer.devices, int) else None
        params = dict(config.hydra.sweeper.params) if config.hydra.mode else {}
        choices = [[f"{name}={value}" for value in str(values).split(",")] for name, values in params.items()]
        for chosen in product(*choices):
            parts = [experiment.replace("/", "_"), *(choice.rpartition("=")[2] for choice in chosen)]
            # What sweeps by itself is run here one by one, so that it can go on where it was stopped.
            alone = ("hydra.mode=RUN",) if params else ()
            overrides = (f"experiment={experiment}", *chosen, *alone)
            found.append(Row("_".join(parts), overrides, config.trainer.num_nodes, processes))
    return found


def chosen(table: Table, patterns: str | None) -> list[Row]:
    """The rows whose names match one of some regular expressions, with commas between them; None: all."""
    every = rows(table)
    if patterns is None:
        return every
    return [row for row in every if any(re.search(pattern, row.name) for pattern in patterns.split(","))]


def composed(experiment: str) -> DictConfig:
    """An experiment's configuration, with Hydra's own part."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [f"experiment={experiment}"], return_hydra_config=True)
