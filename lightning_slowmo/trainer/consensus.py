"""When the model holds the consensus in the course of a fit: for validation, in checkpoints, and when a user asks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning_slowmo.communication import Reason, SyncError
from lightning_slowmo.communication.meeting import ONE_RANK_ALONE
from lightning_slowmo.trainer.base import StrategyPart


class ConsensusMixin(StrategyPart):
    """Entering and leaving the consensus."""

    @contextmanager
    def consensus(self) -> Iterator[None]:
        """Let the model hold the consensus in this context, for an export or an evaluation in the middle of training.

        All ranks must enter and leave it; in between, single ranks may do as they like, as long as they do not
        communicate. Afterwards each worker has its own parameters and buffers back, bit for bit. Before and after
        ``fit`` the model is the consensus already, and nothing happens.

        Raises:
            SyncError: if some ranks do not come, or leave while others still communicate.

        Example::

            def on_train_epoch_end(self, trainer, module):
                with trainer.strategy.consensus():  # on all ranks
                    if trainer.is_global_zero:
                        torch.save(module.state_dict(), "export.pt")
        """
        with self._consensus(Reason.CONSENSUS):
            yield

    def settle(self) -> None:
        """Let all workers go on from the consensus, in the middle of training; all ranks must call this."""
        if self.core.training and not self._failed:
            with self._flags():
                self.core.running.finish()

    @contextmanager
    def _consensus(self, reason: Reason) -> Iterator[None]:
        if not self.core.training or self._failed:
            yield
            return
        self._fit.entering = True
        try:
            with self._flags(), self.core.consensus(reason):
                self._fit.entering = False
                yield
        finally:
            self._fit.entering = False

    def on_validation_start(self) -> None:
        """Validate the consensus."""
        super().on_validation_start()
        if self._trainer.state.fn == "fit" and self.core.engine is not None:
            with self._flags():
                self.core.enter_consensus(Reason.VALIDATION)

    def on_validation_end(self) -> None:
        """Restore this worker's own parameters."""
        super().on_validation_end()
        if self.core.engine is not None:
            with self._uninterrupted():
                self.core.leave_consensus(Reason.VALIDATION)

    def _compare_steps(self) -> None:
        """See, from the last meeting's headers, whether all workers have still taken the same number of steps."""
        meeting = self.core.running.last_meeting
        if meeting is not None:
            self._fit.in_step &= len({(header.reason, header.pending) for header in meeting.headers}) == 1

    def _check_entering(self) -> None:
        """Raise if this worker wants the consensus while the others go on to their next sync, and will not come.

        Workers that have taken equally many steps so far reach a line of code in the middle of an epoch after equally
        many, too: before a sync all of them, or none.
        """
        if (
            self._fit.entering
            and self._fit.in_step
            and not self._trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        ):
            names, rank = self.core.everyone.names, self.core.everyone.rank
            raise SyncError(
                f"{names[rank]} saves, or wants the consensus, while other workers went on training.{ONE_RANK_ALONE}"
            )
