"""Where workers can come apart in the Trainer's loops, and how they come together again.

Workers whose inputs differ reach the end of an epoch, a validation or the end of training at different moments, or,
without a single batch, not by the usual way. Three methods of the Trainer's loops are wrapped for the length of a fit:
one that runs an epoch, one that validates, and one that runs all of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_slowmo import private
from lightning_slowmo.communication import Reason, SyncError
from lightning_slowmo.trainer.base import StrategyPart
from lightning_slowmo.trainer.summary import warn_of_short_fit


class LoopsMixin(StrategyPart):
    """The Trainer's loops, with meetings where workers can come apart."""

    def _take_over_loops(self) -> None:
        """Wrap the Trainer's loops until the fit ends."""
        fit = self._trainer.fit_loop
        for loop, wrapper in (
            (fit, self._run_fit),
            (fit.epoch_loop, self._run_epoch),
            (fit.epoch_loop.val_loop, self._run_validation),
        ):
            self._fit.undo.append(wrap_method(loop, "run", wrapper))

    # All epochs -------------------------------------------------------------------------------------------------------

    def _run_fit(self, run: Callable[[], None]) -> None:
        """Run the fit loop; also where it has nothing to do, all workers end with the consensus."""
        self.core.training = True
        self._start_without_batches()
        run()
        if self.core.training:  # the loop was skipped: nothing to train, or all of it was trained before
            self._meet(Reason.TRAIN_END)
            meeting = self.core.running.last_meeting
            if meeting is not None and any(header.rounds or any(header.pending) for header in meeting.headers):
                self._finish()
            self.core.training = False

    def _start_without_batches(self) -> None:
        """Keep the Trainer from skipping the fit on a worker whose loader is empty while others have batches.

        The same lengths say whether there are enough of them for a sync.
        """
        fit = self._trainer.fit_loop
        fit.setup_data()
        lengths = [length for (length,) in self.core.everyone.gather([float(fit.max_batches)])]
        if fit.max_batches == 0 and any(lengths):
            fit.max_batches = math.inf
        warn_of_short_fit(self._trainer, self.package, self.core, max(lengths))

    def _finish(self) -> None:
        """All workers get the consensus, and training ends."""
        engine = self.core.running
        with self._flags():
            engine.finish()
        if engine.must_save:
            self._save_wanted()
        self.core.training = False

    def _finish_after_interrupt(self) -> None:
        """After Ctrl-C: get the consensus, if the others were interrupted, too, or stop when they hear of it."""
        engine = self.core.engine
        if engine is None or not self.core.training:
            return
        engine.stop = True
        try:
            engine.finish()
        except SyncError as error:
            rank_zero_warn(f"After the interrupt each worker keeps parameters of its own: {error}")

    def _save_wanted(self) -> None:
        assert self._fit.signals is not None
        self._fit.signals.save_wanted()

    # One epoch --------------------------------------------------------------------------------------------------------

    def _start_epoch(self) -> None:
        """Meet at the first batch of an epoch.

        Raises:
            StopIteration: if training has ended for another worker, so that this epoch ends before its first batch.
            SyncError: if this one must not stop yet.
        """
        self._meet(Reason.EPOCH_START)
        meeting = self.core.running.last_meeting
        if meeting is None:
            return
        self.core.start_epoch(self._trainer.current_epoch)
        self._fit.idlers = Reason.EPOCH_END in meeting.reasons
        if Reason.TRAIN_END in meeting.reasons:
            if not (self._trainer.should_stop and self._can_stop):
                raise SyncError(
                    "Another worker has ended training, while this one has to go on. Give all ranks the same "
                    "max_epochs, min_epochs and min_steps."
                )
            raise StopIteration  # which the Trainer takes for the end of the epoch

    @property
    def _can_stop(self) -> bool:
        """Whether ``min_epochs`` and ``min_steps`` allow this worker to stop."""
        trainer = self._trainer
        epochs = not trainer.min_epochs or trainer.current_epoch >= trainer.min_epochs
        return epochs and (not trainer.min_steps or trainer.global_step >= trainer.min_steps)

    def _run_epoch(self, run: Callable[[Any], None], batches: Any) -> None:
        """Run an epoch; then help those that still have batches, until all workers are at its end."""
        loop = self._trainer.fit_loop.epoch_loop
        self._fit.idlers = False
        run(batches)
        idle = loop.batch_progress.current.ready == 0
        if idle:  # the Trainer does this with the last batch
            loop.batch_progress.is_last_batch = True
            loop.update_lr_schedulers("epoch", update_plateau_schedulers=False)
        while True:
            with self._flags():
                meeting = self.core.running.end_epoch()
            if not meeting.scattered or Reason.TRAIN_END in meeting.reasons:
                break
            self._fit.idlers |= Reason.EPOCH_START in meeting.reasons
            if Reason.VALIDATION in meeting.reasons:
                self._save_again()
                private.validate(self._trainer)
        if self._fit.idlers:
            self._share_metrics(idle)

    def _share_metrics(self, idle: bool) -> None:
        """Let workers without a batch log what the others have logged, without a value: reducing it needs everybody.

        Args:
            idle: whether this worker had no batch in this epoch.
        """
        with self._uninterrupted():
            texts = self.core.everyone.gather_text("" if idle else json.dumps(private.logged_metrics(self._trainer)))
        if idle:
            private.log_nothing(self._trainer, json.loads(next(filter(None, texts))))
            self._save_again()

    def _save_again(self) -> None:
        """Let checkpoints be written although this worker has taken no step since the last one: others have."""
        for callback in self._trainer.callbacks:
            if isinstance(callback, self.package.callbacks.ModelCheckpoint):
                private.forget_last_save(callback)

    # Validation -------------------------------------------------------------------------------------------------------

    def _run_validation(self, run: Callable[[], Any]) -> Any:
        """Meet before anything of a validation begins, so that workers at the end of their epoch can join it."""
        self._meet(Reason.VALIDATION)
        return run()


def wrap_method(loop: Any, name: str, wrapper: Callable[..., Any]) -> Callable[[], None]:
    """Let ``loop.name(...)`` call ``wrapper(method, ...)``.

    Returns:
        A function that restores the loop.
    """
    method = getattr(loop, name)
    setattr(loop, name, lambda *arguments: wrapper(method, *arguments))
    return lambda: delattr(loop, name)
