"""The strategies for the ``lightning`` package."""

from typing import ClassVar

import lightning.pytorch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, StrategyRegistry

from lightning_slowmo.trainer.mixin import SlowMoMixin
from lightning_slowmo.trainer.sharded import ModelParallelBase, ShardedMixin
from lightning_slowmo.trainer.simulated import SimulatedMixin


class SlowMoStrategy(SlowMoMixin, DDPStrategy):  # noqa: D101
    __doc__ = SlowMoMixin.__doc__

    package: ClassVar = lightning.pytorch


class SimulatedStrategy(SimulatedMixin, SingleDeviceStrategy):  # noqa: D101
    __doc__ = SimulatedMixin.__doc__

    package: ClassVar = lightning.pytorch


class SlowMoModelParallelStrategy(ShardedMixin, ModelParallelBase, ModelParallelStrategy):  # type: ignore[misc]  # noqa: D101
    __doc__ = ShardedMixin.__doc__

    package: ClassVar = lightning.pytorch


SlowMoStrategy.register_strategies(StrategyRegistry)
SimulatedStrategy.register_strategies(StrategyRegistry)
SlowMoModelParallelStrategy.register_strategies(StrategyRegistry)
