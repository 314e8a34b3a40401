"""The life of a fit: when the core is set up, when it syncs, and how it ends.

:class:`SlowMoMixin` goes in front of either Lightning's ``DDPStrategy``, from which it takes launchers, process group,
samplers, ranks and devices. The model is not wrapped in DistributedDataParallel (except inside nodes). Syncs come at
the end of ``optimizer_step``: before the learning-rate scheduler moves on, and not while gradients accumulate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_slowmo import private
from lightning_slowmo.algorithms import Algorithm, SyncReport
from lightning_slowmo.callbacks import AtSyncMixin, refuse_local_pruning
from lightning_slowmo.communication.timeouts import DEFAULT_TIMEOUT, as_timeout
from lightning_slowmo.core import StrategyCore
from lightning_slowmo.joining import check_ddp_kwargs, join, refuse_devices
from lightning_slowmo.presets import LAUNCHERS, PRESETS
from lightning_slowmo.trainer.base import Fit
from lightning_slowmo.trainer.batch_norm import NodeBatchNorm
from lightning_slowmo.trainer.checkpoints import CheckpointsMixin
from lightning_slowmo.trainer.collectives import CollectivesMixin
from lightning_slowmo.trainer.launching import bring_report_back
from lightning_slowmo.trainer.loops import LoopsMixin
from lightning_slowmo.trainer.mistakes import explain_names, explains_arguments, refuse_notebook
from lightning_slowmo.trainer.optimizers import OptimizersMixin
from lightning_slowmo.trainer.signals import Signals
from lightning_slowmo.trainer.warnings import warn_of_callbacks


def _of_core(name: str) -> Any:
    """An attribute of the strategy that is its core's."""
    return property(attrgetter(f"core.{name}"), doc=f"See :class:`~lightning_slowmo.core.StrategyCore`, ``{name}``.")


