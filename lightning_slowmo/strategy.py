"""The strategy for the ``lightning`` package."""

from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

from lightning_slowmo.trainer_strategy import SlowMoMixin


class SlowMoStrategy(SlowMoMixin, DDPStrategy):  # noqa: D101
    __doc__ = SlowMoMixin.__doc__


SlowMoStrategy.register_strategies(StrategyRegistry)
