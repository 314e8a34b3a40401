"""The exact mean of all parameters at once."""

from __future__ import annotations

from lightning_slowmo.averaging.averager import Averager, OnSum
from lightning_slowmo.averaging.mean import average
from lightning_slowmo.averaging.sharded import ShardedAverager
from lightning_slowmo.communication.meeting import Round
from lightning_slowmo.communication.workers import Workers
from lightning_slowmo.parameters import Layout


class Contributor:
    """What a worker contributes to an exact mean, where that is more than its parameters and steps."""

    def contribute(self, round: Round) -> list[float]:
        """Let the parameters hold what this worker contributes.

        Returns:
            What each worker's contribution weighs in the mean, by rank; 0 for those who are not healthy.
        """
        return round.weights

    def restart(self) -> None:
        """Begin anew from the average: all workers hold the same parameters now."""

    def drain(self) -> None:
        """Wait for messages that are under way."""


class ExactAverager(Averager):
    """Average all parameters at once.

    Args:
        layout: the parameters.
        workers: who takes part.
        contributor: says what this worker contributes; None: the parameters, with the weights of the round.
    """

    def __init__(self, layout: Layout, workers: Workers, contributor: Contributor | None = None) -> None:
        super().__init__(layout, workers)
        self.contributor = contributor if contributor is not None else Contributor()
        self._plain = contributor is None

    def average(self, round: Round, on_sum: OnSum | None = None) -> float:
        """Average, and let what begins anew from the common point do so."""
        weights = self.contributor.contribute(round)
        drift = average(self.layout.buckets, self.workers, self.scratch, weights, on_sum)
        self.contributor.restart()
        return drift

    def consensus(self, round: Round) -> None:
        """Overwrite the parameters with the mean of what all workers contribute."""
        average(self.layout.buckets, self.workers, self.scratch, self.contributor.contribute(round))

    def finish(self, round: Round) -> None:
        """End with an exact average."""
        self.average(round)

    def drain(self) -> None:
        """Wait for the contributor's messages."""
        self.contributor.drain()

    def sharded(self) -> Averager:
        """The same average with shares, unless workers contribute other things than their parameters."""
        return ShardedAverager(self.layout, self.workers) if self._plain else super().sharded()
