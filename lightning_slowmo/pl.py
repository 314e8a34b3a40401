"""The strategy and the callback for the ``pytorch_lightning`` package."""

from typing import ClassVar

import pytorch_lightning
from pytorch_lightning.callbacks import EMAWeightAveraging
from pytorch_lightning.strategies import DDPStrategy, StrategyRegistry

from lightning_slowmo.callbacks import AtSyncMixin
from lightning_slowmo.trainer.mixin import SlowMoMixin


class SlowMoStrategy(SlowMoMixin, DDPStrategy):  # type: ignore[misc]  # noqa: D101
    __doc__ = SlowMoMixin.__doc__

    package: ClassVar = pytorch_lightning


class EMAAtSync(AtSyncMixin, EMAWeightAveraging):  # type: ignore[misc]  # noqa: D101
    __doc__ = AtSyncMixin.__doc__


SlowMoStrategy.register_strategies(StrategyRegistry)
