"""The meeting: a small header, gathered from all workers, before anything else is communicated.

Every sync, validation, save and end of training is a meeting, and every meeting begins with one all-gather of a few
numbers. From them all workers draw the same conclusions, so no collective is ever started, or skipped, on a condition
that only one of them knows. That turns the situations in which data-parallel training hangs (uneven inputs, one
worker that wants to stop, a signal that reaches one process) into ordinary ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import reduce
from operator import or_

from lightning_slowmo.communication.workers import SyncError, Workers


class Reason(IntEnum):
    """Why a worker comes to a meeting. The first two are rounds of communication, which everybody present joins.

    PAUSE asks whether all workers are between two batches. It gives way to whatever else the others came for.
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

    @property
    def is_round(self) -> bool:
        """Whether parameters or gradients are exchanged in the course of the meeting."""
        return self in (Reason.SYNC, Reason.GRADIENTS)


ONE_RANK_ALONE = (
    " Call trainer.save_checkpoint() and enter trainer.strategy.consensus() on all ranks. To write on rank 0 alone: "
    "`with trainer.strategy.consensus(): if trainer.is_global_zero: torch.save(model.state_dict(), path)`."
)
"""What to do instead of saving or exporting on one rank alone."""


@dataclass(frozen=True)
class Header:
    """What one worker tells the others at a meeting.

    Attributes:
        reason: why it came.
        unit: for a round, which optimizer's algorithm is to communicate.
        levels: for a sync, which levels of the algorithm communicate, a bit mask.
        round: how many rounds it has taken part in; equal on all workers, or they have lost one another.
        stop: whether it wants training to stop.
        terminate: whether it received SIGTERM.
        save: whether somebody asked it for a checkpoint at a moment when it could not meet the others.
        poisoned: whether its parameters contain NaN or infinity.
        rates: fingerprint of its learning rates, to see whether they are equal everywhere.
        pending: for each optimizer, local steps since the last sync.
    """

    reason: Reason
    unit: int = 0
    levels: int = 0
    round: int = 0
    stop: bool = False
    terminate: bool = False
    save: bool = False
    poisoned: bool = False
    rates: int = 0
    pending: tuple[int, ...] = ()

    def numbers(self) -> list[float]:
        """The header as it travels."""
        flags = (self.stop, self.terminate, self.save, self.poisoned)
        numbers = (self.reason, self.unit, self.levels, self.round, *flags, self.rates, *self.pending)
        return [float(number) for number in numbers]

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Header:
        """The header that :meth:`numbers` wrote."""
        reason, unit, levels, round_, stop, terminate, save, poisoned, rates, *pending = map(int, numbers)
        flags = bool(stop), bool(terminate), bool(save), bool(poisoned)
        return cls(Reason(reason), unit, levels, round_, *flags, rates, tuple(pending))


class Meeting:
    """The headers of all workers, and what follows from them: the same on every worker.

    Args:
        headers: one per process, by rank.
        peers: of these, the workers between which parameters are exchanged, by rank; all if None. (With several
            processes per worker, each process has peers of its own.)
    """

    def __init__(self, headers: Sequence[Header], peers: Sequence[int] | None = None) -> None:
        self.headers = list(headers)
        self.peers = self.headers if peers is None else [self.headers[rank] for rank in peers]

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
    def scattered(self) -> bool:
        """Whether some wanted to pause, but others came for something else, which has to be done first."""
        pausing = [header.reason is Reason.PAUSE for header in self.headers]
        return any(pausing) and not all(pausing)

    @property
    def same_rates(self) -> bool:
        """Whether the learning rates are equal on all workers."""
        return len({header.rates for header in self.headers}) == 1

    @property
    def round(self) -> Header | None:
        """The round that everybody now takes part in, or None if nobody came for one.

        Of several, the first optimizer's comes first. It has all the levels that anybody came for.
        """
        wanted = [header for header in self.headers if header.reason.is_round]
        if not wanted:
            return None
        first = min(wanted, key=lambda header: (header.unit, header.reason))
        levels = [header.levels for header in wanted if (header.unit, header.reason) == (first.unit, first.reason)]
        return replace(first, levels=reduce(or_, levels))

    def pending(self, unit: int) -> list[int]:
        """Local steps of each worker since the last sync of an optimizer, by rank."""
        return [header.pending[unit] for header in self.peers]

    def present(self, chosen: Header) -> list[bool]:
        """Which workers came for a round (the others wait elsewhere and merely help), by rank."""
        return [header.reason == chosen.reason and header.unit == chosen.unit for header in self.peers]

    def healthy(self) -> list[bool]:
        """Which workers have finite parameters, by rank."""
        return [not header.poisoned for header in self.peers]

    def check(self, workers: Workers) -> None:
        """Make sure that the workers belong together.

        Raises:
            SyncError: if they came for different reasons that exclude one another, or have lost count of rounds.
        """
        if len({header.round for header in self.headers}) > 1:
            rounds = _each(workers, [header.round for header in self.headers])
            raise SyncError(f"The workers have taken part in different numbers of syncs: {rounds}.")
        reasons = [header.reason for header in self.headers]
        if self.round is None and len(set(reasons) - {Reason.PAUSE}) > 1:
            came = _each(workers, [reason.name.lower().replace("_", " ") for reason in reasons])
            advice = ONE_RANK_ALONE if {Reason.SAVE, Reason.CONSENSUS} & set(reasons) else ""
            raise SyncError(
                f"The workers came together for different reasons: {came}. Do they run the same script?{advice}"
            )


def meet(header: Header, workers: Workers, peers: Sequence[int] | None = None) -> Meeting:
    """Meet the other workers.

    Args:
        header: this worker's.
        workers: all processes.
        peers: of these, the workers between which parameters are exchanged; all if None.

    Raises:
        SyncError: if somebody did not come in time, or came for something else.
    """
    purpose = header.reason.name.lower().replace("_", " ")
    rows = workers.gather(header.numbers(), f"the meeting before {purpose}")
    meeting = Meeting([Header.of(row) for row in rows], peers)
    meeting.check(workers)
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
