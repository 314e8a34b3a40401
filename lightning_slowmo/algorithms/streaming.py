"""Averages that travel while training goes on (*overlap*), and of a part of the parameters at a time (*fragments*).

Zhou et al., "DaSGD: Squeezing SGD Parallelization Performance in Distributed Training Using Delayed Averaging", 2020,
https://arxiv.org/abs/2006.00441, and Douillard et al., "Streaming DiLoCo with Overlapping Communication", 2025,
https://arxiv.org/abs/2501.18512. With x_i the parameters of worker i in one of k fragments, whose turn it is every
tau steps, and d steps of overlap::

    after step t, t = j tau        send s_i = x_i, and go on
    after step t + d               x_i = y + (x_i - s_i)        y = mean_i s_i

Between the two, the mean travels behind d steps of computation. Then each worker has made its steps since s_i from the
common y, and for Local SGD the mean of the x_i is what it was. Under an outer loop, y is where the outer step goes from
the mean. When y is taken in depends on steps alone and not on when the mean arrives, so runs are reproducible.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_slowmo.algorithms.base import NOT_DUE, Round, Running, SyncReport, copy_state
from lightning_slowmo.algorithms.iterates import Iterates
from lightning_slowmo.communication.collectives import DelayedAverage, Then, average
from lightning_slowmo.communication.workers import Workers
from lightning_slowmo.parameters import Layout, Scratch


class RunningStreaming(Running):
    """Local SGD whose averages overlap with steps, go by fragments, or both.

    Whichever worker came to a sync, all take part, so the fragments' turns are the same everywhere. A worker that has
    taken fewer than ``overlap`` steps until the next sync, as its inputs have ended, takes in then what is in flight.

    Args:
        sync_every: optimizer steps between two averages of the same fragment.
        overlap: steps for which an average is on its way.
        fragments: number of parts.
        optimizer: the user's own.
        workers: who takes part.

    Attributes:
        every: optimizer steps between syncs.
        fragment: the fragment whose turn it is.
        steps: for each fragment, steps of each worker from its last average to the last sync, by rank.
        in_flight: the average under way, which may have arrived already.

    Raises:
        ValueError: if there are fewer parameters than fragments.
    """

    def __init__(self, sync_every: int, overlap: int, fragments: int, optimizer: Optimizer, workers: Workers) -> None:
        super().__init__(optimizer, workers, fragments=fragments)
        if not all(self.layout.fragment(index) for index in range(fragments)):
            raise ValueError(
                f"fragments must be at most the number of trained parameters, {len(self.layout.parameters)}, as "
                f"parameters stay whole; got {fragments}."
            )
        self.every = sync_every // fragments
        self.overlap = overlap
        self.fragment = 0
        self.steps = [[0] * workers.size for _ in range(fragments)]
        self.in_flight: DelayedAverage | None = None
        self._drift = 0.0
        self._room = self._make_room()

    def _make_room(self) -> Scratch:
        """Memory for what was sent, and for its mean, of one fragment at a time."""
        return Scratch(2 * max(len(self.layout.fragment(index)) for index in range(self.layout.fragments)))

    def due(self) -> int:
        """Level 1 every ``sync_every / fragments`` local steps."""
        return 1 if self.pending >= self.every else NOT_DUE

    def after_step(self) -> None:
        """Count a local step, and take in the average that has been on its way for long enough."""
        super().after_step()
        if self.in_flight is not None:
            self.in_flight.steps += 1
            if self.in_flight.steps >= self.overlap:
                with Iterates(self.optimizer).following(self.workers, weights=None):  # in a sync, the engine does this
                    self._land()

    def sync(self, round: Round) -> SyncReport:
        """Average a fragment, or send it. With overlap, the drift is that of the average before."""
        return SyncReport(drift=self.average(round))

    def average_agrees(self, round: Round) -> bool:
        """Not while averages are on their way or in parts, unless everything is averaged because of a sick worker."""
        return not all(round.healthy)

    agrees_after = average_agrees

    def average(self, round: Round, then: Then | None = None) -> float:
        """Average the fragment whose turn it is, at once or delayed; all fragments at once if a worker is not healthy.

        Returns:
            The drift of this worker; with overlap, that of the last average that has arrived.
        """
        self._land()
        chosen, fragments, well = self.fragment, range(self.layout.fragments), all(round.healthy)
        averaged = [chosen] if well else list(fragments)  # what a worker has lost, it needs now
        if well and self.overlap:
            buckets, weights = self.layout.fragment(chosen), self._weights(chosen, round)
            self.in_flight = DelayedAverage.send(buckets, self.workers, self._room, weights, then)
        else:
            drifts = {index: self._average(index, round, then if index == chosen else None) for index in averaged}
            self._drift = drifts[chosen]
        none = [0] * self.workers.size
        self.steps = [none if index in averaged else self._steps_of(index, round) for index in fragments]
        self.fragment = (chosen + 1) % len(fragments)
        self.pending = 0
        return self._drift

    def _average(self, index: int, round: Round, then: Then | None = None) -> float:
        weights = self._weights(index, round)
        return average(self.layout.fragment(index), self.workers, self.scratch, weights, then)

    def _weights(self, index: int, round: Round) -> list[float]:
        """The weight of each worker in the mean of a fragment."""
        return replace(round, pending=self._steps_of(index, round)).weights

    def _steps_of(self, index: int, round: Round) -> list[int]:
        """The steps of each worker since a fragment was averaged, by rank."""
        return [earlier + now for earlier, now in zip(self.steps[index], round.pending, strict=True)]

    def drain(self) -> None:
        """Wait for what is in flight; the outer step, if there is one, is made. It is taken in when its time comes."""
        if self.in_flight is not None:
            self.in_flight.arrive()

    def _land(self) -> None:
        """Take in what is in flight."""
        if self.in_flight is not None:
            self.in_flight.arrive()
            self.in_flight.correct(self.scratch)
            self._drift = self.in_flight.drift
            self.in_flight = None

    def consensus(self, round: Round) -> None:
        """Overwrite the parameters with the mean of what they would be if what is in flight were taken in already.

        It stays in flight: nothing but the parameters changes.
        """
        if self.in_flight is not None:
            self.in_flight.arrive()
            self.in_flight.correct(self.scratch)
        for index in range(self.layout.fragments):
            self._average(index, round)

    def finish(self, round: Round) -> None:
        """End with the consensus; what was in flight is in it."""
        self.consensus(round)
        self.in_flight = None

    def relayout(self, layout: Layout) -> None:
        """Take over a new layout, and take in what is in flight."""
        self._land()
        super().relayout(layout)
        self._room = self._make_room()

    # State ------------------------------------------------------------------------------------------------------------

    def shared_state(self) -> dict[str, Any]:
        """Whose turn it is."""
        return {"fragments": self.layout.fragments, "fragment": self.fragment}

    def local_state(self) -> dict[str, Any]:
        """The counts of steps, and what is in flight, which is waited for."""
        return super().local_state() | {"steps": self.steps, "in_flight": self._flight_state()}

    def _flight_state(self) -> dict[str, Any] | None:
        flight = self.in_flight
        if flight is None:
            return None
        flight.arrive()
        state: dict[str, Any] = {"steps": flight.steps}
        for name, flats in (("sent", flight.sent), ("new", flight.new)):
            buffers = self.layout.zeros()
            for bucket, flat in zip(flight.buckets, flats, strict=True):
                bucket.of(buffers).copy_(flat)
            state[name] = self._of_last(buffers)
        return state

    def _last(self) -> int:
        """The fragment that was sent last."""
        return (self.fragment - 1) % self.layout.fragments

    def _of_last(self, buffers: list[Tensor]) -> list[Tensor]:
        """Views of buffers, one for each parameter of the fragment that was sent last and in its shape."""
        outside = self.layout.outside(self._last())
        views = zip(self.layout.parameters, self.layout.per_parameter(buffers), strict=True)
        return [view for parameter, view in views if id(parameter) not in outside]

    def load_shared_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`shared_state` returned. By itself it lets nothing be in flight."""
        check_saved(state, self.layout.fragments)
        self.fragment = state.get("fragment", 0)
        self.in_flight = None

    def load_local_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`local_state` returned on this worker."""
        super().load_local_state(state)
        self.steps = state.get("steps", self.steps)
        flight = state.get("in_flight")
        if flight is None:
            return
        buckets, buffers = self.layout.fragment(self._last()), {"sent": self.layout.zeros(), "new": self.layout.zeros()}
        for name, flats in buffers.items():
            copy_state(self._of_last(flats), flight[name], "average in flight")
        sent, new = ([bucket.of(flats) for bucket in buckets] for flats in buffers.values())
        self.in_flight = DelayedAverage(buckets, sent, new, steps=flight["steps"])


def check_saved(state: dict[str, Any], fragments: int) -> None:
    """Raise ValueError if a checkpoint's parameters were averaged in another number of fragments."""
    saved = state.get("fragments", 1)
    if saved != fragments:
        raise ValueError(
            f"The checkpoint was saved with fragments={saved}, and this is fragments={fragments}. Resume with the same "
            "fragments, or load the weights alone."
        )
