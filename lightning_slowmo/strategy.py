"""The strategy for the ``lightning`` package."""

from typing import ClassVar

import lightning.pytorch
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

from lightning_slowmo.trainer.mixin import SlowMoMixin


class SlowMoStrategy(SlowMoMixin, DDPStrategy):  # noqa: D101
    __doc__ = SlowMoMixin.__doc__

    package: ClassVar = lightning.pytorch


SlowMoStrategy.register_strategies(StrategyRegistry)
