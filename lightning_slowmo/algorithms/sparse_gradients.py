"""What SketchedSGD and SensedSGD share: every worker's gradient is replaced by the same sparse gradient.

The user's plain SGD then takes the step. Here are the exchange of small tensors, which are averaged uncompressed and
take steps of SGD with momentum; gradients that are missing, left over or not finite; and the scaler's factor.
"""

from __future__ import annotations

import math
import weakref
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from lightning_slowmo import traffic
from lightning_slowmo.algorithms.all_reduce import RunningAllReduce
from lightning_slowmo.algorithms.base import Algorithm, check_period
from lightning_slowmo.averaging.averager import copy_state
from lightning_slowmo.averaging.finite import are_finite
from lightning_slowmo.averaging.mean import average_tensors
from lightning_slowmo.communication.meeting import Round
from lightning_slowmo.communication.workers import SyncError, Workers
from lightning_slowmo.parameters import Layout
from lightning_slowmo.private import version_of
from lightning_slowmo.storage import as_real, dense, local, values_of


class RunningSparseSGD(RunningAllReduce):
    """The running state that both derive from; they add the exchange of large tensors.

    Args:
        config: the configuration, which has ``momentum`` and ``uncompressed_below``.
        optimizer: the user's own: SGD without momentum.
        workers: who takes part.

    Attributes:
        small: the tensors that are all-reduced uncompressed.
        small_momentum: their momentum, equal on all workers, one flat tensor per run.
        large: the others; one run for each type and device.
        steps: exchanges so far.
        exchanged: which of the present gradients have been exchanged already.
    """

    def __init__(self, config: Algorithm, optimizer: Optimizer, workers: Workers) -> None:
        check_plain_sgd(optimizer, type(config).__name__)
        super().__init__(optimizer, workers)
        self.config: Any = config
        self.steps = 0
        self.exchanged = Exchanged()
        self.small, self.large = self._split(self.layout)
        self.small_momentum = self.small.zeros()
        self._allocate()

    def _split(self, layout: Layout) -> tuple[Layout, Layout]:
        """The layouts of small and of large tensors."""
        return traffic.split_by_size(layout, self.config.uncompressed_below)

    @abstractmethod
    def _allocate(self) -> None:
        """Make buffers for :attr:`large`, of zeros."""

    @abstractmethod
    def _exchange(self, used: Layout, gradients: list[Tensor], round: Round) -> list[Tensor]:
        """Exchange gradients of large tensors.

        Args:
            used: the tensors of which some worker has a gradient; :attr:`large` itself if that is all of them.
            gradients: this worker's, laid out like ``used``; zeros if it has none.
            round: the circumstances.

        Returns:
            The common gradient in the same layout.
        """

    def after_step(self) -> None:
        """The present gradients have been used; those that change from now on are new."""
        self.exchanged.take_note(self.layout.parameters, stepped=True)

    @torch.no_grad()
    def sync_gradients(self, round: Round) -> None:
        """Replace the gradients by the common sparse one on the workers that came with some.

        A parameter that only some workers used counts as a gradient of 0 on the others; one that nobody used keeps
        None. If a gradient scaler is at work and any worker's gradients are not finite, they become NaN on all, so that
        all skip the step, and nothing else changes.

        Raises:
            SyncError: on all workers, if gradients are not finite and there is no scaler, or if gradients have been
                added to exchanged ones.
        """
        parameters, mine = self.layout.parameters, round.present[self.workers.rank]
        fresh = [mine and self.exchanged.is_new(p) for p in parameters]
        own = [values_of(p.grad) for p, new in zip(parameters, fresh, strict=True) if new and p.grad is not None]
        broken, scaled = not are_finite(own), self.loss_scale is not None
        mixed = any(new and self.exchanged.was_added_to(p) for p, new in zip(parameters, fresh, strict=True))
        rows = self.workers.gather([broken, broken and not scaled, mixed, *fresh], "used parameters")
        all_broken, unscaled, all_mixed, *columns = zip(*rows, strict=True)
        self._refuse(unscaled, "gradients are NaN or infinite. Lower the learning rate, or clip gradients.")
        self._refuse(
            all_mixed,
            "gradients were added to such as had been exchanged already. Exchange once for each step: with manual "
            "optimization, accumulate inside `with trainer.strategy.block_backward_sync():`.",
        )
        used = [p for p, column in zip(parameters, columns, strict=True) if any(column)]
        if any(all_broken):
            self._write(used, [torch.full_like(local(p), math.nan) for p in used], mine)
        elif used:
            self._exchange_all(used, {id(p) for p, new in zip(parameters, fresh, strict=True) if new}, round)
            self.steps += 1
        if mine and used:
            self.exchanged.take_note(parameters)
        self.pending = int(mine)

    def _refuse(self, flags: Iterable[float], why: str) -> None:
        """Raise SyncError if a flag is set; it names the workers by rank."""
        guilty = [name for name, flag in zip(self.workers.names, flags, strict=True) if flag]
        if guilty:
            raise SyncError(f"{type(self.config).__name__} cannot exchange gradients: on {', '.join(guilty)}, {why}")

    def _exchange_all(self, used: list[Tensor], fresh: set[int], round: Round) -> None:
        """Exchange gradients.

        Args:
            used: tensors of which some worker has a new gradient.
            fresh: ids of the tensors of which this worker has one.
            round: the circumstances.
        """
        mine, weights = round.present[self.workers.rank], [float(present) for present in round.present]
        small, large = self._split(Layout([used]))
        if large.numel == self.large.numel:
            large = self.large
        gradients = self._gradients(large, fresh)
        update = self._exchange(large, gradients, round) if large.parameters else []
        self._write(large.parameters, large.per_parameter(update), mine)

        means = self._gradients(small, fresh)
        average_tensors(means, self.workers, weights)
        momentum = small.zeros()
        small.carry(self.small, self.small_momentum, momentum)
        for old, mean in zip(momentum, means, strict=True):
            old.mul_(self.config.momentum).add_(mean)
        self.small.carry(small, momentum, self.small_momentum)
        self._write(small.parameters, small.per_parameter(momentum), mine)

    def _gradients(self, layout: Layout, fresh: set[int]) -> list[Tensor]:
        """This worker's new gradients without the scaler's factor; zeros where there are none."""
        buffers = layout.zeros()
        for p, view in zip(layout.parameters, layout.per_parameter(buffers), strict=True):
            if id(p) in fresh and p.grad is not None:
                view.copy_(as_real(dense(p.grad))).div_(self.loss_scale or 1.0)
        return buffers

    def _write(self, parameters: Sequence[Tensor], values: Sequence[Tensor], mine: bool) -> None:
        """Overwrite the gradients, times the scaler's factor.

        A worker that came without gradients (``mine`` is False) only took part in the exchange, and keeps its own.
        Gradients of sparse layout (``Embedding(sparse=True)``) become dense, as the common one has other elements.
        """
        for p, value in zip(parameters, values, strict=True) if mine else ():
            if p.grad is None or p.grad.layout is not torch.strided:
                p.grad = torch.empty_like(p)
            as_real(p.grad).copy_(value).mul_(self.loss_scale or 1.0)

    def adopt_layout(self, layout: Layout) -> None:
        """Take over a new layout, and carry the buffers along."""
        check_plain_sgd(self.optimizer, type(self.config).__name__)
        old, momentum = self.small, self.small_momentum
        self.small, large = self._split(layout)
        self.small_momentum = self.small.zeros()
        self.small.carry(old, momentum, self.small_momentum)
        if not large.covers([self.large.parameters]):
            self._move(large)
        super().adopt_layout(layout)

    @abstractmethod
    def _move(self, large: Layout) -> None:
        """Carry the buffers of :attr:`large` over to a new one."""

    def shared_state(self) -> dict[str, Any]:
        """The number of exchanges, and the momentum of small tensors."""
        return {"steps": self.steps, "small_momentum": self.small.per_parameter(self.small_momentum)}

    def load_shared_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`shared_state` returned."""
        self.steps = state["steps"]
        copy_state(self.small.per_parameter(self.small_momentum), state["small_momentum"], "momentum")


class Exchanged:
    """Remembers which gradients have been exchanged, to tell them from new ones.

    With several optimizers, a backward pass for one of them leaves the gradients of the others as they were. If those
    were exchanged again, they would count twice.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._stepped = True

    def take_note(self, parameters: Iterable[Tensor], stepped: bool = False) -> None:
        """Remember the present gradients, and whether the optimizer has made its step with them."""
        self._known = {id(p): (weakref.ref(p.grad), version_of(p.grad)) for p in parameters if p.grad is not None}
        self._stepped = stepped

    def is_new(self, parameter: Tensor) -> bool:
        """Whether there is a gradient that was replaced or changed in place since :meth:`take_note`."""
        gradient, known = parameter.grad, self._known.get(id(parameter))
        if gradient is None or known is None:
            return gradient is not None
        return known[0]() is not gradient or known[1] != version_of(gradient)

    def was_added_to(self, parameter: Tensor) -> bool:
        """Whether a gradient has been changed in place after its exchange and before the optimizer's step with it."""
        known = self._known.get(id(parameter))
        return not self._stepped and known is not None and known[0]() is parameter.grad and self.is_new(parameter)


