"""What an algorithm is: a configuration that a user writes down, and its running state on one optimizer."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_slowmo.communication.collectives import Then, average, average_sharded
from lightning_slowmo.communication.workers import Workers
from lightning_slowmo.parameters import Layout, Scratch, Shards

NOT_DUE = 0
"""What :meth:`Running.due` returns after a step that needs no communication."""


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
    """

    bytes_sent: int = 0
    bytes_received: int = 0
    seconds: float = 0.0
    drift: float = 0.0
    skipped: int = 0
    count: int = 1

    def __add__(self, later: SyncReport) -> SyncReport:
        """Totals; the drift is that of the later sync."""
        return SyncReport(
            self.bytes_sent + later.bytes_sent,
            self.bytes_received + later.bytes_received,
            self.seconds + later.seconds,
            later.drift,
            self.skipped + later.skipped,
            self.count + later.count,
        )

    def metrics(self) -> dict[str, float]:
        """The report under the names that are logged."""
        return {f"sync/{name}": float(value) for name, value in vars(self).items()}


@dataclass(frozen=True)
class Round:
    """The circumstances of one round of communication, equal on all workers.

    Attributes:
        levels: which levels of the algorithm communicate, a bit mask, see :meth:`Running.due`.
        pending: local steps of each worker since the last sync, by rank.
        present: which workers came for this round; the others wait elsewhere (their inputs ended) and merely help.
        healthy: which workers have finite parameters; the others are to be left out, and get what the rest agree on.
        same_rates: whether the learning rates are equal on all workers.
    """

    levels: int = 1
    pending: Sequence[int] = (1,)
    present: Sequence[bool] = (True,)
    healthy: Sequence[bool] = (True,)
    same_rates: bool = True

    @property
    def weights(self) -> list[float]:
        """The weight of each worker in a mean: its local steps (equal if nobody took any), 0 if it is not healthy."""
        steps = [pending * healthy for pending, healthy in zip(self.pending, self.healthy, strict=True)]
        return [float(weight) for weight in (steps if any(steps) else self.healthy)]


class Algorithm(ABC):
    """Configuration of an algorithm: immutable, picklable, and equal to another of the same fields.

    Subclasses are frozen dataclasses that check their fields in ``__post_init__``.
    """

    @property
    def kind(self) -> str:
        """What decides whether saved state fits: the class, whether it compresses, and the kind of its base."""
        base, compressor = getattr(self, "base", None), getattr(self, "compressor", None)
        kind = type(self).__name__ + (" with compressor" if compressor is not None else "")
        return kind + (f" over {base.kind}" if base is not None else "")

    @abstractmethod
    def bind(self, optimizer: Optimizer, workers: Workers) -> Running:
        """Make the running state of this algorithm for one optimizer.

        Args:
            optimizer: the user's own; its parameter groups say what is synced and at which learning rates.
            workers: who takes part.
        """


