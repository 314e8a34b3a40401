"""Fabric's side of the strategy, without the Trainer: ``mixin.py`` follows the life of a run, the others serve it."""

from importlib.util import find_spec

if find_spec("lightning_fabric"):
    from lightning_slowmo.fabric.standalone import SlowMoFabricStrategy
if find_spec("lightning"):
    from lightning_slowmo.fabric.strategy import SlowMoFabricStrategy  # type: ignore[assignment]

__all__ = ["SlowMoFabricStrategy"]
