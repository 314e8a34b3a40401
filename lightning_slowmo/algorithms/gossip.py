"""Gossip: at every step a worker mixes its model with those of a few peers; nobody waits for a global average.

Three algorithms that differ in when a message is mixed in and in what keeps the mean right:

* SGP, stochastic gradient push. Assran, Loizou, Ballas, Rabbat, "Stochastic Gradient Push for Distributed Deep
  Learning", ICML 2019, https://arxiv.org/abs/1811.10792. Weights need only be column-stochastic, so a graph may be
  directed and irregular: beside its *numerators* x, each worker carries a *push-sum weight* w that is mixed in the same
  way, and takes its gradients at the de-biased model z = x / w::

      x_i½ = x_i - gamma_t d_i(z_i);    x_i = sum_j p_ij x_j½;    w_i = sum_j p_ij w_j;    z_i = x_i / w_i

* OSGP, overlap SGP (same paper): a message is mixed in ``overlap`` steps after it was sent, and travels meanwhile.
* D-PSGD. Lian et al., "Can Decentralized Algorithms Outperform Centralized Algorithms?", NeurIPS 2017,
  https://arxiv.org/abs/1705.09056: doubly stochastic weights, which need no push-sum, and ``combine_while_adapt``::

      x_i = sum_j w_ij x_j - gamma_t d_i(x_i)

The module's parameters hold z at all times. The push-sum weights follow from the mixing matrices alone, which everyone
knows; so every worker computes those of all, and they need not be sent. Where they stay at one (doubly stochastic
weights and no overlap), x *is* the parameters and large ones are sent from their own memory. Elsewhere x is kept beside
them, and a step d of whatever optimizer is read off as x / w less the parameters.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_slowmo import traffic
from lightning_slowmo.algorithms.base import Algorithm, Running, Synced, check_period
from lightning_slowmo.averaging import Contributor, ExactAverager
from lightning_slowmo.averaging.averager import copy_state
from lightning_slowmo.averaging.drift import Drift
from lightning_slowmo.communication.meeting import Level, Round
from lightning_slowmo.communication.pipeline import Transfer, UnderWay, pipeline, start
from lightning_slowmo.communication.workers import Workers
from lightning_slowmo.parameters import Bucket, Layout
from lightning_slowmo.topology import Exchange, Mixing, make

Order = Literal["adapt_then_combine", "combine_while_adapt"]
"""Whether what is mixed has this step's gradient in it already, or gets it afterwards."""


@dataclass(frozen=True)
class Gossip(Algorithm):
    """Mix the model with a few peers' after every optimizer step.

    Args:
        topology: who sends to whom: a name of :data:`lightning_slowmo.topology.NAMES`, a networkx graph, a mixing
            matrix, or a sequence of these, see :func:`lightning_slowmo.topology.make`.
        push_sum: whether to carry push-sum weights. Without them the weights must be doubly stochastic.
        overlap: after how many steps a message is mixed in. 0 waits for it, 1 gives it a step's computation to travel.
            It costs the memory of a model for each message sent and received, per step of delay.
        mixing: how a graph is weighted: ``"uniform"`` or ``"metropolis"``.
        order: ``"adapt_then_combine"`` steps, then mixes the result. ``"combine_while_adapt"`` mixes the models from
            before the step and adds the step, as in D-PSGD's listing.

    Raises:
        ValueError: if an argument is out of its range, or they are at odds with one another. :meth:`bind` raises it if
            the topology does not fit the number of workers.

    Example::

        Trainer(strategy=SlowMoStrategy(SlowMo(base=Gossip("one_peer_exponential"), sync_every=48)))
    """

    elementwise = True

    topology: Any = "one_peer_exponential"
    push_sum: bool = True
    overlap: int = 0
    mixing: Mixing = "uniform"
    order: Order = "adapt_then_combine"

    def __post_init__(self) -> None:
        graph = make(self.topology, self.mixing)
        if not isinstance(self.topology, str):  # a value instead of a graph, which neither compares nor prints as one
            object.__setattr__(self, "topology", graph)
        check_period("overlap", self.overlap, least=0)
        if self.order not in get_args(Order):
            raise ValueError(f"order must be one of {', '.join(get_args(Order))}, got {self.order!r}.")
        if not isinstance(self.push_sum, bool):
            raise ValueError(f"push_sum must be True or False, got {self.push_sum!r}.")
        if self.overlap and not self.push_sum:
            raise ValueError("overlap needs push_sum=True: while mass is in flight, only its weight says how much.")

    def bind(self, optimizer: Optimizer, workers: Workers) -> Running:
        """Make the running state for one optimizer."""
        return RunningGossip(self, optimizer, workers)

    def syncs(self, layout: Layout, workers: int) -> list[traffic.Sync]:
        """At every step a header, and the model to each neighbour."""
        sends = traffic.exchange(layout, workers, self.topology, self.mixing)
        return [traffic.header(workers), replace(sends, behind=self.overlap)]

    def state_numel(self, layout: Layout, workers: int) -> float:
        """Numerators where they differ from the parameters, and the messages that are under way."""
        topology = make(self.topology, self.mixing)
        # Whether weights are doubly stochastic does not change with the number of workers, and a small matrix is cheap.
        few = next(n for n in (min(workers, 16), workers) if topology.supports(n))
        weighted = self.overlap > 0 or not topology.on(few).doubly_stochastic
        numerators = layout.numel * (weighted or self.order == "combine_while_adapt")
        degree = topology.traffic(workers).mean
        return numerators + self.overlap * (1 + degree) * layout.numel


