"""Steps that would never be synced: optimizers that are stepped without the strategy that set them up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook


def refuse_steps(optimizers: Sequence[Optimizer], allowed: Callable[[], bool], advice: str) -> Callable[[], None]:
    """Raise where trained parameters are stepped without the strategy: that step would not be counted, nor synced.

    The step may be that of an optimizer which another one holds, as SAM does in ``first_step`` and ``second_step``.

    Args:
        optimizers: whose parameters to watch.
        allowed: whether a step is legitimate at present.
        advice: what to do instead, for the message.

    Returns:
        A function that ends the watch.
    """

    def check(optimizer: Optimizer, *_: Any) -> None:
        if allowed():
            return
        trained = {id(p) for own in optimizers for group in own.param_groups for p in group["params"]}
        if any(id(p) in trained for group in optimizer.param_groups for p in group["params"]):
            raise RuntimeError(
                f"{type(optimizer).__name__} was stepped without the strategy, so its parameters would never be "
                f"synced. {advice}"
            )

    return register_optimizer_step_pre_hook(check).remove
