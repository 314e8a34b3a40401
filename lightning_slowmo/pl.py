"""The strategies and the callback for the ``pytorch_lightning`` package."""

from typing import ClassVar

import pytorch_lightning
from pytorch_lightning.callbacks import EMAWeightAveraging
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, StrategyRegistry

from lightning_slowmo.callbacks import AtSyncMixin
from lightning_slowmo.trainer.mixin import SlowMoMixin
from lightning_slowmo.trainer.sharded import ModelParallelBase, ShardedMixin
from lightning_slowmo.trainer.simulated import SimulatedMixin


class SlowMoStrategy(SlowMoMixin, DDPStrategy):  # type: ignore[misc]  # noqa: D101
    __doc__ = SlowMoMixin.__doc__

    package: ClassVar = pytorch_lightning


class SlowMoModelParallelStrategy(ShardedMixin, ModelParallelBase, ModelParallelStrategy):  # type: ignore[misc]  # noqa: D101
    __doc__ = ShardedMixin.__doc__

    package: ClassVar = pytorch_lightning


class EMAAtSync(AtSyncMixin, EMAWeightAveraging):  # type: ignore[misc]  # noqa: D101
    __doc__ = AtSyncMixin.__doc__


class SimulatedStrategy(SimulatedMixin, SingleDeviceStrategy):  # type: ignore[misc]  # noqa: D101
    __doc__ = SimulatedMixin.__doc__

    package: ClassVar = pytorch_lightning


SlowMoStrategy.register_strategies(StrategyRegistry)
SimulatedStrategy.register_strategies(StrategyRegistry)
SlowMoModelParallelStrategy.register_strategies(StrategyRegistry)
