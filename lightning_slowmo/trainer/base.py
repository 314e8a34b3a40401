"""What the parts of the Trainer strategy have in common: its core, its Trainer, and the state of the present fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

from lightning_slowmo import private
from lightning_slowmo.checkpoint import Restored
from lightning_slowmo.communication import Reason
from lightning_slowmo.core import StrategyCore
from lightning_slowmo.trainer.signals import Signals
from lightning_slowmo.trainer.summary import Summary
from lightning_slowmo.trainer.warnings import MetricReductions

if TYPE_CHECKING:
    from lightning.pytorch.strategies import DDPStrategy
else:  # the parts serve both `lightning` and `pytorch_lightning`; a subclass adds either package's DDPStrategy
    DDPStrategy = object


@dataclass
class Fit:
    """State of one fit on one process; none of it is pickled.

    Attributes:
        stepping: whether an optimizer is being stepped through the strategy.
        accumulating: whether the present batch's gradients are kept for a later step.
        entering: whether this worker waits for the others to enter the consensus, at a user's or a callback's request.
        met: whether the workers have met for the collectives that follow, inside a collective of the strategy's.
        in_step: whether all workers had taken the same number of steps at every meeting so far.
        idlers: whether some workers have no batch at all in the present epoch.
        restored: what was read from the checkpoint that this fit resumes, until the engine takes it.
        signals: the Trainer's signals, taken over from set-up to teardown.
        reductions: counts the steps that reduced a metric.
        summary: counts what is said after the fit.
        undo: functions that restore what was changed in Lightning and in the optimizers; called last to first.
    """

    stepping: bool = False
    accumulating: bool = False
    entering: bool = False
    met: bool = False
    in_step: bool = False
    idlers: bool = False
    restored: Restored = field(default_factory=Restored)
    signals: Signals | None = None
    reductions: MetricReductions = field(default_factory=MetricReductions)
    summary: Summary = field(default_factory=Summary)
    undo: list[Callable[[], None]] = field(default_factory=list)


class StrategyPart(DDPStrategy):
    """Base of the mixins that together make up :class:`~lightning_slowmo.trainer.mixin.SlowMoMixin`.

    Attributes:
        core: options, process groups, engine and checkpoints.
        ddp_kwargs: arguments for DistributedDataParallel inside nodes.
        package: the Lightning that a subclass serves: ``lightning.pytorch`` or ``pytorch_lightning``.
    """

    core: StrategyCore
    ddp_kwargs: dict[str, Any]
    package: ClassVar[ModuleType]
    _fit: Fit

    @property
    def _trainer(self) -> Any:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    @property
    def _failed(self) -> bool:
        """Whether training has ended with an exception on this worker, which must not communicate any more then."""
        module = self.lightning_module
        trainer = None if module is None else private.attached_trainer(module)
        return trainer is not None and trainer.state.status == "interrupted"

    @property
    def _reached_max_steps(self) -> bool:
        """Whether this worker has taken ``max_steps`` steps, which ends training for all, also those with fewer."""
        limit = self._trainer.max_steps
        return limit != -1 and self._trainer.global_step >= limit

    @contextmanager
    def _flags(self) -> Iterator[None]:
        """Send ``should_stop`` with the headers of this context's meetings; afterwards take over the other workers'."""
        engine, trainer = self.core.running, self._trainer
        done = self._reached_max_steps
        engine.stop = bool(trainer.should_stop) or done
        with self._uninterrupted():
            yield
        if engine.stop and not done:
            trainer.should_stop = True
        if engine.must_terminate and not engine.must_save:  # else after that save
            private.mark_sigterm_received(trainer)

    def _uninterrupted(self) -> AbstractContextManager[None]:
        """Let Ctrl-C wait until this context ends."""
        return self._fit.signals.uninterrupted() if self._fit.signals is not None else nullcontext()

    def _meet(self, reason: Reason) -> None:
        """Meet before a collective of Lightning's own, so that a worker that is still training can come to it."""
        if self.core.training and not self._failed:
            with self._flags():
                self.core.meet(reason)
