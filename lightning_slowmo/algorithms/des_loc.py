"""DES-LOC: local Adam whose parameters and moments are averaged at periods of their own.

Iacob et al., "DES-LOC: Desynced Low Communication Adaptive Optimizers for Training Foundation Models", 2025,
https://arxiv.org/abs/2505.22549. Moments change slowly, and need not be averaged as often as parameters::

    after every K_x steps x = mean_i x_i;    every K_u steps u = mean_i u_i;    every K_v steps v = mean_i v_i

for Adam's first moment u and second moment v. With equal periods it is Local Adam of which everything is averaged.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch.optim import Adam, AdamW, Optimizer

from lightning_slowmo import traffic
from lightning_slowmo.algorithms.base import Algorithm, Running, Synced, check_period
from lightning_slowmo.algorithms.local_sgd import RunningLocalSGD
from lightning_slowmo.algorithms.schedules import Schedule
from lightning_slowmo.averaging import average_tensors
from lightning_slowmo.communication.meeting import Level, Round
from lightning_slowmo.communication.workers import Workers
from lightning_slowmo.parameters import Layout
from lightning_slowmo.storage import as_real


@dataclass(frozen=True)
class DESLOC(Algorithm):
    """Average parameters, first moments and second moments of Adam at three periods.

    Args:
        sync_every: optimizer steps between averages of the parameters, the paper's K_x.
        first_every: of the first moments, K_u; None is three times ``sync_every``, as the paper recommends.
        second_every: of the second moments, K_v; None is six times ``sync_every``.

    Raises:
        ValueError: if an argument is out of its range. :meth:`bind` raises it unless the optimizer is Adam or AdamW
            without amsgrad.

    Example::

        Trainer(strategy=SlowMoStrategy(DESLOC(sync_every=64)))
    """

    sync_every: int = 64
    first_every: int | None = None
    second_every: int | None = None

    def __post_init__(self) -> None:
        for name in ("sync_every", "first_every", "second_every"):
            value = getattr(self, name)
            if isinstance(value, Schedule):
                raise ValueError(
                    f"{name} of DESLOC must be an integer, got {value!r}: each of the three counts from the beginning "
                    "of training, and periods that change would end together no more. With a schedule, "
                    "SlowMo(slow_momentum=0, inner_buffers='average') averages parameters and both moments."
                )
            if value is not None or name == "sync_every":
                check_period(name, value)

    @property
    def periods(self) -> dict[str, int]:
        """Of Adam's two buffers, by their names in its state."""
        return {
            "exp_avg": self.first_every or 3 * self.sync_every,
            "exp_avg_sq": self.second_every or 6 * self.sync_every,
        }

    def bind(self, optimizer: Optimizer, workers: Workers) -> Running:
        """Make the running state for one optimizer."""
        return RunningDESLOC(self, optimizer, workers)

    def syncs(self, layout: Layout, workers: int) -> list[traffic.Sync]:
        """An average of the parameters, and one of each moment; headers are shared where they fall together."""
        head, mean = (traffic.header(workers), traffic.header(workers, 2)), traffic.all_reduce(layout, workers)
        present = traffic.header(workers, len(layout.parameters))
        kinds = [traffic.together(self.sync_every, *head, mean)]
        for every in self.periods.values():
            own = head if every % self.sync_every else ()
            kinds.append(replace(traffic.together(every, *own, present, mean), every=every))
        return kinds

    def state_numel(self, layout: Layout, workers: int) -> float:
        """Nothing."""
        return 0


class RunningDESLOC(RunningLocalSGD):
    """DES-LOC at work.

    Attributes:
        averaged: steps after which each moment was averaged last; equal on all workers.
    """

    def __init__(self, config: DESLOC, optimizer: Optimizer, workers: Workers) -> None:
        if not isinstance(optimizer, (Adam, AdamW)):
            raise ValueError(f"DESLOC needs torch.optim.Adam or AdamW, got {type(optimizer).__name__}.")
        if any(group["amsgrad"] for group in optimizer.param_groups):
            raise ValueError("DESLOC averages Adam's two moments, which does not go with amsgrad=True.")
        super().__init__(config.sync_every, optimizer, workers)
        self.config = config
        self.clock.agrees = True
        self.averaged = dict.fromkeys(config.periods, 0)

    def _due_moments(self) -> list[str]:
        periods = self.config.periods
        return [name for name, last in self.averaged.items() if self.clock.taken - last >= periods[name]]

    def due(self) -> Level:
        """When anything is to be averaged."""
        return Level.BASE if super().due() or self._due_moments() else Level.NONE

    def sync(self, round: Round) -> Synced:
        """Average what is due."""
        whole = max(round.pending) >= self.config.sync_every or not all(round.healthy)
        weights = round.weights
        if whole:
            synced = super().sync(round)
        else:
            self.clock.agree()
            synced = Synced()
        for name in self._due_moments():
            self._average_moment(name, weights)
            self.averaged[name] = self.clock.taken
        return synced

    def _average_moment(self, name: str, weights: list[float]) -> None:
        """Average one moment of all parameters that have it on all workers."""
        states = [self.optimizer.state.get(parameter) or {} for parameter in self.layout.parameters]
        rows = self.workers.gather([float(name in state) for state in states], "moments")
        shared = [all(column) for column in zip(*rows, strict=True)]
        tensors = [as_real(state[name]) for state, everywhere in zip(states, shared, strict=True) if everywhere]
        average_tensors(tensors, self.workers, weights)

    def shared_state(self) -> dict[str, Any]:
        """When each moment was averaged last, beside the clock."""
        return super().shared_state() | {"averaged": dict(self.averaged)}

    def load_shared_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`shared_state` returned."""
        super().load_shared_state(state)
        self.averaged = dict(state["averaged"])
