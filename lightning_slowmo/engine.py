"""The engine: one running algorithm per optimizer, when the workers meet, and the model they agree on.

It knows nothing of Lightning; a plain PyTorch loop can drive it::

    engine = Engine(SlowMo(sync_every=12), [optimizer], Workers.from_world(), module=model)
    for batch in loader:
        loss(model, batch).backward()
        engine.after_backward()
        optimizer.step()
        engine.after_step()
        optimizer.zero_grad()
    engine.finish()
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from lightning_slowmo.algorithms.base import NOT_DUE, Algorithm, Round, SyncReport
from lightning_slowmo.communication.collectives import average_tensors
from lightning_slowmo.communication.meeting import Header, Meeting, Reason, meet, require_equal
from lightning_slowmo.communication.workers import Workers


class Engine:
    """Runs an algorithm on the optimizers of one model.

    Args:
        algorithm: the configuration; each optimizer gets running state of its own.
        optimizers: whose parameters are synced.
        workers: who takes part; each of them must construct its engine.
        module: the model whose buffers (BatchNorm statistics) belong to the consensus too.

    Attributes:
        stop: whether training is to stop. Set it on one worker, and after the next meeting it is set on all.
        terminate: the same for SIGTERM.
        total: totals over all syncs so far.

    Raises:
        ValueError: if there is nothing to train.
        SyncError: if the workers' models or configurations differ.
    """

    def __init__(
        self, algorithm: Algorithm, optimizers: Sequence[Optimizer], workers: Workers, module: Module | None = None
    ) -> None:
        self.algorithm = algorithm
        self.workers = workers
        self.module = module
        self.stop = False
        self.terminate = False
        self.total = SyncReport(count=0)
        self.rounds = 0
        require_equal(
            workers,
            "The algorithm",
            repr(algorithm),
            "Construct the strategy with the same arguments on every rank.",
        )
        require_equal(
            workers,
            "The model",
            "; ".join(_describe(optimizers)),
            "Build the same model, and freeze the same parameters, on every rank.",
        )
        if not any(
            p.numel() and p.requires_grad for o in optimizers for group in o.param_groups for p in group["params"]
        ):
            raise ValueError("There is nothing to train: the optimizers hold no parameter that requires a gradient.")
        self.units = [algorithm.bind(optimizer, workers) for optimizer in optimizers]
        self.last_meeting: Meeting | None = None
        self._local: list[list[Tensor]] | None = None
        self._local_buffers: list[Tensor] = []

    # Training ---------------------------------------------------------------------------------------------------------

    def after_backward(self) -> None:
        """Exchange gradients, for the algorithms that do; call it when gradients are complete, before clipping."""
        for index, unit in enumerate(self.units):
            if unit.exchanges_gradients and any(parameter.grad is not None for parameter in unit.layout.parameters):
                self.meet(Reason.GRADIENTS, index)

    def before_step(self, unit: int = 0) -> None:
        """Let parameters join that were added to an optimizer, or unfrozen; call it before its step."""
        self.units[unit].before_step()

    def after_step(self, unit: int = 0) -> SyncReport | None:
        """Count an optimizer step, and sync if it is time; call it after the step and before the LR scheduler's.

        Args:
            unit: index of the optimizer that stepped.

        Returns:
            What the sync did, or None if there was none.
        """
        running = self.units[unit]
        running.after_step()
        levels = running.due()
        return None if levels == NOT_DUE else self.meet(Reason.SYNC, unit, levels)

    def finish(self) -> None:
        """End training: every worker gets the consensus, whatever happened to its parameters since the last sync."""
        self.leave_consensus()
        self.meet(Reason.TRAIN_END)
        self._to_consensus()

    # Meetings ---------------------------------------------------------------------------------------------------------

    def meet(self, reason: Reason, unit: int = 0, levels: int = 0) -> SyncReport | None:
        """Meet the other workers, and take part in every round that any of them needs until it is this one's turn.

        Args:
            reason: what this worker came for.
            unit: for a round, index of the optimizer.
            levels: for a sync, the levels of the algorithm that are due.

        Returns:
            For a round, what it did.
        """
        while True:
            start, before = time.perf_counter(), self.workers.traffic.copy()
            meeting = self.last_meeting = meet(self._header(reason, unit, levels), self.workers)
            self.stop |= meeting.stop
            self.terminate |= meeting.terminate
            round = meeting.round
            if round is None:
                return None
            report = self._take_part(meeting, round)
            used = self.workers.traffic - before
            report = replace(
                report,
                bytes_sent=used.sent,
                bytes_received=used.received,
                seconds=time.perf_counter() - start,
            )
            self.total = self.total + report
            if (round.reason, round.unit) == (reason, unit):
                return report

    @property
    def must_terminate(self) -> bool:
        """Whether all workers know that one of them received SIGTERM."""
        return self.last_meeting is not None and self.last_meeting.terminate

    def _take_part(self, meeting: Meeting, header: Header) -> SyncReport:
        self.rounds += 1
        unit = self.units[header.unit]
        round = self._round(meeting, header)
        if header.reason is Reason.SYNC:
            return unit.sync(round)
        unit.sync_gradients(round)
        return SyncReport(count=0, drift=self.total.drift)

    def _round(self, meeting: Meeting, header: Header) -> Round:
        pending = meeting.pending(header.unit)
        return Round(header.levels, pending, meeting.present(header), meeting.same_rates)

    def _header(self, reason: Reason, unit: int, levels: int) -> Header:
        rates = [rate for running in self.units for rate in running.rates()]
        return Header(
            reason,
            unit,
            levels,
            round=self.rounds,
            stop=self.stop,
            terminate=self.terminate,
            rates=zlib.crc32(repr(rates).encode()),
            pending=tuple(running.pending for running in self.units),
        )

    # Consensus --------------------------------------------------------------------------------------------------------

    @property
    def in_consensus(self) -> bool:
        """Whether the model holds the consensus at present, and the workers' own parameters are put aside."""
        return self._local is not None

    def enter_consensus(self, reason: Reason = Reason.VALIDATION) -> None:
        """Put this worker's parameters and buffers aside and load the consensus; all workers must call this."""
        if self.in_consensus:
            return
        self.meet(reason)
        self._local = [unit.layout.snapshot() for unit in self.units]
        self._local_buffers = [buffer.clone() for buffer in self._buffers()]
        self._to_consensus()

    def leave_consensus(self) -> None:
        """Give this worker its own parameters and buffers back, bit for bit."""
        if self._local is None:
            return
        with torch.no_grad():
            for unit, snapshot in zip(self.units, self._local, strict=True):
                unit.layout.restore(snapshot)
            for buffer, own in zip(self._buffers(), self._local_buffers, strict=True):
                buffer.copy_(own)
        self._local, self._local_buffers = None, []

    @contextmanager
    def consensus(self, reason: Reason = Reason.VALIDATION) -> Iterator[None]:
        """The model holds the consensus inside this context; all workers must enter it."""
        entered = not self.in_consensus
        self.enter_consensus(reason)
        try:
            yield
        finally:
            if entered:
                self.leave_consensus()

    def _to_consensus(self) -> None:
        assert self.last_meeting is not None  # every way here begins with one
        with torch.no_grad():
            for index, unit in enumerate(self.units):
                unit.drain()
                unit.consensus(self._round(self.last_meeting, Header(Reason.SYNC, index)))
            average_tensors(self._buffers(), self.workers)

    def _buffers(self) -> list[Tensor]:
        return [] if self.module is None else [buffer.detach() for buffer in self.module.buffers()]

    # State ------------------------------------------------------------------------------------------------------------

    def shared_state(self) -> dict[str, Any]:
        """State that is equal on all workers, of plain values and tensors."""
        return {"units": [unit.shared_state() for unit in self.units]}

    def local_state(self) -> dict[str, Any]:
        """State of this worker alone, of plain values and tensors: also its own parameters and buffers."""
        own = self._local if self._local is not None else [unit.layout.snapshot() for unit in self.units]
        buffers = self._local_buffers if self.in_consensus else self._buffers()
        return {
            "units": [unit.local_state() for unit in self.units],
            "rounds": self.rounds,
            "parameters": [unit.layout.per_parameter(flat) for unit, flat in zip(self.units, own, strict=True)],
            "buffers": list(buffers),
        }

    def load_shared_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`shared_state` returned, also with another number of workers."""
        for unit, saved in zip(self.units, state["units"], strict=True):
            unit.load_shared_state(saved)

    def load_local_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`local_state` returned on this worker."""
        self.rounds = state["rounds"]
        with torch.no_grad():
            for unit, saved, parameters in zip(self.units, state["units"], state["parameters"], strict=True):
                unit.load_local_state(saved)
                for parameter, own in zip(unit.layout.parameters, parameters, strict=True):
                    parameter.copy_(own)
            for buffer, own in zip(self._buffers(), state["buffers"], strict=True):
                buffer.copy_(own)


def _describe(optimizers: Sequence[Optimizer]) -> Iterator[str]:
    """The parameters that are synced, one description each."""
    for optimizer in optimizers:
        for index, group in enumerate(optimizer.param_groups):
            yield f"{type(optimizer).__name__} group {index}"
            for parameter in group["params"]:
                kind = f"{str(parameter.dtype).removeprefix('torch.')}{list(parameter.shape)}"
                yield kind if parameter.requires_grad else f"frozen {kind}"
