"""When to sync: what ``sync_every`` may be beside an integer.

A schedule is a value: it says how many optimizer steps a period has that begins now, and keeps nothing. Running
algorithms ask it at the first step of every period (:mod:`~lightning_slowmo.algorithms.clock`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lightning_slowmo import traffic
from lightning_slowmo.algorithms.base import check_period, check_rate

NEVER = 2**53
"""Steps of a period that lasts as long as training does: that of a learning rate of 0."""


@dataclass(frozen=True)
class Schedule(ABC):
    """How many optimizer steps there are between two syncs, as training goes on."""

    kind: ClassVar[str] = ""
    """What it adds to the kind of an algorithm, if a run with it keeps other state."""

    by_epoch: ClassVar[bool] = False

    @abstractmethod
    def period(self, step: int, rate: float, epoch: int = 0) -> int:
        """Optimizer steps of a period that begins now.

        Args:
            step: optimizer steps so far.
            rate: learning rate of the period's first step, the largest of all parameter groups.
            epoch: number of the present epoch, from 0.
        """

    @property
    @abstractmethod
    def shortest(self) -> int:
        """Steps of the shortest period there can be."""

    @property
    @abstractmethod
    def usual(self) -> int:
        """The period by which plans reckon: the one in which training ends, or else the shortest."""

    def periods(self, rates: Sequence[float], steps_per_epoch: int | None = None) -> list[int]:
        """Lengths of all periods of a run; the last one ends with the run.

        Args:
            rates: learning rate of each optimizer step.
            steps_per_epoch: optimizer steps of an epoch, for schedules by epoch.

        Example:
            >>> Stages({0: 1, 3: 4}).periods([0.1] * 10)
            [1, 1, 1, 4, 3]
        """
        lengths: list[int] = []
        step = 0
        while step < len(rates):
            epoch = step // steps_per_epoch if steps_per_epoch else 0
            lengths.append(min(self.period(step, rates[step], epoch), len(rates) - step))
            step += lengths[-1]
        return lengths


@dataclass(frozen=True)
class PostLocal(Schedule):
    """Post-local SGD: gradients are averaged at every step at first, as by ``allreduce``; then local steps begin.

    Lin, Stich, Patel, Jaggi, "Don't Use Large Mini-Batches, Use Local SGD", ICLR 2020,
    https://arxiv.org/abs/1808.07217. After ``start`` steps the algorithm begins from where the workers are, with no
    momentum of its own and a first period of ``every`` steps.

    Args:
        start: optimizer steps at the start after which workers are equal, as their gradients are averaged.
        every: optimizer steps between syncs afterwards.

    Raises:
        ValueError: if an argument is out of its range.

    Example::

        LocalSGD(sync_every=PostLocal(start=2000, every=12))
    """

    kind: ClassVar[str] = " after averaged gradients"

    start: int
    every: int = 12

    def __post_init__(self) -> None:
        check_period("start", self.start, least=0)
        check_period("every", self.every)

    def period(self, step: int, rate: float, epoch: int = 0) -> int:
        """One step while gradients are averaged, then ``every``."""
        return 1 if step < self.start else self.every

    @property
    def shortest(self) -> int:
        """``every``: averaged gradients make no period."""
        return self.every

    @property
    def usual(self) -> int:
        """``every``."""
        return self.every


@dataclass(frozen=True)
class QSR(Schedule):
    """The quadratic synchronization rule: H = max(base, floor((coefficient / rate)²)), so syncs get rare as rates fall.

    Gu, Lyu, Arora, Zhang, Huang, "A Quadratic Synchronization Rule for Distributed Deep Learning", ICLR 2024,
    https://arxiv.org/abs/2310.14423. H is fixed when a period begins, by the learning rate of its first step. Where the
    learning rate has come down to 0, there is no other sync until the end of training.

    Args:
        base: the least H, in optimizer steps.
        coefficient: the paper's alpha, in units of the learning rate. H exceeds ``base`` once the rate is below
            ``coefficient / sqrt(base + 1)``; 0 gives a constant H.
        warmup_steps: optimizer steps at the start in which the learning rate warms up: a period that begins in them has
            ``warmup_every`` steps, where the rule would let workers drift apart for long.
        warmup_every: H in the warm-up; None is ``base``, which is the rule's H at the end of the warm-up wherever the
            coefficient was chosen so that training begins with ``base``.

    Raises:
        ValueError: if an argument is out of its range.

    Example::

        SlowMo(sync_every=QSR(base=4, coefficient=0.0175, warmup_steps=10_000))    # for peak rates of about 0.008
    """

    base: int = 4
    coefficient: float = 0.0175
    warmup_steps: int = 0
    warmup_every: int | None = None

    def __post_init__(self) -> None:
        check_period("base", self.base)
        check_rate("coefficient", self.coefficient)
        check_period("warmup_steps", self.warmup_steps, least=0)
        if self.warmup_every is not None:
            check_period("warmup_every", self.warmup_every)

    def period(self, step: int, rate: float, epoch: int = 0) -> int:
        """The rule, or H of the warm-up."""
        if step < self.warmup_steps:
            return self.warmup_every or self.base
        ratio = self.coefficient / rate if rate else math.inf if self.coefficient else 0.0
        return max(self.base, int(min(ratio * ratio, NEVER)))

    @property
    def shortest(self) -> int:
        """``base``, or H of the warm-up if that is less."""
        return min(self.base, self.warmup_every or self.base) if self.warmup_steps else self.base

    @property
    def usual(self) -> int:
        """``base``: how much rarer syncs get depends on the learning rates, see :meth:`periods`."""
        return self.base


@dataclass(frozen=True)
class Stages(Schedule):
    """One period after the other, by optimizer step or by epoch.

    A period has the length of the stage in which it begins, and ends when it has that many steps, in whichever stage.

    Args:
        stages: where each stage begins, and the optimizer steps between syncs in it; one begins at 0.
        by: what the beginnings count: ``"step"``, optimizer steps, or ``"epoch"``. Without Lightning's Trainer, call
            ``start_epoch(engine.units, epoch)`` of :mod:`lightning_slowmo.algorithms.clock` when one begins.

    Raises:
        ValueError: if an argument is out of its range.

    Example::

        SlowMo(sync_every=Stages({0: 1, 1000: 4, 5000: 12}))
    """

    stages: Mapping[int, int]
    by: Literal["step", "epoch"] = "step"

    def __post_init__(self) -> None:
        pairs = self.stages.items() if isinstance(self.stages, Mapping) else self.stages
        try:
            stages = FrozenMapping(sorted((start, every) for start, every in pairs))
        except (TypeError, ValueError):
            raise ValueError(f"stages must be a mapping such as {{0: 1, 1000: 4}}, got {self.stages!r}.") from None
        for start, every in stages.items():
            check_period("stages must begin at integers; a beginning", start, least=0)
            check_period(f"sync_every of the stage that begins at {start}", every)
        if not stages or next(iter(stages)) != 0:
            raise ValueError(f"stages must begin at 0, such as {{0: 1, 1000: 4}}, got {self.stages!r}.")
        if self.by not in ("step", "epoch"):
            raise ValueError(f"by must be 'step' or 'epoch', got {self.by!r}.")
        object.__setattr__(self, "stages", stages)

    @property
    def by_epoch(self) -> bool:  # type: ignore[override]
        """Whether it must be told of epochs."""
        return self.by == "epoch"

    def period(self, step: int, rate: float, epoch: int = 0) -> int:
        """The period of the present stage."""
        now = epoch if self.by_epoch else step
        return next(every for start, every in reversed(list(self.stages.items())) if start <= now)

    @property
    def shortest(self) -> int:
        """The shortest of all stages."""
        return min(self.stages.values())

    @property
    def usual(self) -> int:
        """That of the last stage."""
        return list(self.stages.values())[-1]


class FrozenMapping(dict[int, Any]):
    """A mapping that has a hash, as a field of a frozen dataclass needs one."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self.items()))

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError("A schedule cannot be changed; make another one.")

    __setitem__ = __delitem__ = update = pop = popitem = clear = setdefault = __ior__ = _refuse  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenMapping, (list(self.items()),)


