"""Means that travel while training goes on (*overlap*), and of a part of the parameters at a time (*fragments*).

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

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_slowmo.averaging.averager import Averager, OnSum, check_fragments, copy_state
from lightning_slowmo.averaging.drift import Drift
from lightning_slowmo.averaging.kernels import table_of
from lightning_slowmo.averaging.mean import average, fuses, state_of, take_mean
from lightning_slowmo.communication.meeting import Round
from lightning_slowmo.communication.pipeline import UnderWay, start
from lightning_slowmo.communication.workers import Workers
from lightning_slowmo.parameters import Bucket, Layout
from lightning_slowmo.scratch import Scratch
from lightning_slowmo.triton_support import works_on


@dataclass
class Flight:
    """A mean of parameters that is on its way while training goes on.

    Attributes:
        buckets: the parameters.
        sent: s, what this worker sent, one flat tensor per bucket.
        new: y as soon as it has arrived, one flat tensor per bucket.
        sums: the sums that become y; none once it has arrived.
        on_sum: makes y from the sum.
        steps: local steps since it was sent.
        stream: of the GPU, for all that does not touch the parameters; None on a CPU.
    """

    buckets: Sequence[Bucket]
    sent: list[Tensor]
    new: list[Tensor]
    sums: list[UnderWay[float]] = field(default_factory=list)
    on_sum: OnSum | None = None
    steps: int = 0
    stream: torch.cuda.Stream | None = None
    _drift: Drift | None = None

    @classmethod
    def send(
        cls,
        buckets: Sequence[Bucket],
        workers: Workers,
        scratch: Scratch,
        weights: Sequence[float] | None = None,
        on_sum: OnSum | None = None,
        stream: torch.cuda.Stream | None = None,
    ) -> Flight:
        """Send all buckets at once, in the same order as the other workers, and wait for nobody.

        Args:
            buckets: the parameters.
            workers: all of whom must call this.
            scratch: two buffers for each bucket, that nobody else uses until the flight has landed.
            weights: weight of each worker, by rank; equal if None.
            on_sum: makes y from the sum.
            stream: where to copy, send and add up, behind the training's own. The parameters are read before, in the
                order of the program: whoever changes them next need not know of this.
        """
        self = cls(buckets, [], [], on_sum=on_sum, stream=stream)
        for bucket in buckets:
            sent, new = (scratch.allot(bucket, bucket.numel)[: bucket.numel] for _ in range(2))
            table = table_of(bucket)
            self.sent.append(bucket.copy_to(sent) if table is None else table.gather(sent))
            self.new.append(new)
        with self._aside():
            for sent, new in zip(self.sent, self.new, strict=True):
                self.sums.append(start(workers.sum(new.copy_(sent), weights)))
        return self

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Let the GPU do what is asked for in this context in the flight's stream, after all that it has to do now."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            yield

    @property
    def drift(self) -> float:
        """This worker's distance from the mean, relative to the norm of the mean; 0 until that is known."""
        return self._drift.value() if self._drift is not None else 0.0

    def arrive(self) -> None:
        """Wait until the mean has come, and make y of it. The parameters stay as they are.

        Raises:
            SyncError: if a worker did not take part in time.
        """
        if not self.sums:
            return
        drift = Drift(sum(bucket.numel for bucket in self.buckets))
        with self._aside():
            for bucket, sent, new, sum_ in zip(self.buckets, self.sent, self.new, self.sums, strict=True):
                weight = sum_.wait()
                if works_on(bucket.device) and fuses(bucket, self.on_sum):
                    from lightning_slowmo.averaging.kernels.table import move_flat

                    state = state_of(self.on_sum, bucket, weight)
                    move_flat(new, weight, bucket.parameter_dtype, sent, drift, **state)
                    continue
                drift.compare(drift.sample(sent), new, weight)
                take_mean(bucket, new, weight, self.on_sum)
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)
        self.sums = []
        self._drift = drift

    def correct(self, scratch: Scratch) -> None:
        """Let the parameters x become y + (x - s). Written so, what has not moved since becomes y to the last bit.

        Args:
            scratch: a buffer for the bucket in hand.
        """
        for bucket, sent, new in zip(self.buckets, self.sent, self.new, strict=True):
            table = table_of(bucket)
            if table is not None:
                table.correct(sent, new)
                continue
            flat = bucket.pack(scratch.take(bucket))
            for (_, x), (_, s), (_, y) in zip(*map(bucket.blocks, (flat, sent, new)), strict=True):
                x.sub_(s).add_(y)
            bucket.unpack(flat)


