"""Trains an experiment with all its workers in one process, on one device: ``trainer=simulated``."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

TAKEN = ("algorithm", "on_nonfinite", "offload_slow_state", "log_syncs")
"""What a simulated strategy takes of the configuration of one with processes."""


def is_simulated(config: DictConfig) -> bool:
    """Whether a configuration asks for workers without processes."""
    return config.trainer.get("workers") is not None


def simulated(config: DictConfig) -> DictConfig:
    """A configuration in which one process plays all workers, if it asks for that.

    Args:
        config: with ``trainer.workers``, a number or ``auto`` for as many as the experiment has processes.

    Raises:
        ValueError: if the number is not known, or the strategy has options that need processes.
    """
    if not is_simulated(config):
        return config
    plain: Any = OmegaConf.to_container(config, resolve=True)
    trainer, strategy = plain["trainer"], plain["strategy"]
    machines = plain.get("machines") or trainer
    workers, devices = trainer.pop("workers"), machines["devices"]
    if workers == "auto":
        if not isinstance(devices, int) or devices < 1:
            raise ValueError(f"trainer.devices={devices} does not say how many workers: set trainer.workers=...")
        workers = machines["num_nodes"] * devices
    for option in ("workers_per_node", "shard_slow_state"):
        if strategy.get(option):
            raise ValueError(f"strategy.{option} needs processes, and trainer=simulated has one. Leave it out.")
    taken = {name: strategy[name] for name in TAKEN if name in strategy}
    taken.setdefault("algorithm", {"_target_": "lightning_slowmo.AllReduce"})  # what DDP does
    plain["strategy"] = {"_target_": "lightning_slowmo.SimulatedStrategy", "workers": workers, **taken}
    plain["trainer"] = trainer | {"num_nodes": 1, "devices": 1}
    return DictConfig(plain)