def check_sync_every(value: Any) -> None:
    """Raise ValueError unless ``value`` is an integer of at least 1, or a schedule."""
    if isinstance(value, Schedule):
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            "sync_every must be an integer of at least 1, or a schedule: PostLocal(start=2000, every=12), "
            f"QSR(base=4, coefficient=0.0175) or Stages({{0: 1, 1000: 4}}), got {value!r}."
        )


def check_streaming(sync_every: int | Schedule, overlap: Any, fragments: Any) -> None:
    """Raise ValueError unless ``fragments`` divides ``sync_every``, and ``overlap`` ends before the next sync.

    Fragments take turns at equal distances, which QSR and Stages do not keep; an average in flight must have landed
    before the shortest period ends.
    """
    check_period("overlap", overlap, least=0)
    check_period("fragments", fragments)
    if is_varying(sync_every) and fragments > 1:
        raise ValueError(f"fragments must be 1 with sync_every={sync_every!r}: their turns need one period throughout.")
    steps = sync_every.shortest if isinstance(sync_every, Schedule) else sync_every
    if steps % fragments:
        raise ValueError(f"fragments must divide sync_every, which is {steps}, got {fragments!r}.")
    if overlap >= steps // fragments:
        raise ValueError(
            f"overlap must be less than the {steps // fragments} steps between two syncs (sync_every / fragments), "
            f"got {overlap!r}."
        )


def is_varying(sync_every: int | Schedule) -> bool:
    """Whether the periods of local steps differ, so that workers must agree on each."""
    return isinstance(sync_every, Schedule) and not isinstance(sync_every, PostLocal)


def divided(sync_every: int | Schedule, fragments: int) -> int | Schedule:
    """Steps from one fragment's turn to the next; a schedule that varies has one fragment alone."""
    return sync_every // fragments if isinstance(sync_every, int) else sync_every


def usual(sync_every: int | Schedule) -> int:
    """The period by which plans reckon, see :attr:`Schedule.usual`."""
    return sync_every.usual if isinstance(sync_every, Schedule) else sync_every


def header(sync_every: int | Schedule, workers: int, counted: bool = False) -> traffic.Sync:
    """The headers of a sync: the meeting's, and the steps and rates by which workers agree on the next period.

    Args:
        sync_every: what says when it is due.
        workers: how many.
        counted: whether steps must be agreed on for other reasons.
    """
    parts = [traffic.header(workers)]
    if counted or is_varying(sync_every):
        parts.append(traffic.header(workers, 2))
    return traffic.together(1, *parts)
