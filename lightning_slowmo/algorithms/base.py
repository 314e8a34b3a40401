"""What an algorithm is: a configuration that a user writes down, and its running state on one optimizer."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from lightning_slowmo import traffic
from lightning_slowmo.algorithms.iterates import Iterates
from lightning_slowmo.averaging import Averager, ExactAverager
from lightning_slowmo.communication.meeting import Level, Round
from lightning_slowmo.communication.workers import Workers
from lightning_slowmo.compression import Compressor
from lightning_slowmo.parameters import Layout

if TYPE_CHECKING:
    from lightning_slowmo.algorithms.clock import Clock


@dataclass(frozen=True)
class SyncReport:
    """What one sync did, or the totals of several.

    Attributes:
        bytes_sent: bytes that this worker gave to the transport, the header included.
        bytes_received: bytes that it took from there.
        seconds: time spent in the sync, waiting included.
        drift: distance of this worker from the mean before the sync, relative to the norm of the mean.
        skipped: messages that a trigger held back.
        count: number of syncs.
        largest_drift: of the syncs that were added up; 0 in the report of a single one.
    """

    bytes_sent: int = 0
    bytes_received: int = 0
    seconds: float = 0.0
    drift: float = 0.0
    skipped: int = 0
    count: int = 1
    largest_drift: float = 0.0

    def __add__(self, later: SyncReport) -> SyncReport:
        """Totals; the drift is that of the later sync."""
        return SyncReport(
            self.bytes_sent + later.bytes_sent,
            self.bytes_received + later.bytes_received,
            self.seconds + later.seconds,
            later.drift,
            self.skipped + later.skipped,
            self.count + later.count,
            max(self.largest_drift, self.drift, later.largest_drift, later.drift),
        )

    def metrics(self) -> dict[str, float]:
        """The report of a sync under the names that are logged."""
        return {f"sync/{name}": float(value) for name, value in vars(self).items() if name != "largest_drift"}


class Synced(NamedTuple):
    """What a sync did, as the algorithm knows it; the engine adds bytes and seconds to a :class:`SyncReport`.

    Attributes:
        drift: distance of this worker from the mean before the sync, relative to the norm of the mean.
        skipped: messages that a trigger held back.
        agreed: whether the parameters are equal on all workers now; gossip, say, only brings them closer.
    """

    drift: float = 0.0
    skipped: int = 0
    agreed: bool = False


class Algorithm(ABC):
    """Configuration of an algorithm: immutable, picklable, and equal to another of the same fields.

    Subclasses are frozen dataclasses that check their fields in ``__post_init__``.
    """

    # Without annotations: LightningCLI reads those of a base class in the module of each algorithm.
    is_outer_loop = False
    """Whether it steps from the mean of the workers; such an algorithm can be no other one's base."""

    elementwise = False
    """Whether every element of the parameters moves by itself, but for a base or compressor: no norm, scale or choice
    is taken over several. Then processes that hold shards of a model can each run it on theirs."""

    @property
    def fits_shards(self) -> bool:
        """Whether it does the same to a model's shards as to whole tensors, base and compressor included."""
        base, compressor = getattr(self, "base", None), getattr(self, "compressor", None)
        return self.elementwise and compressor is None and (base is None or base.fits_shards)

    @property
    def kind(self) -> str:
        """What decides whether saved state fits: class, schedule, whether it compresses, and the kind of its base."""
        base, compressor = getattr(self, "base", None), getattr(self, "compressor", None)
        kind = type(self).__name__ + getattr(getattr(self, "sync_every", None), "kind", "")
        kind += " with compressor" if compressor is not None else ""
        return kind + (f" over {base.kind}" if base is not None else "")

    @abstractmethod
    def bind(self, optimizer: Optimizer, workers: Workers) -> Running:
        """Make the running state of this algorithm for one optimizer.

        Args:
            optimizer: the user's own; its parameter groups say what is synced and at which learning rates.
            workers: who takes part.
        """

    def syncs(self, layout: Layout, workers: int) -> list[traffic.Sync]:
        """All communication of this algorithm, by kind; see :mod:`lightning_slowmo.traffic` for what to make it of.

        Args:
            layout: of the parameters.
            workers: how many, two at least.

        Raises:
            ValueError: if the algorithm does not say what it sends, or its topology does not fit the workers.
        """
        raise ValueError(f"What {type(self).__name__} sends is not known here.")

    def average_sync(self, layout: Layout, workers: int) -> traffic.Sync:
        """The average of an outer loop over this algorithm, without the header: an all-reduce by default."""
        return traffic.all_reduce(layout, workers)

    def state_numel(self, layout: Layout, workers: int) -> float:
        """Elements that a worker keeps beside parameters, gradients and the optimizer's state; see :meth:`syncs`."""
        raise ValueError(f"What {type(self).__name__} keeps is not known here.")


