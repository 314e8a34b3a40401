"""Optimizers that are stepped behind the strategy's back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer


def refuse_steps(optimizers: Sequence[Optimizer], allowed: Callable[[], bool]) -> Callable[[], None]:
    """Raise where an optimizer is stepped without the strategy: that step would not be counted, nor synced.

    Args:
        optimizers: to watch.
        allowed: whether a step is legitimate at present.

    Returns:
        A function that ends the watch.
    """

    def check(optimizer: Optimizer, *_: Any) -> None:
        if not allowed():
            raise RuntimeError(
                f"{type(optimizer).__name__} was stepped without the strategy, so its parameters would never be "
                "synced. In manual optimization call step() on what self.optimizers() returns, not with "
                "use_pl_optimizer=False."
            )

    handles = [optimizer.register_step_pre_hook(check) for optimizer in optimizers]

    def end() -> None:
        for handle in handles:
            handle.remove()

    return end
