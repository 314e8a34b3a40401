"""The strategies for the ``lightning`` package."""

from typing import ClassVar

import lightning.pytorch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, StrategyRegistry

from lightning_slowmo.trainer.mixin import SlowMoMixin
from lightning_slowmo.trainer.simulated import SimulatedMixin


class SlowMoStrategy(SlowMoMixin, DDPStrategy):  # noqa: D101
    __doc__ = SlowMoMixin.__doc__

    package: ClassVar = lightning.pytorch


class SimulatedStrategy(SimulatedMixin, SingleDeviceStrategy):  # noqa: D101
    __doc__ = SimulatedMixin.__doc__

    package: ClassVar = lightning.pytorch


SlowMoStrategy.register_strategies(StrategyRegistry)
SimulatedStrategy.register_strategies(StrategyRegistry)
