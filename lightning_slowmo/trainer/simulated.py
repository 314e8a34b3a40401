"""Many workers in one Trainer, on one device.

One step of the Trainer is one step of all workers. They take turns: each gets its batch, stands on the stage
(:mod:`lightning_slowmo.replicas`), and runs what the Trainer does with a batch, until it has to wait for the others;
then the next one does (:mod:`lightning_slowmo.communication.turns`). Whatever happens between batches, a worker of a
real run would see: the first worker stands on the stage, or the consensus does.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any, Literal, TypeVar

import torch
from lightning_utilities.core.overrides import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_slowmo import private
from lightning_slowmo.algorithms import Algorithm
from lightning_slowmo.bucket_sizes import sizes_for
from lightning_slowmo.callbacks import AtSyncMixin
from lightning_slowmo.checkpoint import Restored
from lightning_slowmo.communication.in_process import in_process, together
from lightning_slowmo.communication.workers import DEFAULT_TIMEOUT, SyncError
from lightning_slowmo.core import StrategyCore
from lightning_slowmo.presets import PRESETS
from lightning_slowmo.private import simulated as loops
from lightning_slowmo.replicas import Stage, free_bytes, memory_of_worker
from lightning_slowmo.trainer.deal import DealingMixin
from lightning_slowmo.trainer.loops import wrap_method
from lightning_slowmo.trainer.summary import Summary, warn_of_short_fit

T = TypeVar("T")

WORKERS_VARIABLE = "LIGHTNING_SLOWMO_WORKERS"
"""Environment variable with the number of workers, where the strategy is named and not made."""


class SimulatedMixin(DealingMixin):
    """The part of :class:`~lightning_slowmo.SimulatedStrategy` that does not depend on which Lightning it serves.

    Where a GPU cannot hold all workers, they lie in the host's memory, and a line says so.

    Args:
        algorithm: a configuration such as ``SlowMo(sync_every=24)``, or the name of a preset.
        workers: how many; None: what the environment variable ``LIGHTNING_SLOWMO_WORKERS`` says.
        on_nonfinite: what happens when a worker's parameters have become NaN or infinite: ``"raise"``, or ``"skip"``
            that worker and give it the mean of the others.
        offload_slow_state: ``"cpu"`` to keep the workers' anchors and slow momentum in the CPU's memory.
        log_syncs: whether the first worker's ``sync/...`` metrics go to the Trainer's loggers at each sync, and a line
            with the totals to Lightning's log after the fit. There are no seconds in syncs: nothing was sent.
        accelerator: set by the Trainer.
        parallel_devices: set by the Trainer; one device.
        checkpoint_io: set by the Trainer, or a plugin of the user's.
        precision_plugin: set by the Trainer, or a plugin of the user's.

    Raises:
        ValueError: if the algorithm's name is unknown, or the number of workers is not given or not positive.

    Example::

        trainer = Trainer(strategy=SimulatedStrategy(SlowMo(sync_every=12), workers=32), devices=1)
        trainer.fit(module, loader)  # a step takes 32 batches of the loader
    """

    strategy_name = "slowmo_simulated"
    algorithm = property(attrgetter("core.algorithm"), doc="The configuration that all workers have.")
    workers = property(attrgetter("core.workers"), doc="The workers, as the first one knows them.")
    engine = property(attrgetter("core.engine"), doc="The first worker's engine; None before fit.")
    _static: bool | None = None  # whether addresses are kept, as for graphs of a GPU; None: on GPUs

    def __init__(
        self,
        algorithm: Algorithm | str = "slowmo",
        workers: int | None = None,
        on_nonfinite: Literal["raise", "skip"] = "raise",
        offload_slow_state: Literal["cpu"] | None = None,
        log_syncs: bool = True,
        accelerator: Any = None,
        parallel_devices: list[torch.device] | None = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
    ) -> None:
        super().__init__(accelerator=accelerator, checkpoint_io=checkpoint_io, precision_plugin=precision_plugin)
        self.parallel_devices = parallel_devices
        self.log_syncs = log_syncs
        self.cores = [
            StrategyCore(algorithm, DEFAULT_TIMEOUT, on_nonfinite, None, False, offload_slow_state)
            for _ in range(_number_of(workers))
        ]
        self._connect()

    def _connect(self) -> None:
        self._stage: Stage | None = None
        self._states: list[loops.LoopState] = []
        self._deals = []
        self._dealing = False
        self._restored: list[Restored] = []
        self._undo: list[Callable[[], None]] = []
        self._summary = Summary(timed=False)
        for core, workers in zip(self.cores, in_process(len(self.cores)), strict=True):
            core.join(workers)

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Register every preset with the suffix ``_simulated``."""
        for name, algorithm in PRESETS.items():
            if f"{name}_simulated" not in strategy_registry:
                strategy_registry.register(
                    f"{name}_simulated",
                    cls,
                    description=f"{algorithm!r}, with as many workers on one device as {WORKERS_VARIABLE} says",
                    algorithm=name,
                )

    # Set-up -----------------------------------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        """Refuse more than one device, and new processes."""
        if len(self.parallel_devices or ()) > 1:
            raise ValueError(
                f"{type(self).__name__} trains all its workers on one device, but the Trainer has "
                f"{len(self.parallel_devices or ())}. Use Trainer(devices=1), and SimulatedStrategy(workers=...) or "
                f"{WORKERS_VARIABLE} for the number of workers."
            )
        super().setup_environment()

    def setup(self, trainer: Any) -> None:
        """Set up model and optimizers, then a replica and an engine for every worker."""
        if trainer.state.fn != "fit":
            super().setup(trainer)
            return
        restored = self._restored  # a checkpoint is read before
        self._connect()
        self._restored = restored
        fit = trainer.fit_loop
        self._undo += [
            wrap_method(fit, "setup_data", self._deal_out),
            wrap_method(fit, "run", self._run_fit),
            wrap_method(fit.epoch_loop.automatic_optimization, "run", self._run_batch),
            wrap_method(fit.epoch_loop.manual_optimization, "run", self._run_batch),
        ]
        super().setup(trainer)
        assert self.lightning_module is not None
        on_host = self._lie_on_host()
        self._stage = Stage(self.lightning_module, self.optimizers, len(self.cores), self._static, on_host)
        replicas = self._stage.replicas
        sizes = sizes_for("cpu" if on_host else self.root_device, len(self.cores))

        def make_engine(core: StrategyCore) -> None:
            core.workers.sizes = sizes
            replica = replicas[core.workers.rank]
            core.make_engine(replica.optimizers, replica.module).on_sync = partial(self._on_sync, core)

        self._on_all(make_engine)

    def _lie_on_host(self) -> bool:
        """Whether the workers' values lie in the host's memory, as a GPU cannot hold them."""
        free = self._bytes_left()
        if free is None:
            return False
        assert self.lightning_module is not None
        workers = len(self.cores)
        memory = memory_of_worker(self.lightning_module, self.optimizers, self.algorithm, workers)
        why = memory.place(workers, free, free_bytes(), self.core.offload_slow_state is not None)
        if why:
            logging.getLogger(self.package.__name__).info(why)
        return why is not None

    def _bytes_left(self) -> int | None:
        """What a GPU has left for workers; None on a CPU, which is asked for no more than it has."""
        device = self.root_device
        if device.type != "cuda":
            return None
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused

    # Training ---------------------------------------------------------------------------------------------------------

    def _on_sync(self, core: StrategyCore, agreed: bool) -> None:
        """Call the callbacks that act at syncs, as the first worker would."""
        callbacks = [each for each in self._trainer.callbacks if isinstance(each, AtSyncMixin)]
        if not (agreed and callbacks and core is self.core):
            return
        assert self._stage is not None
        self._stage.put(0)
        for callback in callbacks:
            callback.on_sync(self._trainer, self.lightning_module)
        self._stage.clear()

    def _run_fit(self, run: Callable[[], None]) -> None:
        """Run the fit loop; also where it has nothing to do, all workers end with the consensus."""
        self._set_training(True)
        fit = self._trainer.fit_loop
        fit.setup_data()
        warn_of_short_fit(self._trainer, self.package, self.core, fit.max_batches)
        run()
        if self.core.training:
            self._finish()

    def _set_training(self, training: bool) -> None:
        for core in self.cores:
            core.training = training

    def _run_batch(self, run: Callable[..., Any], *arguments: Any) -> Any:
        """Let every worker run the Trainer's loop over one batch, each with its own.

        Args:
            run: of automatic or manual optimization.
            arguments: for the first worker; the last one has the batch.

        Returns:
            What the first worker's returned.
        """
        assert self._stage is not None
        trainer, stage = self._trainer, self._stage
        *others, options = arguments
        batches = self._batches_of_others()
        if stage.follow():
            self._on_all(_let_join)
        stage.spread_options()
        self._renew_states()

        def turn(workers: Any) -> Any:
            index = workers.rank
            self._take_stage(index)
            own = options | {"batch": loops.prepared(trainer, batches[index - 1])} if index else options
            output = run(*others, own)
            self._leave_stage(index)
            return output

        try:
            outputs = together([core.workers for core in self.cores], turn)
        finally:
            self._states[0].install()
        stage.put(0)
        return outputs[0]

    def _renew_states(self) -> None:
        """Let every worker's loops begin where the Trainer's are now.

        In automatic optimization they go on alike until the end of the epoch, when the Trainer resets its own.
        """
        trainer = self._trainer
        if self._states and trainer.lightning_module.automatic_optimization and not loops.begins_epoch(trainer):
            return
        earlier: list[Any] = self._states or [None] * len(self.cores)
        quiet = self.package.profilers.PassThroughProfiler()
        self._states = [
            loops.LoopState(trainer, index == 0, quiet if index else trainer.profiler, state)
            for index, state in enumerate(earlier)
        ]

    @property
    def _accumulates(self) -> bool:
        """Whether the present batch's gradients are kept for a later step."""
        return loops.accumulates(self._trainer)

    def _take_stage(self, index: int) -> None:
        assert self._stage is not None
        if self._stage.current != index:
            self._stage.put(index)
            self._states[index].install()

    def _leave_stage(self, index: int, used: bool = False) -> None:
        """Leave the stage; with ``used`` without gradients, except those of worker 0, at which callbacks may look."""
        assert self._stage is not None
        if self._stage.current == index:
            self._stage.clear(drop_gradients=used and index > 0)
            self._states[index].take()

    def _on_engine(self, index: int, function: Callable[[StrategyCore], T], last: bool = False) -> T:
        """Call a function with the core of the worker on the stage, which it leaves meanwhile: others may come.

        Args:
            index: of the worker.
            function: what to call.
            last: whether nothing of the user's comes after it in this batch, so that the worker need not come back.
        """
        self._leave_stage(index, used=last)
        result = function(self.cores[index])
        if last:
            self._states[index].install()
        else:
            self._take_stage(index)
        return result

    @property
    def _ends_with_step(self) -> bool:
        """Whether nothing of the user's comes after an optimizer step of the present batch."""
        module = self.lightning_module
        return bool(
            module
            and module.automatic_optimization
            and not is_overridden("optimizer_step", module, self.package.LightningModule)
        )

    def post_backward(self, closure_loss: Tensor) -> None:
        """Exchange gradients, for the algorithms that do, before they are clipped."""
        super().post_backward(closure_loss)
        stage = self._stage
        if stage is None or stage.current is None or not self.core.training:
            return
        index = stage.current
        exchanges = any(unit.innermost.exchanges_gradients for unit in self.cores[index].running.units)
        if exchanges and not self._accumulates:
            scaler = getattr(self.precision_plugin, "scaler", None)
            loss_scale = scaler.get_scale() if scaler is not None and scaler.is_enabled() else None
            self._on_engine(index, lambda core: core.running.after_backward(loss_scale))

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Step, then sync if it is time."""
        assert self._stage is not None
        index, place = self._stage.current, self.optimizers.index(optimizer)
        assert index is not None
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        if private.skips_backward(self._trainer):  # this epoch changes statistics alone, so there is nothing to sync
            return output
        if index == 0:
            self._summary.stepped(place)
        report = self._on_engine(index, lambda core: core.running.after_step(place), last=self._ends_with_step)
        if report is not None and self.log_syncs and index == 0:
            metrics = report.metrics() | {"sync/count": self.core.running.total.count}
            del metrics["sync/seconds"]
            for logger in self._trainer.loggers:
                logger.log_metrics(metrics, step=private.logging_step(self._trainer))
        return output

    # End --------------------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        self._on_all(lambda core: core.running.finish())
        self._set_training(False)

    def on_train_end(self) -> None:
        """All workers end with the consensus, and a line says what it would have taken to send."""
        super().on_train_end()
        self._finish()
        if self.log_syncs:
            self._summary.log(self.core, self.package)

    def on_exception(self, exception: BaseException) -> None:
        """After Ctrl-C the workers end with the consensus; after an error nothing is averaged any more."""
        if isinstance(exception, KeyboardInterrupt) and self.core.training:
            try:
                self._finish()
            except SyncError as error:  # some waited in a sync while others were interrupted before it
                rank_zero_warn(f"After the interrupt the model holds the first worker's parameters: {error}")
        self._set_training(False)
        super().on_exception(exception)

    def teardown(self) -> None:
        """Restore what was changed in Lightning, and give the module its own memory back."""
        self._set_training(False)
        while self._undo:
            self._undo.pop()()
        if self._stage is not None:
            self._stage.retire()
        super().teardown()


def _let_join(core: StrategyCore) -> None:
    for place in range(len(core.running.units)):
        core.running.before_step(place)


def _number_of(workers: int | None) -> int:
    """The number of workers, of the argument or of the environment.

    Raises:
        ValueError: if there is none, or it is no positive integer.
    """
    given: Any = os.environ.get(WORKERS_VARIABLE) if workers is None else workers
    if given is None:
        raise ValueError(
            f"How many workers? Use SimulatedStrategy(workers=32), or set the environment variable {WORKERS_VARIABLE}."
        )
    try:
        number = int(given)
    except (TypeError, ValueError):
        number = 0
    if number < 1 or isinstance(given, float):
        raise ValueError(f"The number of simulated workers must be a positive integer, got {given!r}.")
    return number
