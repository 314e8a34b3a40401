"""What the parts of the Fabric strategy have in common: its core, and the state of the present run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from lightning_slowmo import private
from lightning_slowmo.communication import Reason
from lightning_slowmo.core import StrategyCore

if TYPE_CHECKING:
    from lightning.fabric.strategies import DDPStrategy
else:  # the parts serve both `lightning` and `lightning_fabric`; a subclass adds either package's DDPStrategy
    DDPStrategy = object


@dataclass
class Run:
    """State of one training run on one process; none of it is pickled.

    Attributes:
        modules: the models that were set up, as they were before DDP wrapped them.
        optimizers: that were set up with them, all in one row: the engine has a unit for each.
        versions: each parameter, and how often it had been changed in place when the engine took it; empty after the
            first step.
        stepped: whether a step was taken.
        stepping: whether an optimizer is being stepped through the strategy.
        accumulating: whether gradients are kept for a later step.
        met: whether the workers have met for the collectives that follow, inside a collective of the strategy's.
        failed: whether training has ended with an exception on this worker, which must not communicate any more.
        undo: functions that end what began with training; called last to first.
    """

    modules: list[Module] = field(default_factory=list)
    optimizers: list[Optimizer] = field(default_factory=list)
    versions: list[tuple[Tensor, int]] = field(default_factory=list)
    stepped: bool = False
    stepping: bool = False
    accumulating: bool = False
    met: bool = False
    failed: bool = False
    undo: list[Callable[[], None]] = field(default_factory=list)


class StrategyPart(DDPStrategy):
    """Base of the mixins that together make up :class:`~lightning_slowmo.fabric.mixin.SlowMoFabricMixin`.

    Attributes:
        core: options, process groups, engine and checkpoints.
        ddp_kwargs: arguments for DistributedDataParallel inside nodes.
        package: the Fabric that a subclass serves: ``lightning.fabric`` or ``lightning_fabric``.
    """

    core: StrategyCore
    ddp_kwargs: dict[str, Any]
    package: ClassVar[ModuleType]
    _run: Run

    def _meet(self, reason: Reason) -> None:
        """Meet before a collective that is not the engine's, so that a worker that is still training can come to it."""
        if not self._run.failed:
            self.core.meet(reason)

    @contextmanager
    def _consensus(self, reason: Reason) -> Iterator[None]:
        """The models hold the consensus; outside training, and after a failure, nothing happens."""
        if not self.core.training or self._run.failed:
            yield
            return
        with self.core.consensus(reason):
            yield
        if not self._run.stepped:
            self._note_versions()

    def _note_versions(self) -> None:
        """Remember how often each trained parameter was changed in place, until the first step."""
        held = [p for optimizer in self._run.optimizers for group in optimizer.param_groups for p in group["params"]]
        self._run.versions = [(parameter, private.version_of(parameter)) for parameter in held]
