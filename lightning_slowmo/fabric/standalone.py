"""The Fabric strategy for the ``lightning_fabric`` package."""

from typing import ClassVar

import lightning_fabric
from lightning_fabric.strategies import STRATEGY_REGISTRY, DDPStrategy

from lightning_slowmo.fabric.mixin import SlowMoFabricMixin


class SlowMoFabricStrategy(SlowMoFabricMixin, DDPStrategy):  # type: ignore[misc]  # noqa: D101
    __doc__ = SlowMoFabricMixin.__doc__

    package: ClassVar = lightning_fabric


SlowMoFabricStrategy.register_strategies(STRATEGY_REGISTRY)
