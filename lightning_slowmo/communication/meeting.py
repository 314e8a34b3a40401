"""The meeting: a small header, gathered from all workers, before anything else is communicated.

Every sync, validation, save and end of training begins with a *meeting*: one all-gather of a few numbers, the headers.
From them all workers draw the same conclusions, so no collective is ever started, or skipped, on a condition that only
one of them knows. That turns the situations in which data-parallel training hangs (uneven inputs, one worker that wants
to stop, a signal that reaches one process) into ordinary ones.

If somebody came to exchange parameters (a *sync*) or gradients, all workers take part in that *round* first, and meet
again for what they came for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum, IntFlag
from functools import reduce
from operator import or_

from lightning_slowmo.communication.workers import SyncError, Workers


class Level(IntFlag):
    """Which parts of an algorithm communicate in a sync; both may be due at once.

    Attributes:
        NONE: nothing is due.
        BASE: the algorithm itself, or the one inside an outer loop.
        OUTER: the outer loop.
    """

    NONE = 0
    BASE = 1
    OUTER = 2


class Reason(IntEnum):
    """Why a worker comes to a meeting. The first two are rounds of communication, which all workers join.

    PAUSE asks whether all workers are between two batches. It gives way to whatever else the others came for.
    EPOCH_END is where a worker whose batches have run out waits for those that still have some, and helps them: it
    takes part in their rounds, in reductions of their metrics (without a value of its own) and in their validation.
    COLLECTIVE is any operation on the default process group that Lightning, torchmetrics or a user began directly.
    """

    SYNC = 0
    GRADIENTS = 1
    EPOCH_START = 3
    VALIDATION = 4
    SAVE = 5
    TRAIN_END = 6
    REDUCE = 7
    BARRIER = 8
    BROADCAST = 9
    GATHER = 10
    PAUSE = 11
    CONSENSUS = 12
    EPOCH_END = 13
    COLLECTIVE = 14

    @property
    def is_round(self) -> bool:
        """Whether parameters or gradients are exchanged in the course of the meeting."""
        return self in (Reason.SYNC, Reason.GRADIENTS)


_YIELDS_TO = {
    Reason.EPOCH_END: {Reason.EPOCH_START, Reason.VALIDATION},
    Reason.TRAIN_END: {Reason.EPOCH_START, Reason.EPOCH_END},
}
"""What a worker that came for the one lets the others do first; then it meets them again.

