"""The Fabric strategy for the ``lightning`` package."""

from typing import ClassVar

import lightning.fabric
from lightning.fabric.strategies import STRATEGY_REGISTRY, DDPStrategy

from lightning_slowmo.fabric.mixin import SlowMoFabricMixin


class SlowMoFabricStrategy(SlowMoFabricMixin, DDPStrategy):  # noqa: D101
    __doc__ = SlowMoFabricMixin.__doc__

    package: ClassVar = lightning.fabric


SlowMoFabricStrategy.register_strategies(STRATEGY_REGISTRY)
