"""Validation with the consensus instead of this worker's own parameters."""

from __future__ import annotations

from lightning_slowmo.communication import Reason
from lightning_slowmo.trainer.base import StrategyPart


class ConsensusMixin(StrategyPart):
    """When the model holds the consensus in the course of a fit."""

    def on_validation_start(self) -> None:
        """Validate the consensus."""
        super().on_validation_start()
        if self._trainer.state.fn == "fit" and self.core.engine is not None:
            with self._flags():
                self.core.engine.enter_consensus(Reason.VALIDATION)

    def on_validation_end(self) -> None:
        """Go on with this worker's own parameters."""
        super().on_validation_end()
        if self.core.engine is not None:
            self.core.engine.leave_consensus()