class Running(ABC):
    """An algorithm at work on one optimizer. It alone owns the algorithm's buffers and messages.

    The engine calls, in this order: :meth:`sync_gradients` when gradients are complete (if it exchanges them),
    :meth:`before_step` and :meth:`after_step` around each optimizer step, and :meth:`sync` once the workers have met,
    if any of them said that one was :meth:`due`.

    Args:
        optimizer: the user's own.
        workers: who takes part.
        base: the algorithm that this one wraps, if any, with which it shares layout and scratch memory.
        fragments: number of parts in which parameters are averaged.
    """

    level = 1
    """This algorithm's bit in :meth:`due`."""

    exchanges_gradients = False
    """Whether :meth:`sync_gradients` communicates."""

    loss_scale: float | None = None
    """What a gradient scaler has multiplied this worker's gradients by; None if there is no scaler."""

    fragment = 0
    """Which of the layout's fragments :meth:`average` takes next."""

    def __init__(self, optimizer: Optimizer, workers: Workers, base: Running | None = None, fragments: int = 1) -> None:
        self.optimizer = optimizer
        self.workers = workers
        self.scratch: Scratch = base.scratch if base is not None else Scratch()
        self.layout: Layout = base.layout if base is not None else Layout(self.groups(), fragments=fragments)
        self.shards: Shards | None = None
        self.pending = 0

    def groups(self) -> list[list[Tensor]]:
        """What is synced: the parameters of each parameter group of the optimizer that are not frozen."""
        return [[p for p in group["params"] if p.requires_grad] for group in self.optimizer.param_groups]

    def rates(self) -> list[float]:
        """The learning rate of each parameter group; 1 where there is none, or where the optimizer sets it (None)."""
        rates = (group.get("lr") for group in self.optimizer.param_groups)
        return [1.0 if rate is None else float(rate) for rate in rates]

    def is_finite(self) -> bool:
        """Whether all parameters are finite."""
        return are_finite(self.layout.parameters)

    def agrees_after(self, round: Round) -> bool:
        """Whether a sync makes the workers' parameters equal; gossip, say, only brings them closer."""
        return False

    def average_agrees(self, round: Round) -> bool:
        """Whether :meth:`average` makes all of the workers' parameters equal, and at once."""
        return True

    def place_slow_state(self, shard: bool, offload: bool) -> None:
        """Keep slow state elsewhere than whole and beside the parameters. Called once, before training.

        Args:
            shard: whether each worker keeps a piece only.
            offload: whether it is kept in the CPU's memory.

        Raises:
            ValueError: if the algorithm cannot do that.
        """
        raise ValueError(
            f"{type(self).__name__.removeprefix('Running')} has no slow state to shard or offload; leave out "
            "shard_slow_state and offload_slow_state."
        )

    # Steps ------------------------------------------------------------------------------------------------------------

    def before_step(self) -> None:
        """Make room for parameters that joined the optimizer or were unfrozen since the last step."""
        if not self.layout.covers(self.groups()):
            self.drain()
            self.relayout(Layout(self.groups(), fragments=self.layout.fragments))

    def relayout(self, layout: Layout) -> None:
        """Take over a new layout. Algorithms with slow state carry it along."""
        self.layout = layout

    def after_step(self) -> None:
        """Count a local step."""
        self.pending += 1

    @abstractmethod
    def due(self) -> int:
        """Whether the workers must meet now, and what for.

        Returns:
            :data:`NOT_DUE`, or a bit mask of levels: 1 for the innermost algorithm, the next bit for each wrapper.
        """

    # Rounds -----------------------------------------------------------------------------------------------------------

    @abstractmethod
    def sync(self, round: Round) -> SyncReport:
        """Communicate. Called on all workers together.

        Returns:
            Drift and skipped messages; the engine adds bytes and seconds.
        """

    def sync_gradients(self, round: Round) -> None:
        """Exchange gradients. Called on all workers together, only if :attr:`exchanges_gradients`."""

    def average(self, round: Round, then: Then | None = None) -> float:
        """Exact average of the parameters: line 6 of SlowMo's Algorithm 1.

        Workers weigh as many steps as they took since the last sync, which is equal in all but uneven inputs.

        Args:
            round: the circumstances.
            then: what is made of the mean, if the parameters get something else.

        Returns:
            The drift of this worker.
        """
        if self.shards is not None and then is not None:
            drift = average_sharded(self.shards, self.workers, self.scratch, round.weights, then)
        else:
            drift = average(self.layout.buckets, self.workers, self.scratch, round.weights, then)
        self.pending = 0
        return drift

    def moved(self) -> None:
        """Take note that a wrapper has moved the parameters by itself, after :meth:`sync`."""

    def drain(self) -> None:
        """Wait for the messages that are still in flight; all workers have sent theirs."""

    def consensus(self, round: Round) -> None:
        """Overwrite the parameters with the model that is evaluated and saved: the mean over the workers."""
        average(self.layout.buckets, self.workers, self.scratch, round.weights)

    def finish(self, round: Round) -> None:
        """End with the consensus for good: whoever trains on starts from it. Called on all workers together."""
        self.consensus(round)

    def agreed_rates(self, round: Round) -> list[float]:
        """The learning rates, by group; their mean over the workers if they differ (a local plateau scheduler)."""
        rates = self.rates()
        if round.same_rates:
            return rates
        return [math.fsum(column) / self.workers.size for column in zip(*self.workers.gather(rates), strict=True)]

    def regroup(self, round: Round) -> None:
        """All workers have come to a meeting that is not a round, some of them perhaps from fewer steps than others."""

    # State ------------------------------------------------------------------------------------------------------------

    def shared_state(self) -> dict[str, Any]:
        """State that is equal on all workers: tensors and plain values only."""
        return {}

    def local_state(self) -> dict[str, Any]:
        """State that differs between workers: tensors and plain values only."""
        return {"pending": self.pending}

    def load_shared_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`shared_state` returned; also with another number of workers."""

    def load_local_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`local_state` returned on this worker."""
        self.pending = state["pending"]


def are_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all elements of all tensors are finite."""
    if not tensors:
        return True
    tensors = [tensor.detach() for tensor in tensors]
    norms = [norm.double() for norm in torch._foreach_norm(tensors)]
    if torch.stack(norms).isfinite().all():  # one look, as each of them would make a GPU wait
        return True
    # A norm can overflow though the values do not; looking at each of them is ten times slower, and rare.
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


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


def check_streaming(sync_every: int, overlap: Any, fragments: Any) -> None:
    """Raise ValueError unless ``fragments`` divides ``sync_every``, and ``overlap`` ends before the next sync."""
    check_period("overlap", overlap, least=0)
    check_period("fragments", fragments)
    if sync_every % fragments:
        raise ValueError(f"fragments must divide sync_every, which is {sync_every}, got {fragments!r}.")
    if overlap >= sync_every // fragments:
        raise ValueError(
            f"overlap must be less than the {sync_every // fragments} steps between two syncs (sync_every / fragments),"
            f" got {overlap!r}."
        )


def copy_state(targets: Sequence[Tensor], sources: Sequence[Tensor], what: str) -> None:
    """Copy checkpointed tensors into place.

    Raises:
        ValueError: if number or shapes do not fit the present model.
    """
    if [t.shape for t in targets] != [s.shape for s in sources]:
        raise ValueError(f"The checkpoint's {what} does not fit the parameters of the optimizer; is it the same model?")
    with torch.no_grad():
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
