"""APMSqueeze: Adam whose second moment is frozen after a warm-up, and whose momentum then travels compressed.

Tang, Gan, Rajbhandari, Lian, Liu, He, Zhang, "APMSqueeze: A Communication Efficient Adam-Preconditioned Momentum SGD
Algorithm", 2020, https://arxiv.org/abs/2008.11343; later 1-bit Adam, https://arxiv.org/abs/2102.02888. During T_w steps
it is Adam on averaged gradients. Then v stays v_Tw, and with the compressor C in both shots of a compressed mean::

    m_i = beta1 m + (1 - beta1) g_i;    m = C[mean_i C[m_i + e_i] + e'];    x = x - gamma m / (sqrt(v_Tw) + eps)

where e_i and e' are what workers' messages and owners' sums have left out before.

The user's own Adam or AdamW goes on stepping: from its local step its ``exp_avg`` *is* m_i, after unscaling, clipping
and weight decay as the user set them up, in whatever implementation. The sync after the step replaces exp_avg by m, the
second moment by the frozen one, and the parameters by the step of the listing from where all workers stood.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from lightning_slowmo import traffic
from lightning_slowmo.algorithms.all_reduce import RunningAllReduce
from lightning_slowmo.algorithms.base import (
    Algorithm,
    Running,
    Synced,
    agreed_rates,
    check_compressor,
    check_period,
    check_rate,
)
from lightning_slowmo.averaging.averager import copy_state
from lightning_slowmo.averaging.compressed import generators
from lightning_slowmo.averaging.drift import Drift
from lightning_slowmo.averaging.feedback import Feedback
from lightning_slowmo.averaging.mean import average_tensors
from lightning_slowmo.communication import compressed
from lightning_slowmo.communication.meeting import Level, Round
from lightning_slowmo.communication.pipeline import Transfer, pipeline
from lightning_slowmo.communication.workers import Workers
from lightning_slowmo.compression import Compressor, Sign
from lightning_slowmo.parameters import Bucket, Layout
from lightning_slowmo.storage import as_real

STABLE = 0.96
"""``warmup_steps="auto"`` ends the warm-up when |v| has changed by no more than this ratio in 1 / (1 - beta2) steps."""


@dataclass(frozen=True)
class APMSqueeze(Algorithm):
    """Adam during a warm-up, then momentum SGD with Adam's preconditioner and compressed momentum.

    Args:
        warmup_steps: steps of ordinary Adam; 15 to 25 % of all are usual. ``"auto"``: until the second moment is
            stable.
        compressor: how momenta are compressed.
        uncompressed_below: tensors of fewer elements, such as biases and norms, have their momenta averaged exactly:
            they are few bytes, and one scale for all of a small tensor's signs fits it badly.
        seed: of the compressor's randomness.
        floor: least sqrt(v_Tw) of an element whose momentum is compressed, relative to the root mean square of its
            tensor's. Compressed, the momenta of a tensor have one magnitude; without a floor (0, the paper's listing),
            an element that has hardly had a gradient in the warm-up is thrown thousands of learning rates a step.

    Raises:
        ValueError: if an argument is out of its range. :meth:`bind` raises it unless the optimizer is Adam or AdamW
            without amsgrad.

    Example::

        Trainer(strategy=SlowMoStrategy(APMSqueeze(warmup_steps=2000)))
    """

    warmup_steps: int | Literal["auto"] = "auto"
    compressor: Compressor = field(default_factory=lambda: Sign("l2"))
    uncompressed_below: int = 0
    seed: int = 0
    floor: float = 0.1

    def __post_init__(self) -> None:
        check_rate("floor", self.floor)
        if self.warmup_steps != "auto":
            check_period("warmup_steps", self.warmup_steps)
        check_compressor(self.compressor)
        check_period("uncompressed_below", self.uncompressed_below, least=0)

    @property
    def kind(self) -> str:
        """Where other tensors are compressed, other residuals are kept."""
        below = self.uncompressed_below
        return super().kind + (f" from {below} elements on" if below else "")

    def bind(self, optimizer: Optimizer, workers: Workers) -> Running:
        """Make the running state for one optimizer."""
        return RunningAPMSqueeze(self, optimizer, workers)

    def syncs(self, layout: Layout, workers: int) -> list[traffic.Sync]:
        """At every step after the warm-up: the means of momenta, compressed for large tensors, exact for small ones."""
        small, large = traffic.split_by_size(layout, self.uncompressed_below)
        mean = traffic.compressed_mean(large, workers, self.compressor, "two_shot", feedback=True)
        mean = replace(mean, handled=traffic.TWICE * mean.handled)  # momentum in and out, and the preconditioned step
        heads = traffic.header(workers), traffic.header(workers, 1)
        return [traffic.together(1, *heads, traffic.all_reduce(small, workers), mean)]

    def state_numel(self, layout: Layout, workers: int) -> float:
        """Anchor, momentum, second moment, and what messages and the owned chunk's sums have left out."""
        return layout.numel * (4 + 1 / workers)