At the end of training only if it was a wish to stop: the others then hear of it before their next epoch.
"""

_AT_THE_END = {Reason.EPOCH_END, Reason.VALIDATION}
"""Where a worker may be whose batches have run out, while others still train."""

ONE_RANK_ALONE = (
    " Save (trainer.save_checkpoint, fabric.save) and enter strategy.consensus() on all ranks. To write on rank 0 "
    "alone: `with strategy.consensus(): if strategy.is_global_zero: torch.save(model.state_dict(), path)`; strategy "
    "is trainer.strategy or fabric.strategy."
)
"""What to do instead of saving or exporting on one rank alone."""


OUT_OF_BATCHES = (
    " A worker at the end of its epoch has no batches left, so it cannot take part in an operation that belongs to a "
    "step. Log with on_epoch=True, compute metrics at the end of the epoch, or give every rank equally many batches."
)
"""What to do when steps communicate by themselves and inputs are uneven."""


@dataclass(frozen=True)
class Header:
    """What one worker tells the others at a meeting.

    Attributes:
        reason: why it came.
        optimizer_index: for a round, which optimizer's algorithm is to communicate.
        levels: for a sync, which parts of the algorithm communicate.
        rounds: how many rounds it has taken part in; equal on all workers, or they have lost one another.
        stop: whether it wants training to stop.
        terminate: whether it received SIGTERM.
        save: whether somebody asked it for a checkpoint at a moment when it could not meet the others.
        poisoned: whether its parameters contain NaN or infinity.
        rates: fingerprint of its learning rates, to see whether they are equal everywhere.
        pending: for each optimizer, local steps since the last sync.
    """

    reason: Reason
    optimizer_index: int = 0
    levels: Level = Level.NONE
    rounds: int = 0
    stop: bool = False
    terminate: bool = False
    save: bool = False
    poisoned: bool = False
    rates: int = 0
    pending: tuple[int, ...] = ()

    def numbers(self) -> list[float]:
        """The header as it travels."""
        flags = (self.stop, self.terminate, self.save, self.poisoned)
        place = (self.reason, self.optimizer_index, self.levels, self.rounds)
        return [float(number) for number in (*place, *flags, self.rates, *self.pending)]

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Header:
        """The header that :meth:`numbers` wrote."""
        reason, index, levels, rounds, stop, terminate, save, poisoned, rates, *pending = map(int, numbers)
        flags = bool(stop), bool(terminate), bool(save), bool(poisoned)
        return cls(Reason(reason), index, Level(levels), rounds, *flags, rates, tuple(pending))


@dataclass(frozen=True)
class Round:
    """The circumstances of one round of communication, equal on all workers.

    Attributes:
        levels: which parts of the algorithm communicate.
        pending: local steps of each worker since the last sync, by rank.
        present: which workers came for this round. The others came for something else (their inputs have ended, say):
            they have no new steps or gradients of their own, and only take part in the collectives.
        healthy: which workers have finite parameters; the others are to be left out, and get what the rest agree on.
        same_rates: whether the learning rates are equal on all workers.
    """

    levels: Level = Level.BASE
    pending: Sequence[int] = (1,)
    present: Sequence[bool] = (True,)
    healthy: Sequence[bool] = (True,)
    same_rates: bool = True

    @property
    def weights(self) -> list[float]:
        """The weight of each worker in a mean: its local steps (equal if nobody took any), 0 if it is not healthy."""
        steps = [pending * healthy for pending, healthy in zip(self.pending, self.healthy, strict=True)]
        return [float(weight) for weight in (steps if any(steps) else self.healthy)]


class Meeting:
    """The headers of all workers, and what follows from them: the same on every worker.

    Args:
        headers: one per process, by rank.
        members: the processes that make up each worker, by its rank; None: every process is one.
    """

    def __init__(self, headers: Sequence[Header], members: Sequence[Sequence[int]] | None = None) -> None:
        self.headers = list(headers)
        self.members = [[rank] for rank in range(len(self.headers))] if members is None else members

    @property
    def stop(self) -> bool:
        """Whether any worker wants training to stop."""
        return any(header.stop for header in self.headers)

    @property
    def terminate(self) -> bool:
        """Whether any worker received SIGTERM."""
        return any(header.terminate for header in self.headers)

    @property
    def save(self) -> bool:
        """Whether any worker was asked for a checkpoint."""
        return any(header.save for header in self.headers)

    @property
    def reasons(self) -> set[Reason]:
        """All that the workers came for."""
        return {header.reason for header in self.headers}

    @property
    def leading(self) -> set[Reason]:
        """What the workers came for, less what gives way to something that others came for."""
        came = self.reasons

        def yields(reason: Reason) -> bool:
            return bool(_YIELDS_TO.get(reason, set()) & came) and (reason is not Reason.TRAIN_END or self.stop)

        return {reason for reason in came if reason is not Reason.PAUSE and not yields(reason)} or came

    @property
    def scattered(self) -> bool:
        """Whether the workers came for different reasons, of which some have to wait for others."""
        return len(self.reasons) > 1

    def must_meet_again(self, reason: Reason) -> bool:
        """Whether a worker that came for this has to come again, since others did not come for the same.

        Nobody can validate before those that wait at the end of the epoch have come to validate, too; but an epoch can
        start without those who have no batches in it.
        """
        together = not {Reason.PAUSE, Reason.VALIDATION} & self.reasons
        return self.scattered and not (together and reason in self.leading)

    @property
    def same_rates(self) -> bool:
        """Whether the learning rates are equal on all workers."""
        return len({header.rates for header in self.headers}) == 1

    @property
    def wanted(self) -> Header | None:
        """The round that all workers now take part in, as its header says, or None if nobody came for one.

        Of several, the first optimizer's comes first. It has all the levels that anybody came for. The reduction of a
        metric is a round if some workers have no batches left, and nothing to reduce.
        """
        wanted = [header for header in self.headers if header.reason.is_round]
        if not wanted:
            reductions = [header for header in self.headers if header.reason is Reason.REDUCE]
            others = self.reasons - {Reason.REDUCE}
            return reductions[0] if reductions and others and others <= _AT_THE_END else None
        first = min(wanted, key=lambda header: (header.optimizer_index, header.reason))
        place = (first.optimizer_index, first.reason)
        levels = [header.levels for header in wanted if (header.optimizer_index, header.reason) == place]
        return replace(first, levels=reduce(or_, levels))

    def round(self, wanted: Header) -> Round:
        """The circumstances of a round between the workers that exchange parameters.

        Args:
            wanted: says for what, and of which optimizer.
        """
        index, place = wanted.optimizer_index, (wanted.reason, wanted.optimizer_index)
        first = [self.headers[ranks[0]] for ranks in self.members]  # the processes of a worker step together
        return Round(
            wanted.levels,
            [header.pending[index] for header in first],
            [(header.reason, header.optimizer_index) == place for header in first],
            self.healthy(),
            self.same_rates,
        )

    def healthy(self) -> list[bool]:
        """Which workers have finite parameters, by rank: in all of their processes."""
        return [not any(self.headers[rank].poisoned for rank in ranks) for ranks in self.members]

    def check(self, workers: Workers, together: bool = False) -> None:
        """Make sure that the workers belong together.

        Args:
            workers: all processes.
            together: whether all must have come for the same.

        Raises:
            SyncError: if they came for different reasons that exclude one another, or have lost count of rounds.
        """
        if len({header.rounds for header in self.headers}) > 1:
            rounds = _each(workers, [header.rounds for header in self.headers])
            raise SyncError(f"The workers have taken part in different numbers of syncs: {rounds}.")
        if self.scattered if together else self.wanted is None and len(self.leading) > 1:
            came = _each(workers, [header.reason.name.lower().replace("_", " ") for header in self.headers])
            if {Reason.SAVE, Reason.CONSENSUS} & self.reasons:
                advice = ONE_RANK_ALONE
            else:
                advice = OUT_OF_BATCHES if Reason.EPOCH_END in self.reasons else ""
            raise SyncError(
                f"The workers came together for different reasons: {came}. Do they run the same script?{advice}"
            )


def meet(
    header: Header, workers: Workers, members: Sequence[Sequence[int]] | None = None, together: bool = False
) -> Meeting:
    """Meet the other workers.

    Args:
        header: this worker's.
        workers: all processes.
        members: the processes that make up each worker; None: every process is one.
        together: whether all must have come for the same.

    Raises:
        SyncError: if somebody did not come in time, or came for something else.
    """
    purpose = header.reason.name.lower().replace("_", " ")
    rows = workers.gather(header.numbers(), f"the meeting before {purpose}")
    headers = {row: Header.of(row) for row in set(map(tuple, rows))}  # of many workers, most say the same
    meeting = Meeting([headers[tuple(row)] for row in rows], members)
    meeting.check(workers, together)
    return meeting


def require_equal(workers: Workers, what: str, text: str, advice: str) -> None:
    """Make sure that something is the same on all workers, before anything depends on it.

    Args:
        workers: all of them; each must call this.
        what: its name, for the message.
        text: this worker's description of it.
        advice: what the user can do.

    Raises:
        SyncError: on every worker, with the two differing descriptions.
    """
    texts = workers.gather_text(text)
    for rank, other in enumerate(texts):
        if other != texts[0]:
            at = _first_difference(texts[0], other)
            mine, theirs = texts[0][at : at + 160], other[at : at + 160]
            raise SyncError(
                f"{what} differs between workers: {workers.names[0]} has {mine!r}, "
                f"{workers.names[rank]} has {theirs!r}. {advice}"
            )


def _first_difference(a: str, b: str) -> int:
    """Where two texts part, less some context."""
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return max(0, same - 40)


def _each(workers: Workers, values: Sequence[object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in zip(workers.names, values, strict=True))
