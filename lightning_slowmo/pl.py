"""The strategy for the ``pytorch_lightning`` package."""

from pytorch_lightning.strategies import DDPStrategy, StrategyRegistry

from lightning_slowmo.trainer_strategy import SlowMoMixin


class SlowMoStrategy(SlowMoMixin, DDPStrategy):  # type: ignore[misc]  # noqa: D101
    __doc__ = SlowMoMixin.__doc__


SlowMoStrategy.register_strategies(StrategyRegistry)