class Running(ABC):
    """An algorithm at work on one optimizer. It alone owns the algorithm's buffers and messages.

    The engine calls, in this order: :meth:`sync_gradients` when gradients are complete (if it exchanges them),
    :meth:`after_step` after each optimizer step, and :meth:`sync` once the workers have met, if any of them said that
    one was :meth:`due`.

    Args:
        optimizer: the user's own.
        workers: who takes part.
        base: the algorithm inside, if this is an outer loop: both share a layout and an averager.
        fragments: number of parts in which parameters are averaged.

    Attributes:
        layout: how the trained parameters lie in messages.
        averager: makes means of them.
        iterates: the optimizer's own copies of the parameters, which must meet as these do.
        innermost: the algorithm inside all outer loops, which counts steps and exchanges gradients: this one itself, if
            it is no outer loop.
        pending: local steps since the parameters were last averaged; on the innermost algorithm alone.
        loss_scale: what a gradient scaler has multiplied this worker's gradients by; None if there is no scaler.
        clock: says how long a period is; None for algorithms without periods.
    """

    clock: Clock | None = None

    exchanges_gradients = False
    """Whether :meth:`sync_gradients` communicates."""

    def __init__(self, optimizer: Optimizer, workers: Workers, base: Running | None = None, fragments: int = 1) -> None:
        self.optimizer = optimizer
        self.workers = workers
        self.innermost: Running = base.innermost if base is not None else self
        layout = base.layout if base is not None else Layout(self.groups(), workers.sizes, fragments=fragments)
        self.layout: Layout = layout
        self.averager: Averager = base.averager if base is not None else ExactAverager(self.layout, workers)
        self.iterates: Iterates = base.iterates if base is not None else Iterates(optimizer)
        self.pending = 0
        self.loss_scale: float | None = None

    def groups(self) -> list[list[Tensor]]:
        """What is synced: the parameters of each parameter group of the optimizer that are not frozen."""
        return [[p for p in group["params"] if p.requires_grad] for group in self.optimizer.param_groups]

    def place_slow_state(self, shard: bool, offload: bool) -> None:
        """Keep slow state elsewhere than whole and beside the parameters. Called once, before training.

        Args:
            shard: whether each worker keeps a share only.
            offload: whether it is kept in the CPU's memory.

        Raises:
            ValueError: if the algorithm cannot do that.
        """
        raise ValueError(
            f"{type(self).__name__.removeprefix('Running')} has no slow state to shard or offload; leave out "
            "shard_slow_state and offload_slow_state."
        )

    def join(self) -> None:
        """Make room for parameters that joined the optimizer or were unfrozen since the last step."""
        if not self.layout.covers(self.groups()):
            self.averager.drain()
            self.adopt_layout(Layout(self.groups(), self.workers.sizes, fragments=self.layout.fragments))

    def adopt_layout(self, layout: Layout) -> None:
        """Take over a new layout. Algorithms with slow state carry it along."""
        self.averager.adopt_layout(layout)
        self.layout = layout

    # Steps and syncs --------------------------------------------------------------------------------------------------

    def after_step(self) -> None:
        """Count a local step."""
        self.pending += 1

    @abstractmethod
    def due(self) -> Level:
        """Which parts of the algorithm need a sync now; none after most steps."""

    @abstractmethod
    def sync(self, round: Round) -> Synced:
        """Communicate. Called on all workers together."""

    def sync_gradients(self, round: Round) -> None:
        """Exchange gradients. Called on all workers together, only if :attr:`exchanges_gradients`."""

    def moved(self) -> None:
        """Take note that the parameters were changed from outside: by an outer loop, or at the end of training."""

    def catch_up(self, round: Round) -> None:
        """At a meeting without a round, bring workers that have taken different numbers of steps to the same point."""

    # State ------------------------------------------------------------------------------------------------------------

    def shared_state(self) -> dict[str, Any]:
        """State that is equal on all workers: tensors and plain values only. All workers must call this."""
        return {}

    def local_state(self) -> dict[str, Any]:
        """State that differs between workers: tensors and plain values only."""
        return {"pending": self.pending}

    def load_shared_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`shared_state` returned; also with another number of workers."""

    def load_local_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`local_state` returned on this worker."""
        self.pending = state["pending"]


def require_elementwise(algorithm: Algorithm) -> None:
    """Raise ValueError unless an algorithm does the same to shards as to whole tensors."""
    if not algorithm.fits_shards:
        raise ValueError(
            f"{algorithm.kind} does not say that it moves every element by itself: norms, scales or largest elements "
            "of shards would be others than those of whole tensors. With sharded models use AllReduce, LocalSGD, "
            "SlowMo, BMUF, DiLoCo or Gossip, without a compressor or an outer_optimizer of your own."
        )


def learning_rates(optimizer: Optimizer) -> list[float]:
    """The learning rate of each parameter group; 1 where there is none, or where the optimizer sets it (None)."""
    rates = (group.get("lr") for group in optimizer.param_groups)
    return [1.0 if rate is None else float(rate) for rate in rates]


def agreed_rates(optimizer: Optimizer, workers: Workers, round: Round) -> list[float]:
    """The learning rates, by group; their mean over the workers if they differ (a local plateau scheduler)."""
    rates = learning_rates(optimizer)
    if round.same_rates:
        return rates
    return [math.fsum(column) / workers.size for column in zip(*workers.gather(rates), strict=True)]


def check_period(name: str, value: Any, least: int = 1) -> None:
    """Raise ValueError unless ``value`` is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}.")


def check_momentum(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is a number in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"{name} must be a number in [0, 1), got {value!r}.")


def check_rate(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is a finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}.")


def check_compressor(value: Any) -> None:
    """Raise ValueError unless ``value`` is a compressor."""
    if not isinstance(value, Compressor):
        raise ValueError(f"compressor must be a compressor such as QSGD(bits=4), got {value!r}.")
