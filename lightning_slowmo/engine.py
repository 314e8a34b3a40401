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
import warnings
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch.nn import Module
from torch.optim import Optimizer

from lightning_slowmo.algorithms.base import Algorithm, SyncReport, learning_rates
from lightning_slowmo.averaging.finite import is_finite
from lightning_slowmo.averaging.sharded import gathered
from lightning_slowmo.communication.broadcast import broadcast_state, broadcast_tensors
from lightning_slowmo.communication.hierarchy import members
from lightning_slowmo.communication.meeting import Header, Level, Meeting, Reason, meet
from lightning_slowmo.communication.reduction import reduce_present
from lightning_slowmo.communication.workers import SyncError, Traffic, Workers
from lightning_slowmo.consensus import Consensus
from lightning_slowmo.consistency import check_on_nonfinite, require_same_setting, require_same_start

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
        self.module = module
        self.on_nonfinite = on_nonfinite
        self.stop = False
        self.terminate = False
        self.save = False
        self.total = SyncReport(count=0)
        self.on_sync: Callable[[bool], None] = lambda agreed: None
        self.rounds = 0
        self.last_meeting: Meeting | None = None
        self._optimizers = list(optimizers)
        self._shard, self._offload = shard_slow_state, offload_slow_state is not None
        self._bind(workers, everyone)
        for index, optimizer in enumerate(self._optimizers):
            optimizer.register_step_pre_hook(_joining(weakref.ref(self), index))

    def _bind(self, workers: Workers, everyone: Workers | None) -> None:
        """Make the running state of the algorithm, between these workers."""
        self.workers = workers
        self.everyone = workers if everyone is None else everyone
        self.members = None if everyone is None else members(workers, everyone)
        require_same_setting(self.algorithm, self._optimizers, self.everyone, self.module)
        self.units = [self.algorithm.bind(optimizer, workers) for optimizer in self._optimizers]
        require_same_start(self.units, self.everyone, workers)
        if self._shard or self._offload:
            for running in self.units:
                running.place_slow_state(self._shard, self._offload)
        self._consensus = Consensus(self.module, workers, self.everyone)
        self._waited = [0.0 for _ in self.units]

    def rebind(self, workers: Workers, everyone: Workers | None = None) -> None:
        """Go on with other workers in the middle of training: from the consensus, with the slow state.

        What each worker had of its own (local steps since the last sync, residuals) is left behind, as when a
        checkpoint is continued by another number of workers.

        Args:
            workers: who takes part from now on. All of them must call this together, and so must all workers of
                before: those that leave, with ``Workers()``. Those that join have made an engine with ``Workers()``,
                and get model and state from worker 0.
            everyone: all processes, if several of them make up one worker.
        """
        self.finish()
        state = {"shared": self.shared_state(), "rounds": self.rounds, "untrained": list(self._consensus.untrained)}
        together = workers if everyone is None else everyone
        state = broadcast_state(state, together)
        self._consensus.compare_buffers(together)
        with torch.no_grad():
            broadcast_tensors(self._consensus.model(self.units), together)
        self._bind(workers, everyone)
        self.load_shared_state(state["shared"])
        self.rounds = state["rounds"]
        self._consensus.average_also(state["untrained"])

    # Training ---------------------------------------------------------------------------------------------------------

    def after_backward(self, loss_scale: float | None = None) -> None:
        """Exchange gradients, for the algorithms that do; call it when gradients are complete, before clipping.

        Args:
            loss_scale: what a gradient scaler has multiplied the loss by; None if there is no scaler. Call this before
                the scaler's ``unscale_``, which looks for infinities on one worker alone.
        """
        for index, running in enumerate(self.units):
            if not running.innermost.exchanges_gradients:
                continue
            # While another optimizer has its turn, this one's parameters may be frozen: that changes no layout.
            if any(parameter.grad is not None for group in running.groups() for parameter in group):
                running.innermost.loss_scale = loss_scale
                running.join()  # the first gradient of a parameter that joins counts, too
                self.meet(Reason.GRADIENTS, index)

    def before_step(self, optimizer_index: int = 0) -> None:
        """Let parameters join that were added to an optimizer, or unfrozen.

        The optimizer's own hook does so before every step; call this only if something looks at the layout earlier.
        """
        self.units[optimizer_index].join()

    def after_step(self, optimizer_index: int = 0) -> SyncReport | None:
        """Count an optimizer step, and sync if it is time; call it after the step and before the LR scheduler's.

        Args:
            optimizer_index: of the optimizer that stepped.

        Returns:
            What the sync did, or None if there was none.
        """
        running = self.units[optimizer_index]
        start = time.perf_counter()
        running.after_step()  # may wait for an average that was sent some steps ago
        self._waited[optimizer_index] += time.perf_counter() - start
        levels = running.due()
        return self.meet(Reason.SYNC, optimizer_index, levels) if levels else None

    def finish(self) -> None:
        """End training: every worker gets the consensus, whatever happened to its parameters since the last sync."""
        self.leave_consensus()
        meeting = self._meet(Reason.TRAIN_END)
        self._consensus.settle(self.units, meeting)

    @property
    def exchanges_gradients(self) -> bool:
        """Whether gradients are exchanged at every step, for all optimizers."""
        return all(running.innermost.exchanges_gradients for running in self.units)

    # Meetings ---------------------------------------------------------------------------------------------------------

    def meet(self, reason: Reason, optimizer_index: int = 0, levels: Level = Level.NONE) -> SyncReport | None:
        """Meet the other workers, and take part in every round that any of them needs until it is this one's turn.

        Args:
            reason: what this worker came for.
            optimizer_index: for a round, index of the optimizer.
            levels: for a sync, the parts of the algorithm that are due.

        Returns:
            For a round, what it did.
        """
        while True:
            start, before = time.perf_counter(), self._traffic()
            header = self._header(reason, optimizer_index, levels)
            meeting = self.last_meeting = meet(header, self.everyone, self.members)
            self.stop |= meeting.stop
            self.terminate |= meeting.terminate
            self.save |= meeting.save
            self._check_poison(meeting)
            wanted = meeting.wanted
            if wanted is None and meeting.must_meet_again(reason):
                if reason in (Reason.PAUSE, Reason.EPOCH_END):
                    return None
                continue
            if wanted is None and meeting.scattered:
                return None
            if wanted is not None and wanted.reason is Reason.REDUCE:
                if reason is Reason.REDUCE:
                    return None
                reduce_present(None, "", meeting, self.everyone, self.units[0].layout.parameters[0].device)
                continue
            if wanted is None:
                for index, running in enumerate(self.units):
                    running.innermost.catch_up(meeting.round(Header(reason, index)))
                return None
            drift, skipped, count = self._take_part(meeting, wanted)
            used, index = self._traffic() - before, wanted.optimizer_index
            seconds = time.perf_counter() - start + self._waited[index]
            report = SyncReport(used.sent, used.received, seconds, drift, skipped, count)
            self._waited[index] = 0.0
            self.total = self.total + report
            if (wanted.reason, index) == (reason, optimizer_index):
                return report

    def _meet(self, reason: Reason) -> Meeting:
        """Meet for something that is no round."""
        self.meet(reason)
        assert self.last_meeting is not None
        return self.last_meeting

    def end_epoch(self) -> Meeting:
        """Come to the end of an epoch, and help those that still have batches.

        Returns:
            The meeting. If it is scattered, the others go on first, and this worker is to come again; if they came for
            validation, it has to validate with them before.
        """
        return self._meet(Reason.EPOCH_END)

    def pause(self) -> bool:
        """Come between two batches, to do something that all workers must do together.

        Returns:
            Whether all workers are here. If not, some have other business first, and this one is to go on training.
        """
        return not self._meet(Reason.PAUSE).scattered

    @property
    def must_terminate(self) -> bool:
        """Whether all workers know that one of them received SIGTERM."""
        return self.last_meeting is not None and self.last_meeting.terminate

    @property
    def must_save(self) -> bool:
        """Whether all workers know that one of them was asked for a checkpoint."""
        return self.last_meeting is not None and self.last_meeting.save

    def _take_part(self, meeting: Meeting, wanted: Header) -> tuple[float, int, int]:
        """Take part in a round. Returns drift, skipped messages, and the number of syncs that it counts as."""
        self.rounds += 1
        index, round = wanted.optimizer_index, meeting.round(wanted)
        running = self.units[index]
        if wanted.reason is Reason.GRADIENTS:
            running.innermost.sync_gradients(round)
            return self.total.drift, 0, 0
        with running.iterates.following(self.workers) as average_offsets:
            synced = running.sync(round)
            if synced.agreed:
                average_offsets(round.weights)
        if self.rounds <= 2:
            self._consensus.look_for_untrained(self.units)
        self._consensus.average_untrained(meeting)
        if not all(round.healthy):
            self._consensus.heal(running, round)
        # All workers must come to the same answer, so it follows from what they told one another.
        others = [pending for header in meeting.headers for i, pending in enumerate(header.pending) if i != index]
        self.on_sync(synced.agreed and not any(others))
        return synced.drift, synced.skipped, 1

    def _traffic(self) -> Traffic:
        own = self.workers.traffic
        return own.copy() if self.everyone is self.workers else own + self.everyone.traffic

    def _header(self, reason: Reason, optimizer_index: int, levels: Level) -> Header:
        rates = [rate for running in self.units for rate in learning_rates(running.optimizer)]
        pending = tuple(running.innermost.pending for running in self.units)
        waiting = not reason.is_round and any(pending)
        checked = reason in POISON_CHECKED or waiting  # a worker that waits may have to take part in a sync
        return Header(
            reason,
            optimizer_index,
            levels,
            rounds=self.rounds,
            stop=self.stop,
            terminate=self.terminate,
            save=self.save,
            poisoned=checked and not all(is_finite(running.layout) for running in self.units),
            rates=zlib.crc32(repr(rates).encode()),
            pending=pending,
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

    # Consensus --------------------------------------------------------------------------------------------------------

    @property
    def in_consensus(self) -> bool:
        """Whether the model holds the consensus at present, and the workers' own parameters are put aside."""
        return self._consensus.entered

    def enter_consensus(self, reason: Reason = Reason.VALIDATION) -> None:
        """Put this worker's parameters and buffers aside and load the consensus; all workers must call this."""
        if not self.in_consensus:
            meeting = self._meet(reason)
            self._consensus.enter(self.units, meeting)

    def leave_consensus(self) -> None:
        """Give this worker its own parameters and buffers back, bit for bit."""
        self._consensus.leave(self.units)

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

    # State ------------------------------------------------------------------------------------------------------------

    def shared_state(self, whole: bool = True) -> dict[str, Any]:
        """State that all workers share; all must call this. ``whole=False`` leaves sharded slow state in its pieces."""
        state = {"algorithm": self.algorithm.kind, "units": [running.shared_state() for running in self.units]}
        return gathered(state, self.workers, self.units[0].layout.runs[0].device) if whole and self._shard else state

    def local_state(self) -> dict[str, Any]:
        """State of this worker alone, of plain values and tensors: also its own parameters and buffers."""
        own = {"units": [running.local_state() for running in self.units], "rounds": self.rounds}
        return own | self._consensus.local_state(self.units)

    def load_shared_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`shared_state` returned, also with another number of workers.

        Raises:
            ValueError: if it is the state of another algorithm, or of other parameters.
        """
        if state["algorithm"] != self.algorithm.kind:
            raise ValueError(f"The state is that of {state['algorithm']}, which does not fit {self.algorithm.kind}.")
        for running, saved in zip(self.units, state["units"], strict=True):
            running.load_shared_state(saved)

    def load_local_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`local_state` returned on this worker."""
        self.rounds = state["rounds"]
        for running, saved in zip(self.units, state["units"], strict=True):
            running.load_local_state(saved)
        self._consensus.load_local_state(self.units, state)


def _joining(engine: weakref.ref[Engine], index: int) -> Callable[..., None]:
    """A hook for an optimizer that lets parameters join before its step, for as long as its engine lives."""

    def join(*_: Any) -> None:
        if (alive := engine()) is not None:
            alive.before_step(index)

    return join