class DelayedAverager(Averager):
    """Average one fragment after the other, each behind the next steps.

    Whichever worker came to a sync, all take part, so the fragments' turns are the same everywhere. A worker that has
    taken fewer than ``overlap`` steps until the next sync, as its inputs have ended, takes in then what is under way.

    Args:
        layout: the parameters, cut into fragments.
        workers: who takes part.
        overlap: steps for which an average is under way; 0 waits for it.

    Attributes:
        steps: for each fragment, steps of each worker from its last average to the last sync, by rank.
        in_flight: the average under way, which may have arrived already.

    Raises:
        ValueError: if there are fewer parameters than fragments.
    """

    def __init__(self, layout: Layout, workers: Workers, overlap: int) -> None:
        super().__init__(layout, workers)
        if {run.fragment for run in layout.runs} != set(range(layout.fragments)):
            raise ValueError(
                f"fragments must be at most the number of trained parameters, {len(layout.parameters)}, as parameters "
                f"stay whole; got {layout.fragments}."
            )
        self.overlap = overlap
        self.steps = [[0] * workers.size for _ in range(layout.fragments)]
        self.in_flight: Flight | None = None
        self._landed: Flight | None = None
        self._drift = 0.0
        self._room = self._make_room()
        self._stream = self._make_stream()

    def _make_stream(self) -> torch.cuda.Stream | None:
        """A stream for what travels, if all parameters are on one GPU."""
        devices = {bucket.device for bucket in self.layout.buckets}
        if len(devices) != 1 or not all(device.type == "cuda" for device in devices):
            return None
        return torch.cuda.Stream(devices.pop())

    def _make_room(self) -> Scratch:
        """Memory for what was sent, and for its mean, of one fragment at a time."""
        return Scratch(2 * max(len(self.layout.fragment(index)) for index in range(self.layout.fragments)))

    def after_step(self) -> bool:
        """Count the steps during which an average is under way."""
        if self.in_flight is None:
            return False
        self.in_flight.steps += 1
        return self.in_flight.steps >= self.overlap

    def agrees(self, round: Round) -> bool:
        """Not while averages are under way or in parts, unless everything is averaged because of a sick worker."""
        return not all(round.healthy)

    def average(self, round: Round, on_sum: OnSum | None = None) -> float:
        """Average the fragment whose turn it is, at once or delayed; all fragments at once if a worker is not healthy.

        Returns:
            The drift of this worker; with overlap, that of the last average that has arrived.
        """
        self.land()
        if self._landed is not None:  # a GPU need not be waited for before somebody asks for the figure
            self._drift, self._landed = self._landed.drift, None
        chosen, fragments, well = self.fragment, range(self.layout.fragments), all(round.healthy)
        averaged = [chosen] if well else list(fragments)  # what a worker has lost, it needs now
        if well and self.overlap:
            buckets, weights = self.layout.fragment(chosen), self._weights(chosen, round)
            self.in_flight = Flight.send(buckets, self.workers, self._room, weights, on_sum, self._stream)
        else:
            drifts = {index: self._average(index, round, on_sum if index == chosen else None) for index in averaged}
            self._drift = drifts[chosen]
        none = [0] * self.workers.size
        self.steps = [none if index in averaged else self._steps_of(index, round) for index in fragments]
        self.fragment = (chosen + 1) % len(fragments)
        return self._drift

    def _average(self, index: int, round: Round, on_sum: OnSum | None = None) -> float:
        weights = self._weights(index, round)
        return average(self.layout.fragment(index), self.workers, self.scratch, weights, on_sum)

    def _weights(self, index: int, round: Round) -> list[float]:
        """The weight of each worker in the mean of a fragment."""
        return replace(round, pending=self._steps_of(index, round)).weights

    def _steps_of(self, index: int, round: Round) -> list[int]:
        """The steps of each worker since a fragment was averaged, by rank."""
        return [earlier + now for earlier, now in zip(self.steps[index], round.pending, strict=True)]

    def drain(self) -> None:
        """Wait for what is under way; the outer step, if there is one, is made. It is taken in when its time comes."""
        if self.in_flight is not None:
            self.in_flight.arrive()

    def land(self) -> None:
        """Take in what is under way."""
        if self.in_flight is not None:
            self.in_flight.arrive()
            self.in_flight.correct(self.scratch)
            self._landed, self.in_flight = self.in_flight, None

    def consensus(self, round: Round) -> None:
        """Overwrite the parameters with the mean of what they would be if what is under way were taken in already.

        It stays under way: nothing but the parameters changes.
        """
        if self.in_flight is not None:
            self.in_flight.arrive()
            self.in_flight.correct(self.scratch)
        for index in range(self.layout.fragments):
            self._average(index, round)

    def finish(self, round: Round) -> None:
        """End with the consensus; what was under way is in it."""
        self.consensus(round)
        self.in_flight = None

    def adopt_layout(self, layout: Layout) -> None:
        """Take over a new layout, and take in what is under way."""
        self.land()
        super().adopt_layout(layout)
        self._room, self._stream = self._make_room(), self._make_stream()

    # State ------------------------------------------------------------------------------------------------------------

    def shared_state(self) -> dict[str, Any]:
        """Whose turn it is."""
        return {"fragments": self.layout.fragments, "fragment": self.fragment}

    def local_state(self) -> dict[str, Any]:
        """The counts of steps, and what is under way, which is waited for."""
        return {"steps": self.steps, "in_flight": self._flight_state()}

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
        """Restore what :meth:`shared_state` returned. By itself it lets nothing be under way."""
        check_fragments(state, self.layout.fragments)
        self.fragment = state.get("fragment", 0)
        self.in_flight = None

    def load_local_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`local_state` returned on this worker."""
        self.steps = state.get("steps", self.steps)
        flight = state.get("in_flight")
        if flight is None:
            return
        buckets, buffers = self.layout.fragment(self._last()), {"sent": self.layout.zeros(), "new": self.layout.zeros()}
        for name, flats in buffers.items():
            copy_state(self._of_last(flats), flight[name], "average in flight")
        sent, new = ([bucket.of(flats) for bucket in buckets] for flats in buffers.values())
        self.in_flight = Flight(buckets, sent, new, steps=flight["steps"])