class SlowMoMixin(CollectivesMixin, CheckpointsMixin, OptimizersMixin, LoopsMixin):
    """The part of :class:`~lightning_slowmo.SlowMoStrategy` that does not depend on which Lightning it serves.

    Args:
        algorithm: a configuration such as ``SlowMo(sync_every=24)``, or the name of a preset.
        sync_timeout: how long a worker waits for the others at a sync before it gives up and says whom it waited for,
            in seconds or as a timedelta; by default as long as ``timeout``.
        on_nonfinite: what happens when a worker's parameters have become NaN or infinite: ``"raise"`` on all workers
            before anything is averaged, or ``"skip"`` that worker and give it the mean of the others.
        workers_per_node: processes of a machine (or ``"all"``) that make up one worker: DDP averages their gradients
            at every step, and the algorithm runs between such nodes. None: every process is a worker.
        ddp_kwargs: arguments for DistributedDataParallel inside nodes, such as ``{"find_unused_parameters": True}``.
        shard_slow_state: whether each worker keeps only its share of anchor and slow momentum, 2/n of the parameters
            instead of twice as much as they; at a sync it costs the same traffic.
        offload_slow_state: ``"cpu"`` to keep anchor and slow momentum in the CPU's memory.
        log_syncs: whether ``sync/...`` metrics go to the Trainer's loggers at each sync, and a line with the totals to
            Lightning's log after the fit.
        bucket_cap_mb: size of messages in MiB, as DDP's option of that name, equal on all workers. None: 8, or more for
            many workers and large models. ``slowmo-plan`` says where latency and bandwidth ask for another one.
        accelerator: set by the Trainer.
        parallel_devices: set by the Trainer.
        cluster_environment: set by the Trainer, or a plugin of the user's.
        checkpoint_io: set by the Trainer, or a plugin of the user's.
        precision_plugin: set by the Trainer, or a plugin of the user's.
        process_group_backend: backend of torch.distributed; by default NCCL on GPUs and gloo on CPUs. With gloo, what
            GPUs hold travels through host memory.
        timeout: limit for the operations of torch.distributed, in seconds or as a timedelta.
        start_method: how processes are started: ``"popen"``, ``"spawn"``, ``"fork"`` or ``"forkserver"``.

    Raises:
        ValueError: if the algorithm's name is unknown; lists the known ones.
        TypeError: for other arguments; says what to write instead.
    """

    strategy_name = "slowmo"

    algorithm = _of_core("algorithm")
    sync_timeout = _of_core("sync_timeout")
    on_nonfinite = _of_core("on_nonfinite")
    workers_per_node = _of_core("workers_per_node")
    shard_slow_state = _of_core("shard_slow_state")
    offload_slow_state = _of_core("offload_slow_state")
    bucket_cap_mb = _of_core("bucket_cap_mb")
    everyone = _of_core("everyone")
    workers = _of_core("workers")
    engine = _of_core("engine")

    @explains_arguments
    def __init__(
        self,
        algorithm: Algorithm | str = "slowmo",
        sync_timeout: timedelta | float | None = None,
        on_nonfinite: Literal["raise", "skip"] = "raise",
        workers_per_node: int | Literal["all"] | None = None,
        ddp_kwargs: dict[str, Any] | None = None,
        shard_slow_state: bool = False,
        offload_slow_state: Literal["cpu"] | None = None,
        log_syncs: bool = True,
        bucket_cap_mb: float | None = None,
        accelerator: Any = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
        process_group_backend: str | None = None,
        timeout: timedelta | float | None = DEFAULT_TIMEOUT,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
    ) -> None:
        limit = None if timeout is None else as_timeout("timeout", timeout)
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=limit,
            start_method=start_method,
        )
        self.core = StrategyCore(
            algorithm,
            sync_timeout if sync_timeout is not None else limit or DEFAULT_TIMEOUT,
            on_nonfinite,
            workers_per_node,
            shard_slow_state,
            offload_slow_state,
            bucket_cap_mb,
        )
        self.ddp_kwargs = check_ddp_kwargs(ddp_kwargs, self.core)
        self.log_syncs = log_syncs
        self.start_method = start_method
        self._fit = Fit()

    def __getstate__(self) -> dict[str, Any]:
        """Without the state of the present fit; the core leaves out its process groups."""
        return super().__getstate__() | {"_fit": Fit()}

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Register every preset, with the suffixes ``_spawn``, ``_fork`` and ``_notebook``."""
        for name, algorithm in PRESETS.items():
            for suffix, start_method in LAUNCHERS.items():
                if name + suffix not in strategy_registry:
                    strategy_registry.register(
                        name + suffix,
                        cls,
                        description=f"{algorithm!r}, with `start_method` '{start_method}'",
                        algorithm=name,
                        start_method=start_method,
                    )
        explain_names(strategy_registry, cls.package.__name__, cls)

    @property
    def report(self) -> SyncReport | None:
        """Totals over all syncs of the present or last fit; None if there was none, or it is not known here.

        They are this worker's; in the process that spawned the workers, those of rank 0.
        """
        return self.core.report

    @property
    def launcher(self) -> Any:
        """What starts the processes, and brings the report back from them."""
        launcher = super().launcher
        bring_report_back(launcher)
        return launcher

    # Set-up -----------------------------------------------------------------------------------------------------------

    def set_world_ranks(self) -> None:
        """Take over the ranks; the Trainer calls this when it is made, so that it refuses where it cannot work."""
        refuse_notebook(self.algorithm, self.start_method)
        super().set_world_ranks()

    def setup_environment(self) -> None:
        """Refuse devices and plugins that cannot work, before anything is started."""
        refuse_devices(self, self.precision_plugin, self.package, "Trainer")
        super().setup_environment()

    def setup_distributed(self) -> None:
        """Join the process group, then make this strategy's own groups beside it."""
        self.set_world_ranks()
        join(self, self.core, super().setup_distributed, "Trainer")

    def configure_ddp(self) -> None:
        """Start all workers from rank 0's model, as DDP does, but wrap it inside nodes only: steps are local."""
        assert self.model is not None
        self.core.start_equal(self.model)
        self._wrap_in_node()

    def setup(self, trainer: Any) -> None:
        """Set up model and optimizers as DDP does, then the engine."""
        fitting = trainer.state.fn == "fit"
        batch_norm = private.sync_batch_norm(self)
        if fitting and batch_norm is not None:
            private.set_sync_batch_norm(self, NodeBatchNorm(batch_norm, self.core.node_group))
        super().setup(trainer)
        if not fitting:
            return
        assert self.lightning_module is not None
        self.core.make_engine(self.optimizers, self.lightning_module).on_sync = self._on_sync
        warn_of_callbacks(trainer, self.package)
        refuse_local_pruning(trainer, self.core, self.package)
        self._watch_optimizers()
        self._fit.signals = Signals(trainer, self.core, self.launcher)
        self._fit.undo.append(self._fit.signals.give_back)
        self._watch_default_group()
        self._take_over_loops()
        if self.core.may_skip_steps:
            self._fit.undo.append(private.allow_skipped_steps(trainer))
        for callback in trainer.callbacks:
            if isinstance(callback, self.package.callbacks.Timer) and private.looks_at_the_clock_every_step(callback):
                self._fit.undo.append(private.stop_by_own_clock(callback))

    # Training ---------------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """From now on every collective begins with a meeting."""
        super().on_train_start()
        self.core.training = True
        self._fit.summary.start()
        self._fit.in_step = self._trainer.global_step == 0  # not known of a checkpoint

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Meet at the start of an epoch, and write the checkpoints that a signal handler asked for."""
        super().on_train_batch_start(batch, batch_idx)
        if batch_idx == 0:
            self._start_epoch()
            self._compare_steps()
        engine = self.core.running
        if engine.must_save:
            with self._flags():
                ready = engine.pause()
            if ready:
                self._save_wanted()

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """While gradients accumulate, they are not exchanged."""
        self._fit.accumulating = True
        try:
            with super().block_backward_sync():
                yield
        finally:
            self._fit.accumulating = False

    def post_backward(self, closure_loss: Tensor) -> None:
        """Exchange gradients, for the algorithms that do, before they are clipped."""
        super().post_backward(closure_loss)
        if self.core.training and not self._fit.accumulating:
            scaler = getattr(self.precision_plugin, "scaler", None)
            loss_scale = scaler.get_scale() if scaler is not None and scaler.is_enabled() else None
            with self._flags():
                self.core.running.after_backward(loss_scale)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Step, then sync if it is time."""
        engine = self.core.running
        index = self._index_of(optimizer)
        engine.before_step(index)
        self._fit.stepping = True
        try:
            output = super().optimizer_step(optimizer, closure, model, **kwargs)
        finally:
            self._fit.stepping = False
        if private.skips_backward(self._trainer):  # this epoch changes statistics alone, so there is nothing to sync
            return output
        self._fit.reductions.stepped()
        self._fit.summary.stepped(index)
        with self._flags():
            report = engine.after_step(index)
        if report is not None and self.log_syncs:
            metrics = report.metrics() | {"sync/count": engine.total.count}
            for logger in self._trainer.loggers:
                logger.log_metrics(metrics, step=private.logging_step(self._trainer))
        return output

    def _on_sync(self, agreed: bool) -> None:
        """Call the callbacks that act at syncs; raise if this worker waits for a save that the others do not make."""
        self._check_entering()
        self._compare_steps()
        self._fit.reductions.synced()
        for callback in self._trainer.callbacks:
            if agreed and isinstance(callback, AtSyncMixin):
                callback.on_sync(self._trainer, self.lightning_module)

    # End --------------------------------------------------------------------------------------------------------------

    def on_train_end(self) -> None:
        """All workers end with the consensus, and the first one says what it took."""
        super().on_train_end()
        self._finish()
        if self.log_syncs:
            self._fit.summary.log(self.core, self.package)

    def on_exception(self, exception: BaseException) -> None:
        """Leave a message for the workers that will wait for this one, and communicate no more.

        After Ctrl-C, which reaches all processes, the workers end with the consensus first.
        """
        self._explain(exception)
        if isinstance(exception, KeyboardInterrupt):
            self._finish_after_interrupt()
        self.core.report_failure(exception)
        super().on_exception(exception)

    def teardown(self) -> None:
        """Restore what was changed in Lightning. The engine stays, so that its state can still be saved."""
        self.core.training = False
        while self._fit.undo:
            self._fit.undo.pop()()
        super().teardown()