def dense_sync(layout: Layout, workers: int, uncompressed_below: int) -> tuple[traffic.Sync, Layout]:
    """What both send of small tensors and of who has which gradients, and the layout of the large tensors.

    Args:
        layout: of all parameters.
        workers: how many.
        uncompressed_below: elements below which a tensor is small.
    """
    small, large = traffic.split_by_size(layout, uncompressed_below)
    flags = traffic.header(workers, 3 + len(layout.parameters))
    return traffic.together(1, traffic.header(workers), flags, traffic.all_reduce(small, workers)), large


def check_amount(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is a number of elements or a share."""
    if isinstance(value, float):
        check_share(name, value)
    else:
        check_period(name, value)


def check_share(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ValueError(f"{name} must be a share in (0, 1], got {value!r}.")


def amount(value: int | float, length: int) -> int:
    """A number of elements, at most ``length``, from one or from a share."""
    return min(length, math.ceil(value * length)) if isinstance(value, float) else min(length, value)


def check_plain_sgd(optimizer: Optimizer, name: str) -> None:
    """Raise ValueError unless the optimizer steps along the gradient that it is given."""
    momenta = {group.get("momentum", 0) for group in optimizer.param_groups}
    if not isinstance(optimizer, SGD) or momenta - {0}:
        found = type(optimizer).__name__ + (f" with momentum {max(momenta)}" if isinstance(optimizer, SGD) else "")
        raise ValueError(
            f"{name} keeps momentum itself and needs torch.optim.SGD without any, got {found}. Use "
            f"SGD(parameters, lr=...) and {name}(momentum=0.9)."
        )
