"""Who runs in :mod:`benchmarks.slow_links`: Lightning's and PyTorch's own ways to train in parallel, and our presets.

A row is a recipe, not a strategy: strategies are built in the workers, when their turn comes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

from lightning_slowmo import (
    PRESETS,
    Algorithm,
    APMSqueeze,
    Gossip,
    LocalSGD,
    SensedSGD,
    SketchedSGD,
    SlowMo,
    SlowMoStrategy,
)
from lightning_slowmo.communication import Workers
from lightning_slowmo.communication.broadcast import broadcast_tensors
from lightning_slowmo.plan import DDP, at_period

NEVER = 10**9
"""A ``sync_every`` that no run reaches."""

POWERSGD_START = 2
"""The first steps of PowerSGD's hook average plain gradients; fewer it does not take."""


@dataclass(frozen=True)
class Setting:
    """What the rows have in common.

    Args:
        sync_every: optimizer steps between averages, see :func:`lightning_slowmo.plan.at_period`.
        warmup_steps: steps of ordinary Adam for APMSqueeze.
    """

    sync_every: int = 12
    warmup_steps: int = 2


def powersgd() -> tuple[PowerSGDState, Callable]:
    """PyTorch's hook of rank 1, its default, from the first steps on that it allows."""
    return PowerSGDState(None, start_powerSGD_iter=POWERSGD_START), powerSGD_hook


class HookedDDP(DDPStrategy):
    """DDP with a communication hook, which Lightning itself would register on GPUs only.

    Args:
        make_hook: makes the hook's state and the hook, in the worker.
        options: of DistributedDataParallel.
    """

    def __init__(self, make_hook: Callable[[], tuple[Any, Callable]], **options: Any) -> None:
        super().__init__(**options)
        self.make_hook = make_hook

    def configure_ddp(self) -> None:
        super().configure_ddp()
        self.model.register_comm_hook(*self.make_hook())


class PeriodicAveraging(DDPStrategy):
    """PyTorch's periodic averaging of parameters, without what Lightning broadcasts before every batch.

    Args:
        period: optimizer steps between averages.
    """

    def __init__(self, period: int) -> None:
        super().__init__()
        self.period = period

    def configure_ddp(self) -> None:
        with torch.no_grad():
            broadcast_tensors(list(self.model.parameters()), Workers.from_world())
        self.averager = PeriodicModelAverager(self.period)
        self.averager.step = 1  # it would average before the first period, too

    def setup(self, trainer: Any) -> None:
        super().setup(trainer)
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    def optimizer_step(self, *arguments: Any, **options: Any) -> Any:
        result = super().optimizer_step(*arguments, **options)
        self.averager.average_parameters(self.model.parameters())
        return result


@dataclass(frozen=True)
class Row:
    """One way to train.

    Attributes:
        strategy: makes what goes into ``Trainer(strategy=...)``.
        planned: what :mod:`lightning_slowmo.plan` takes it for.
        period: steps after which the traffic repeats itself.
        plain: whether it keeps momentum itself and needs an optimizer without.
    """

    strategy: Callable[[], Any]
    planned: Algorithm | DDP
    period: int = 1
    plain: bool = False


def ours(algorithm: Algorithm) -> Row:
    """The row of one of our configurations."""
    plain = isinstance(algorithm, (SketchedSGD, SensedSGD))
    return Row(lambda: SlowMoStrategy(algorithm), algorithm, period(algorithm), plain)


LATE = 8
"""Steps to average over where messages come late: buffers swallow some, so a few steps pass early and others wait."""


def period(algorithm: Algorithm) -> int:
    """Steps after which the traffic of a configuration repeats itself."""
    if isinstance(algorithm, Gossip) and algorithm.overlap:
        return LATE
    own = getattr(algorithm, "sync_every", 1)
    base = getattr(algorithm, "base", None)
    return own if base is None or own == NEVER else math.lcm(own, period(base))


def adapted(preset: Algorithm, setting: Setting) -> Algorithm:
    """A preset under the common setting."""
    if isinstance(preset, APMSqueeze):
        return replace(preset, warmup_steps=setting.warmup_steps)
    return at_period(preset, setting.sync_every)


ROWS: dict[str, Callable[[Setting], Row]] = {
    "compute": lambda s: replace(ours(LocalSGD(NEVER)), period=s.sync_every),
    "ddp": lambda s: Row(DDPStrategy, DDP()),
    "ddp_bf16": lambda s: Row(lambda: HookedDDP(lambda: (None, bf16_compress_hook)), DDP(element_bytes=2)),
    # In one bucket: the hook waits inside gloo's two threads, and two buckets would occupy both of them for ever.
    "ddp_powersgd": lambda s: Row(lambda: HookedDDP(powersgd, bucket_cap_mb=100), DDP(powersgd_rank=1)),
    "periodic_averaging": lambda s: Row(
        lambda: PeriodicAveraging(s.sync_every), LocalSGD(s.sync_every), period=s.sync_every
    ),
    **{name: lambda s, preset=preset: ours(adapted(preset, s)) for name, preset in PRESETS.items()},
    "slowmo_overlap": lambda s: ours(SlowMo(sync_every=s.sync_every, overlap=s.sync_every - 1)),
}
"""Every row, by name. ``compute`` trains each worker alone, all at once: the share of the machine that a step gets."""