class RunningAPMSqueeze(RunningAllReduce):
    """APMSqueeze at work.

    Attributes:
        exchanges: gradients averaged so far, in the warm-up.
        frozen: whether the warm-up is over.
        anchor: x, where all workers stand; one flat tensor per run. This and the following are used once frozen.
        momentum: m, equal on all workers.
        variance: v_Tw, bias-corrected: divided by 1 - beta2^T_w. Where no gradient ever came it is 0, and nothing
            moves.
        unknown: for each bucket, where the second moment is 0; None if nowhere.
        steps: Adam's step count of each parameter.
        feedback: what messages have left out.
        syncs: compressed steps so far.
    """

    def __init__(self, config: APMSqueeze, optimizer: Optimizer, workers: Workers) -> None:
        if not isinstance(optimizer, (Adam, AdamW)):
            raise ValueError(f"APMSqueeze needs torch.optim.Adam or AdamW, got {type(optimizer).__name__}.")
        if any(group["amsgrad"] for group in optimizer.param_groups):
            raise ValueError("APMSqueeze freezes the second moment, which does not go with amsgrad=True.")
        self.config = config
        super().__init__(optimizer, workers)
        self.exchanges = 0
        self.freezing = self.frozen = False
        self.previous_norm = 0.0
        self._allocate(self.layout)
        self.syncs = 0

    def groups(self) -> list[list[Tensor]]:
        """Each parameter group in two, so that no bucket holds both what is compressed and what is not."""
        halves = [(group, small) for group in super().groups() for small in (False, True)]
        return [[p for p in group if self._is_small(p) == small] for group, small in halves]

    def _is_small(self, parameter: Tensor) -> bool:
        return parameter.numel() < self.config.uncompressed_below

    def _allocate(self, layout: Layout) -> None:
        self.anchor, self.momentum, self.variance = layout.snapshot(), layout.zeros(), layout.zeros()
        self.unknown: list[Tensor | None] = []
        self.steps = [0.0] * len(layout.parameters)
        self.feedback = Feedback(layout, self.workers)

    # Warm-up ----------------------------------------------------------------------------------------------------------

    @property
    def exchanges_gradients(self) -> bool:  # type: ignore[override]
        """In the warm-up only."""
        return not self.frozen

    def sync_gradients(self, round: Round) -> None:
        """Average the gradients; after the last of the warm-up, the next sync freezes."""
        super().sync_gradients(round)
        self.exchanges += 1
        if self.config.warmup_steps != "auto":
            self.freezing = self.exchanges >= self.config.warmup_steps

    def after_step(self) -> None:
        """Count a step."""
        if self.frozen:
            self.pending = 1
        elif self.config.warmup_steps == "auto" and not self.freezing:
            self.freezing = self._is_stable()

    def due(self) -> Level:
        """At the end of the warm-up, and after every step from then on."""
        return Level.BASE if self.freezing or (self.frozen and self.pending) else Level.NONE

    def _is_stable(self) -> bool:
        """Whether the bias-corrected second moment has settled; looked at every 1 / (1 - beta2) steps."""
        delta = max(1, round(1 / (1 - self.optimizer.param_groups[0]["betas"][1])))
        if self.exchanges == 0 or self.exchanges % delta:
            return False
        norms = [
            float(as_real(state["exp_avg_sq"]).sum()) / (1 - self._beta2(index) ** float(state["step"]))
            for index, state in enumerate(map(self.optimizer.state.get, self.layout.parameters))
            if state
        ]
        previous, self.previous_norm = self.previous_norm, sum(norms)
        return STABLE * max(previous, self.previous_norm) <= min(previous, self.previous_norm)

    def _groups_of(self) -> list[dict[str, Any]]:
        """The optimizer's group of each parameter of the layout."""
        groups = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        return [groups[id(p)] for p in self.layout.parameters]

    def _beta2(self, index: int) -> float:
        return float(self._groups_of()[index]["betas"][1])

    def _freeze(self, round: Round) -> None:
        """Take over what Adam holds; it is the same on all workers that stepped, and others get it from them."""
        for p, m, v in self._buffers():
            state = self.optimizer.state.get(p)
            if state:
                m.copy_(as_real(state["exp_avg"]))
                v.copy_(as_real(state["exp_avg_sq"]))
        counts = [
            float(state["step"]) if state else 0.0 for state in map(self.optimizer.state.get, self.layout.parameters)
        ]
        rows = self.workers.gather(counts, "freezing the second moment")
        source = max(range(self.workers.size), key=lambda rank: sum(rows[rank]))
        self.steps = rows[source]
        weights = [float(row == rows[source]) for row in rows]
        average_tensors([*self.momentum, *self.variance], self.workers, weights)
        for index, (p, _, v) in enumerate(self._buffers()):
            if self.steps[index]:
                v.div_(1 - self._beta2(index) ** self.steps[index])
                if self.config.floor and not self._is_small(p):
                    # Where nothing is known of the second moment, it stays 0, and the element where it is.
                    v.copy_(torch.where(v > 0, v.clamp(min=float(v.mean()) * self.config.floor**2), v))
        average_tensors(self.layout.parameters, self.workers, weights)
        self.anchor = self.layout.snapshot()
        self.freezing, self.frozen = False, True
        self._find_unknown()
        self._write_back()

    def _find_unknown(self) -> None:
        zeros = [bucket.of(self.variance) == 0 for bucket in self.layout.buckets]
        self.unknown = [zero if bool(zero.any()) else None for zero in zeros]

    # Compressed steps -------------------------------------------------------------------------------------------------

    def sync(self, round: Round) -> Synced:
        """Freeze, or take the step on compressed momenta."""
        if not self.frozen:
            self._freeze(round)
            self.pending = 0
            return Synced()
        parameters = self.layout.parameters
        states = [self.optimizer.state.get(p) or {} for p in parameters]
        took = [float(state.get("step", 0)) != old for state, old in zip(states, self.steps, strict=True)]
        present = round.present[self.workers.rank]
        skipped = present and not any(took)  # a gradient scaler found infinity
        if any(row[0] for row in self.workers.gather([skipped], "whether anybody skipped the step")):
            self._write_back()
            self.pending = 0
            return Synced()
        message, groups = self.layout.zeros(), self._groups_of()
        views = self.layout.per_parameter(message)
        for target, group, state, stepped, (_, m, _) in zip(views, groups, states, took, self._buffers(), strict=True):
            if present and stepped:
                target.copy_(as_real(state["exp_avg"]))
            else:  # no gradient here counts as one of 0
                target.copy_(m).mul_(group["betas"][0])
        drift = self._exchange(message, round)
        self.syncs += 1
        self.pending = 0
        rates = agreed_rates(self.optimizer, self.workers, round)
        group_rates = {id(group): rate for group, rate in zip(self.optimizer.param_groups, rates, strict=True)}
        for index, ((_, m, v), x) in enumerate(
            zip(self._buffers(), self.layout.per_parameter(self.anchor), strict=True)
        ):
            group = groups[index]
            rate, beta1 = group_rates[id(group)], group["betas"][0]
            if not self.steps[index]:  # no gradient in all of the warm-up
                continue
            self.steps[index] += 1
            if _decoupled(self.optimizer, group):
                x.mul_(1 - rate * group["weight_decay"])
            x.addcdiv_(m, v.sqrt().add_(group["eps"]), value=-rate / (1 - beta1 ** self.steps[index]))
        self._write_back()
        return Synced(drift)

    def _exchange(self, message: list[Tensor], round: Round) -> float:
        """Replace the momentum by the compressed mean of the workers' momenta."""
        drift = Drift(self.layout.numel)
        generator_on = generators(self.config.seed, self.workers.rank, self.syncs)

        def transfer(index: int, bucket: Bucket) -> Transfer[None]:
            flat, unknown = bucket.of(message), self.unknown[index]
            local = drift.sample(flat)
            if self._is_small(bucket.spans[0][0]):  # and so are all in this bucket
                weight = yield from self.workers.sum(flat, round.weights)
                mean = flat.div_(weight)
            else:
                residual, owner = bucket.of(self.feedback.worker), self.feedback.owner[index]
                mean = yield from compressed.two_shot(
                    self.workers,
                    flat,
                    bucket.segments,
                    self.config.compressor,
                    generator_on(bucket.device),
                    round.weights,
                    residual,
                    owner,
                )
                if unknown is not None:
                    # One bit cannot say zero: where there is no second moment, noise would be divided by nothing.
                    own = compressed.chunks(bucket.segments, self.workers.size)[self.workers.rank]
                    residual.masked_fill_(unknown, 0)
                    owner.masked_fill_(own.of(unknown), 0)
            drift.compare(local, mean, 1.0)
            if unknown is not None:
                mean.masked_fill_(unknown, 0)
            bucket.of(self.momentum).copy_(mean)

        pipeline(transfer(index, bucket) for index, bucket in enumerate(self.layout.buckets))
        return drift.value()

    def _write_back(self) -> None:
        """Give optimizer and parameters what all agree on."""
        self.layout.restore(self.anchor)
        for index, (p, m, v) in enumerate(self._buffers()):
            state = self.optimizer.state.get(p)
            if state:
                as_real(state["exp_avg"]).copy_(m)
                as_real(state["exp_avg_sq"]).copy_(v)
                state["step"].fill_(self.steps[index])

    def _buffers(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Parameter, momentum and second moment, in shapes of the parameters."""
        momenta, variances = self.layout.per_parameter(self.momentum), self.layout.per_parameter(self.variance)
        return list(zip(self.layout.parameters, momenta, variances, strict=True))

    def moved(self) -> None:
        """All workers go on from where the parameters are now."""
        self.anchor = self.layout.snapshot()

    def catch_up(self, round: Round) -> None:
        """In the warm-up, catch up with one another; afterwards every sync leaves all workers at one point."""
        if not self.frozen:
            super().catch_up(round)

    def adopt_layout(self, layout: Layout) -> None:
        """Take over a new layout."""
        old, old_steps = self.layout, dict(zip(map(id, self.layout.parameters), self.steps, strict=True))
        buffers, feedback = (self.anchor, self.momentum, self.variance), self.feedback
        self._allocate(layout)
        for source, target in zip(buffers, (self.anchor, self.momentum, self.variance), strict=True):
            layout.carry(old, source, target)
        self.feedback = feedback.moved_to(layout)
        self.steps = [old_steps.get(id(p), 0.0) for p in layout.parameters]
        super().adopt_layout(layout)
        self._find_unknown()

    # State ------------------------------------------------------------------------------------------------------------

    def shared_state(self) -> dict[str, Any]:
        """Everything that is equal on all workers, and the residual of the mean."""
        return {
            "exchanges": self.exchanges,
            "freezing": self.freezing,
            "frozen": self.frozen,
            "previous_norm": self.previous_norm,
            "syncs": self.syncs,
            "steps": list(self.steps),
            "anchor": self.layout.per_parameter(self.anchor),
            "momentum": self.layout.per_parameter(self.momentum),
            "variance": self.layout.per_parameter(self.variance),
            "residual": self.feedback.total(),
        }

    def local_state(self) -> dict[str, Any]:
        """What this worker's messages have left out."""
        return super().local_state() | {"feedback": self.feedback.state_dict()}

    def load_shared_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`shared_state` returned."""
        self.exchanges, self.syncs, self.steps = state["exchanges"], state["syncs"], list(state["steps"])
        self.freezing, self.frozen, self.previous_norm = state["freezing"], state["frozen"], state["previous_norm"]
        for name in ("anchor", "momentum", "variance"):
            copy_state(self.layout.per_parameter(getattr(self, name)), state[name], name)
        self._find_unknown()
        self.feedback.set_total(state["residual"])

    def load_local_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`local_state` returned."""
        super().load_local_state(state)
        self.feedback.load_state_dict(state["feedback"])


def _decoupled(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Whether weight decay acts on the parameters directly, as in AdamW, and not through the gradient."""
    return isinstance(optimizer, AdamW) or bool(group.get("decoupled_weight_decay", False))