@dataclass
class Late:
    """The messages of one step that have not been mixed in yet.

    Attributes:
        weights: by how much they raise the push-sum weight of each worker, by rank.
        arriving: for each bucket in order, the sum of what comes to this worker; its result is None if nothing does.
    """

    weights: np.ndarray
    arriving: deque[UnderWay[Tensor | None]] = field(default_factory=deque)

    @classmethod
    def of(cls, weights: Iterable[float], layout: Layout, buffers: list[Tensor]) -> Late:
        """Messages that have come already, from their sum as :meth:`total` gives it."""
        return cls(np.array(weights), deque(start(_arrived(bucket.of(buffers))) for bucket in layout.buckets))

    def total(self, layout: Layout) -> list[Tensor]:
        """What the messages add to this worker's numerators, one flat tensor per run."""
        buffers = layout.zeros()
        for bucket, arriving in zip(layout.buckets, self.arriving, strict=True):
            total = arriving.wait()
            if total is not None:
                bucket.of(buffers).copy_(total)
        return buffers


class RunningGossip(Running, Contributor):
    """Gossip at work.

    Attributes:
        schedule: the mixing matrices.
        step: rounds so far, which is the schedule's step; equal on all workers.
        weights: the push-sum weight w of every worker, by rank.
        numerators: x after the last round, one flat tensor per run; None where it is the parameters themselves.
        in_flight: messages not mixed in yet, the oldest first; at most ``overlap`` steps of them.
    """

    def __init__(self, config: Gossip, optimizer: Optimizer, workers: Workers) -> None:
        super().__init__(optimizer, workers)
        self.averager = ExactAverager(self.layout, workers, self)
        self.config = config
        self.schedule = make(config.topology, config.mixing).on(workers.size)
        if not (config.push_sum or self.schedule.doubly_stochastic):
            raise ValueError(
                f"Without push-sum, the weights must be doubly stochastic, and those of {config.topology!r} on "
                f"{workers.size} workers are not. Use push_sum=True, or mixing='metropolis' if the graph is undirected."
            )
        self.step = 0
        self.weights = np.ones(workers.size)
        self.in_flight: deque[Late] = deque()
        self.numerators: list[Tensor] | None = None
        self._weighted = config.overlap > 0 or not self.schedule.doubly_stochastic
        if not workers.alone:
            if self._weighted or config.order == "combine_while_adapt":
                self.numerators = self.layout.snapshot()
            # NCCL wants all workers in the first communication of a group, and not everybody has a peer at every step.
            workers.broadcast(torch.zeros(1, device=self.layout.runs[0].device))

    @property
    def weight(self) -> float:
        """This worker's push-sum weight."""
        return float(self.weights[self.workers.rank])

    def due(self) -> Level:
        """After every step."""
        return Level.BASE if self.pending else Level.NONE

    # Rounds -----------------------------------------------------------------------------------------------------------

    def sync(self, round: Round) -> Synced:
        """Send this worker's model, and mix in what came.

        The drift is an estimate: this worker's distance from the mix that it makes, as the mean of all is not known.
        """
        if self.workers.alone:
            self.pending = 0
            return Synced()
        if not all(round.healthy):  # what a worker lost, nobody else has: begin anew together
            synced = Synced(self.averager.average(round))
        else:
            synced = Synced(self._mix())
            self.step += 1
        self.pending = 0
        return synced

    def _mix(self) -> float:
        """One step of gossip, bucket by bucket, a few of them under way. Returns the drift."""
        plan, matrix = self.schedule.exchange(self.workers.rank, self.step), self.schedule.weights(self.step)
        old, kept = self.weight, matrix.diagonal() * self.weights
        leaving = Late(matrix @ self.weights - kept)  # p_ij w_j of all other j
        self.in_flight.append(leaving)
        arriving = [self.in_flight.popleft() for _ in range(len(self.in_flight) - self.config.overlap)]
        if self._weighted:
            self.weights = sum((late.weights for late in arriving), kept)  # w_i = sum_j p_ij w_j
        drift = Drift(self.layout.numel)
        transfers = (self._mix_bucket(bucket, plan, old, leaving, arriving, drift) for bucket in self.layout.buckets)
        pipeline(transfers, depth=self.averager.scratch.count)
        return drift.value()

    def _mix_bucket(
        self, bucket: Bucket, plan: Exchange, old: float, leaving: Late, arriving: list[Late], drift: Drift
    ) -> Transfer[None]:
        """SGP's equations for one bucket, or D-PSGD's; ``z`` are the module's parameters, ``old`` the weight w_i."""
        z = bucket.pack(self.averager.scratch.take(bucket))
        local, x, step = drift.sample(z), z, None
        if self.numerators is not None:
            x = bucket.of(self.numerators)
            step = z.sub_(bucket.rounded(x / old))  # - gamma_t d_i(z_i), whatever the optimizer is
            if self.config.order == "adapt_then_combine":
                x.add_(step)  # x_i½ = x_i - gamma_t d_i(z_i)
                step = None
        message = x.clone() if self.config.overlap else x
        leaving.arriving.append(start(self._shares(message, plan)))
        yield
        totals = [late.arriving.popleft().wait() for late in arriving]
        x.mul_(plan.self_weight)  # only now, since x itself may have been on its way
        for total in totals:
            if total is not None:
                x.add_(total)  # x_i = sum_j p_ij x_j½
        if step is not None:
            x.add_(step)  # D-PSGD: x_i = sum_j w_ij x_j - gamma_t d_i(x_i)
        if x is not z:
            torch.div(x, self.weight, out=z)  # z_i = x_i / w_i
        drift.compare(local, z, 1.0)
        bucket.unpack(z)

    def _shares(self, message: Tensor, plan: Exchange) -> Transfer[Tensor | None]:
        """Send a message to this step's peers; the sum of this worker's shares p_ij of theirs, None if none comes."""
        receivers, senders = [peer for peer, _ in plan.sends], [peer for peer, _ in plan.receives]
        messages = yield from self.workers.send_and_receive(message, receivers, senders)
        if not messages:
            return None
        (total, *others), (first, *shares) = messages, [share for _, share in plan.receives]
        if first != 1:
            total.mul_(first)
        for other, share in zip(others, shares, strict=True):
            total.add_(other, alpha=share)
        return total

    def restart(self) -> None:
        """All workers stand at one point, an exact average of all mass: gossip begins anew with weights of one.

        The average stands in for the gossip of a step, so the schedule moves on.
        """
        self.in_flight.clear()
        self.weights = np.ones(self.workers.size)
        if self.numerators is not None:
            self.numerators = self.layout.snapshot()
        self.step += 1

    def drain(self) -> None:
        """Wait until the messages in flight have come. They stay where they are until it is their turn."""
        for late in self.in_flight:
            for arriving in late.arriving:
                arriving.wait()

    def moved(self) -> None:
        """Move all mass that is this worker's as the parameters were moved, also that on its way here.

        The parameters are then x / w again, and the mean of all mass moves by the mean of the workers' moves.
        """
        if self.numerators is None:
            return
        for index, bucket in enumerate(self.layout.buckets):
            x = bucket.of(self.numerators)
            move = bucket.pack(self.averager.scratch.take(bucket)) - bucket.rounded(x / self.weight)
            x.add_(move, alpha=self.weight)
            for late in self.in_flight:
                total = late.arriving[index].wait()
                if total is not None:
                    total.add_(move, alpha=float(late.weights[self.workers.rank]))

    def contribute(self, round: Round) -> list[float]:
        """Let the parameters hold the de-biased model of all mass that is this worker's, also that on its way here.

        Numerators and weights stay as they are, so what is overwritten can be restored. In an average, workers weigh
        as much mass as they hold: the steps that each took are in the mass of all, and to weigh by them would count
        some twice.

        Returns:
            The push-sum weight that each worker then has; 0 for those who are not healthy.
        """
        weights = sum((late.weights for late in self.in_flight), self.weights)
        if self.numerators is not None:
            arriving = [late.total(self.layout) for late in self.in_flight]
            for bucket in self.layout.buckets:
                x = bucket.of(self.numerators)
                model = bucket.pack(self.averager.scratch.take(bucket))
                model.sub_(bucket.rounded(x / self.weight)).add_(x)  # and a step that was not mixed in yet
                for buffers in arriving:
                    model.add_(bucket.of(buffers))
                bucket.unpack(model.div_(weights[self.workers.rank]))
        return [float(weight) * healthy for weight, healthy in zip(weights, round.healthy, strict=True)]

    def adopt_layout(self, layout: Layout) -> None:
        """Take over a new layout.

        What is in flight of a parameter that joins counts as if the senders had had this worker's value of it, which is
        so wherever it was the same for all until now.
        """
        if self.numerators is not None:
            self.numerators, *arriving = [
                self._carried(layout, buffers, float(weights[self.workers.rank]))
                for buffers, weights in [
                    (self.numerators, self.weights),
                    *((late.total(self.layout), late.weights) for late in self.in_flight),
                ]
            ]
            pairs = zip(self.in_flight, arriving, strict=True)
            self.in_flight = deque(Late.of(late.weights, layout, buffers) for late, buffers in pairs)
        super().adopt_layout(layout)

    def _carried(self, layout: Layout, buffers: list[Tensor], weight: float) -> list[Tensor]:
        """Numerators in a new layout; those of parameters that join are their present values times the weight."""
        carried = [flat.mul_(weight) for flat in layout.snapshot()]
        layout.carry(self.layout, buffers, carried)
        return carried

    # State ------------------------------------------------------------------------------------------------------------

    def shared_state(self) -> dict[str, Any]:
        """The phase of the schedule."""
        return {"step": self.step}

    def local_state(self) -> dict[str, Any]:
        """Push-sum weights, numerators, and the messages in flight, which are waited for."""
        return super().local_state() | {
            "weights": self.weights.tolist(),
            "numerators": self.layout.per_parameter(self.numerators) if self.numerators is not None else [],
            "in_flight": [
                {"weights": late.weights.tolist(), "numerators": self.layout.per_parameter(late.total(self.layout))}
                for late in self.in_flight
            ],
        }

    def load_shared_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`shared_state` returned. By itself it lets gossip begin from equal models."""
        self.step = state["step"]

    def load_local_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`local_state` returned.

        Raises:
            ValueError: if it is of a gossip that keeps other state.
        """
        if bool(state["numerators"]) != (self.numerators is not None):
            raise ValueError(
                "The checkpoint was saved with other settings of Gossip, which keep other state. Resume with the same "
                "topology, overlap and order, or load the weights alone."
            )
        super().load_local_state(state)
        self.weights = np.array(state["weights"])
        self.in_flight.clear()
        if self.numerators is not None:
            copy_state(self.layout.per_parameter(self.numerators), state["numerators"], "push-sum numerators")
        for late in state["in_flight"]:
            buffers = self.layout.zeros()
            copy_state(self.layout.per_parameter(buffers), late["numerators"], "messages in flight")
            self.in_flight.append(Late.of(late["weights"], self.layout, buffers))


def _arrived(total: Tensor) -> Transfer[Tensor | None]:
    """A transfer of something that has come already."""
    yield from ()
    return total
