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

import re
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from lightning_slowmo.algorithms import inner_buffers
from lightning_slowmo.algorithms.base import NOT_DUE, Algorithm, Round, SyncReport
from lightning_slowmo.algorithms.iterates import Iterates
from lightning_slowmo.communication.collectives import average_tensors
from lightning_slowmo.communication.meeting import Header, Meeting, Reason, meet, require_equal
from lightning_slowmo.communication.workers import SyncError, Traffic, Workers
from lightning_slowmo.parameters import checksum

POISON_CHECKED = (Reason.SYNC, Reason.VALIDATION, Reason.SAVE, Reason.TRAIN_END)
"""Meetings before which a worker looks whether its parameters are finite: means follow them."""


class Engine:
    """Runs an algorithm on the optimizers of one model.

    Args:
        algorithm: the configuration; each optimizer gets running state of its own.
        optimizers: whose parameters are synced.
        workers: who takes part; each of them must construct its engine.
        module: the model whose buffers (BatchNorm statistics) belong to the consensus too.
        everyone: all processes, if several of them make up one worker; they meet together, while each exchanges
            parameters with ``workers`` alone.
        on_nonfinite: what to do when a worker's parameters have become NaN or infinite: ``"raise"`` on all workers, or
            ``"skip"`` that worker, leave it out of the mean and give it the mean of the others.
        shard_slow_state: whether each worker keeps a piece of anchor and momentum only.
        offload_slow_state: ``"cpu"`` to keep anchor and momentum in the CPU's memory.

    Attributes:
        stop: whether training is to stop. Set it on one worker, and after the next meeting it is set on all.
        terminate: the same for SIGTERM.
        save: the same for a checkpoint that is to be written once all workers are between two batches, see
            :meth:`pause`.
        total: totals over all syncs so far.
        on_sync: called at the end of every sync, on all workers together, with whether all their parameters are equal.

    Raises:
        ValueError: if there is nothing to train.
        SyncError: if the workers' models, their initial values or configurations differ.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        optimizers: Sequence[Optimizer],
        workers: Workers,
        module: Module | None = None,
        everyone: Workers | None = None,
        on_nonfinite: Literal["raise", "skip"] = "raise",
        shard_slow_state: bool = False,
        offload_slow_state: Literal["cpu"] | None = None,
    ) -> None:
        check_on_nonfinite(on_nonfinite)
        if offload_slow_state not in ("cpu", None):
            raise ValueError(f"offload_slow_state must be 'cpu' or None, got {offload_slow_state!r}.")
        self.algorithm = algorithm
        self.workers = workers
        self.module = module
        self.everyone = workers if everyone is None else everyone
        self.peers = None if everyone is None else dist.get_process_group_ranks(workers.data)
        self.on_nonfinite = on_nonfinite
        self.stop = False
        self.terminate = False
        self.save = False
        self.total = SyncReport(count=0)
        self.on_sync: Callable[[bool], None] = lambda agreed: None
        self.rounds = 0
        require_equal(
            self.everyone,
            "The algorithm",
            re.sub(r" at 0x[0-9a-f]+", "", repr(algorithm)),  # a function's address differs between processes
            "Construct the strategy with the same arguments on every rank.",
        )
        require_equal(
            self.everyone,
            "The model",
            "; ".join(_describe(optimizers)),
            "Build the same model, and freeze the same parameters, on every rank.",
        )
        if not any(
            p.numel() and p.requires_grad for o in optimizers for group in o.param_groups for p in group["params"]
        ):
            raise ValueError("There is nothing to train: the optimizers hold no parameter that requires a gradient.")
        self.units = [algorithm.bind(optimizer, workers) for optimizer in optimizers]
        self._check_start()
        self.iterates = [Iterates(optimizer) for optimizer in optimizers]
        require_equal(
            self.everyone,
            "The optimizers' own copies of the parameters",
            "; ".join(map(str, self.iterates)),
            "Use the same optimizers on every rank.",
        )
        if shard_slow_state or offload_slow_state:
            for unit in self.units:
                unit.place_slow_state(shard_slow_state, offload_slow_state is not None)
        self.last_meeting: Meeting | None = None
        self._waited = [0.0 for _ in self.units]
        self._local: list[list[Tensor]] | None = None
        self._local_buffers: list[Tensor] = []
        self._moving: dict[str, Tensor] = {}

    def _check_start(self) -> None:
        """Make sure that all workers start from the same point: the algorithms take their distance for progress."""
        high, low = divmod(checksum([unit.layout for unit in self.units]), 2**32)
        sums = self.everyone.gather([high, low], "checksums of the initial parameters")
        others = [name for name, own in zip(self.everyone.names, sums, strict=True) if own != sums[0]]
        if others:
            does = "do" if len(others) > 1 else "does"
            raise SyncError(
                f"The initial parameters differ between workers: {', '.join(others)} {does} not start from those of "
                f"{self.everyone.names[0]}. Use the same seed on every rank, or broadcast the model from one of them."
            )

    # Training ---------------------------------------------------------------------------------------------------------

    def after_backward(self, loss_scale: float | None = None) -> None:
        """Exchange gradients, for the algorithms that do; call it when gradients are complete, before clipping.

        Args:
            loss_scale: what a gradient scaler has multiplied the loss by; None if there is no scaler. Call this before
                the scaler's ``unscale_``, which looks for infinities on one worker alone.
        """
        for index, unit in enumerate(self.units):
            if not unit.exchanges_gradients:
                continue
            # While another optimizer has its turn, this one's parameters may be frozen: that changes no layout.
            if any(parameter.grad is not None for group in unit.groups() for parameter in group):
                unit.loss_scale = loss_scale
                unit.before_step()  # the first gradient of a parameter that joins counts, too
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
        start = time.perf_counter()
        running.after_step()  # may wait for an average that was sent some steps ago
        self._waited[unit] += time.perf_counter() - start
        levels = running.due()
        return None if levels == NOT_DUE else self.meet(Reason.SYNC, unit, levels)

    def finish(self) -> None:
        """End training: every worker gets the consensus, whatever happened to its parameters since the last sync."""
        self.leave_consensus()
        self.meet(Reason.TRAIN_END)
        self._look_for_moving()
        self._to_consensus(for_good=True)

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
            start, before = time.perf_counter(), self._traffic()
            meeting = self.last_meeting = meet(self._header(reason, unit, levels), self.everyone, self.peers)
            self.stop |= meeting.stop
            self.terminate |= meeting.terminate
            self.save |= meeting.save
            self._check_poison(meeting)
            round = meeting.round
            if round is None and meeting.scattered:
                if reason is Reason.PAUSE:
                    return None
                continue
            if round is None:
                for index, running in enumerate(self.units):
                    running.regroup(self._round(meeting, Header(reason, index)))
                return None
            report = self._take_part(meeting, round)
            used = self._traffic() - before
            report = replace(
                report,
                bytes_sent=used.sent,
                bytes_received=used.received,
                seconds=time.perf_counter() - start + self._waited[round.unit],
            )
            self._waited[round.unit] = 0.0
            self.total = self.total + report
            if (round.reason, round.unit) == (reason, unit):
                return report

    def pause(self) -> bool:
        """Come between two batches, to do something that all workers must do together.

        Returns:
            Whether all workers are here. If not, some have other business first, and this one is to go on training.
        """
        self.meet(Reason.PAUSE)
        assert self.last_meeting is not None
        return not self.last_meeting.scattered

    @property
    def must_terminate(self) -> bool:
        """Whether all workers know that one of them received SIGTERM."""
        return self.last_meeting is not None and self.last_meeting.terminate

    @property
    def must_save(self) -> bool:
        """Whether all workers know that one of them was asked for a checkpoint."""
        return self.last_meeting is not None and self.last_meeting.save

    def _take_part(self, meeting: Meeting, header: Header) -> SyncReport:
        self.rounds += 1
        unit = self.units[header.unit]
        round = self._round(meeting, header)
        if header.reason is Reason.GRADIENTS:
            unit.sync_gradients(round)
            return SyncReport(count=0, drift=self.total.drift)
        weights = round.weights if unit.agrees_after(round) else None
        with self.iterates[header.unit].following(self.workers, weights):
            report = unit.sync(round)
        self._average_moving(look=self.rounds <= 2)
        if not all(round.healthy):
            self._heal(header.unit, round)
        # All workers must come to the same answer, so it follows from what they told one another.
        others = [pending for h in meeting.headers for i, pending in enumerate(h.pending) if i != header.unit]
        self.on_sync(unit.agrees_after(round) and not any(others))
        return report

    def _round(self, meeting: Meeting, header: Header) -> Round:
        return Round(
            header.levels,
            meeting.pending(header.unit),
            meeting.present(header),
            meeting.healthy(),
            meeting.same_rates,
        )

    def _traffic(self) -> Traffic:
        own = self.workers.traffic
        return own.copy() if self.everyone is self.workers else own + self.everyone.traffic

    def _header(self, reason: Reason, unit: int, levels: int) -> Header:
        rates = [rate for running in self.units for rate in running.rates()]
        waiting = not reason.is_round and any(running.pending for running in self.units)
        checked = reason in POISON_CHECKED or waiting  # a worker that waits may have to take part in a sync
        return Header(
            reason,
            unit,
            levels,
            round=self.rounds,
            stop=self.stop,
            terminate=self.terminate,
            save=self.save,
            poisoned=checked and not all(running.is_finite() for running in self.units),
            rates=zlib.crc32(repr(rates).encode()),
            pending=tuple(running.pending for running in self.units),
        )

    # Poison -----------------------------------------------------------------------------------------------------------

    def _check_poison(self, meeting: Meeting) -> None:
        """Raise, or warn that a worker is left out; all workers come to the same decision."""
        sick = [name for name, header in zip(self.everyone.names, meeting.headers, strict=True) if header.poisoned]
        if not sick:
            return
        what = f"The parameters of {', '.join(sick)} are NaN or infinite after {self.rounds} syncs."
        if self.on_nonfinite == "raise":
            raise SyncError(
                f"{what} Nothing was averaged. Lower the learning rate, clip gradients, or leave such workers out with "
                "on_nonfinite='skip'."
            )
        if not any(meeting.healthy()):
            raise SyncError(f"{what} No worker is left to recover from.")
        if self.everyone.rank == 0:
            warnings.warn(f"{what} They are left out of the mean and get it back.", stacklevel=2)

    def _heal(self, unit: int, round: Round) -> None:
        """Give the workers that were left out what their parameters alone do not bring back to health."""
        healthy = round.healthy[self.workers.rank]
        buffers = self._buffers()
        own = [buffer.clone() for buffer in buffers]
        average_tensors(buffers, self.workers, [float(well) for well in round.healthy])
        if healthy:
            for buffer, value in zip(buffers, own, strict=True):
                buffer.copy_(value)
        else:
            inner_buffers.reset(self.units[unit].optimizer)

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
        self._look_for_moving()
        self._local = [unit.layout.snapshot() for unit in self.units]
        self._local_buffers = [tensor.clone() for tensor in self._besides()]
        self._to_consensus()

    def leave_consensus(self) -> None:
        """Give this worker its own parameters and buffers back, bit for bit."""
        if self._local is None:
            return
        with torch.no_grad():
            for unit, snapshot in zip(self.units, self._local, strict=True):
                unit.layout.restore(snapshot)
            for tensor, own in zip(self._besides(), self._local_buffers, strict=True):
                tensor.copy_(own)
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

    def _to_consensus(self, for_good: bool = False) -> None:
        assert self.last_meeting is not None  # every way here begins with one
        with torch.no_grad():
            for index, unit in enumerate(self.units):
                unit.drain()
                round = self._round(self.last_meeting, Header(Reason.SYNC, index))
                if for_good:
                    with self.iterates[index].following(self.workers, round.weights):
                        unit.finish(round)
                else:
                    unit.consensus(round)
            average_tensors(self._besides(), self.everyone, [float(not h.poisoned) for h in self.last_meeting.headers])

    def _buffers(self) -> list[Tensor]:
        return [] if self.module is None else [buffer.detach() for buffer in self.module.buffers()]

    def _besides(self) -> list[Tensor]:
        """What belongs to the consensus besides the trained parameters."""
        return [*self._buffers(), *self._moving.values()]

    # Tensors that no optimizer holds ----------------------------------------------------------------------------------

    def _look_for_moving(self) -> None:
        """Find parameters that no optimizer trains and that change all the same, such as an EMA teacher's.

        Frozen parameters must keep their bits, and a mean of equal values can lose one; so a parameter is averaged
        only once the workers' checksums of it differ.
        """
        if self.module is None or self.everyone.alone:
            return
        trained = {id(parameter) for unit in self.units for parameter in unit.layout.parameters}
        others = {
            name: parameter.detach()
            for name, parameter in self.module.named_parameters()
            if id(parameter) not in trained and name not in self._moving and parameter.numel()
        }
        if not others:
            return
        checksums = [float(tensor.sum(dtype=torch.float64)) for tensor in others.values()]
        columns = zip(*self.everyone.gather(checksums, "checksums of untrained parameters"), strict=True)
        differ = [name for name, column in zip(others, columns, strict=True) if len(set(column)) > 1]
        self._moving |= {name: others[name] for name in differ}

    def _average_moving(self, look: bool) -> None:
        if look:
            self._look_for_moving()
        with torch.no_grad():
            average_tensors(list(self._moving.values()), self.everyone)

    # State ------------------------------------------------------------------------------------------------------------

    def shared_state(self) -> dict[str, Any]:
        """State that is equal on all workers, of plain values and tensors."""
        return {"algorithm": self.algorithm.kind, "units": [unit.shared_state() for unit in self.units]}

    def local_state(self) -> dict[str, Any]:
        """State of this worker alone, of plain values and tensors: also its own parameters and buffers."""
        own = self._local if self._local is not None else [unit.layout.snapshot() for unit in self.units]
        buffers = self._local_buffers if self.in_consensus else self._besides()
        return {
            "units": [unit.local_state() for unit in self.units],
            "rounds": self.rounds,
            "parameters": [unit.layout.per_parameter(flat) for unit, flat in zip(self.units, own, strict=True)],
            "moving": list(self._moving),
            "buffers": list(buffers),
        }

    def load_shared_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`shared_state` returned, also with another number of workers.

        Raises:
            ValueError: if it is the state of another algorithm, or of other parameters.
        """
        if state["algorithm"] != self.algorithm.kind:
            raise ValueError(f"The state is that of {state['algorithm']}, which does not fit {self.algorithm.kind}.")
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
            named = dict(self.module.named_parameters()) if self.module is not None else {}
            self._moving = {name: named[name].detach() for name in state["moving"]}
            for buffer, own in zip(self._besides(), state["buffers"], strict=True):
                buffer.copy_(own)


def check_on_nonfinite(value: str) -> None:
    """Raise ValueError unless ``value`` says what to do with a worker whose parameters are not finite."""
    if value not in ("raise", "skip"):
        raise ValueError(f"on_nonfinite must be 'raise' or 'skip', got {value!r}.")


def _describe(optimizers: Sequence[Optimizer]) -> Iterator[str]:
    """The parameters that are synced, one description each."""
    for optimizer in optimizers:
        for index, group in enumerate(optimizer.param_groups):
            yield f"{type(optimizer).__name__} group {index}"
            for parameter in group["params"]:
                kind = f"{str(parameter.dtype).removeprefix('torch.')}{list(parameter.shape)}"
                yield kind if parameter.requires_grad else f"frozen {kind}"
