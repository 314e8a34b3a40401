"""The life of a run under Fabric: when the core is set up, when it syncs, and how it ends.

:class:`SlowMoFabricMixin` goes in front of either Fabric's ``DDPStrategy``, from which it takes launchers, process
group, samplers, ranks and devices. Models are not wrapped in DistributedDataParallel (except inside nodes).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_slowmo import private
from lightning_slowmo.algorithms import Algorithm, SyncReport
from lightning_slowmo.communication import Reason
from lightning_slowmo.communication.timeouts import as_timeout
from lightning_slowmo.communication.workers import DEFAULT_TIMEOUT
from lightning_slowmo.core import StrategyCore
from lightning_slowmo.fabric.base import Run
from lightning_slowmo.fabric.checkpoints import CheckpointsMixin
from lightning_slowmo.fabric.collectives import CollectivesMixin
from lightning_slowmo.joining import check_ddp_kwargs, join, refuse_devices
from lightning_slowmo.presets import LAUNCHERS, PRESETS
from lightning_slowmo.unsynced import refuse_steps


class SlowMoFabricMixin(CollectivesMixin, CheckpointsMixin):
    """Local steps with slow momentum, gossip or compressed messages in a loop of your own, under Fabric.

    Example::

        fabric = Fabric(strategy=SlowMoFabricStrategy(SlowMo(sync_every=12)), devices=2)  # or strategy="slowmo"
        fabric.launch()
        model, optimizer = fabric.setup(model, optimizer)  # all workers get rank 0's model
        with fabric.strategy.training():  # ends with the consensus; says on all workers why one failed
            for batch in loader:
                optimizer.zero_grad()
                fabric.backward(loss(model, batch))
                optimizer.step()  # syncs if it is time
            with fabric.strategy.consensus():  # on all ranks
                validate(model)
            fabric.save("last.ckpt", {"model": model, "optimizer": optimizer})

    Args:
        algorithm: a configuration such as ``SlowMo(sync_every=24)``, or the name of a preset.
        sync_timeout: how long a worker waits for the others at a sync before it gives up and says whom it waited for,
            in seconds or as a timedelta; by default as long as ``timeout``.
        on_nonfinite: what happens when a worker's parameters have become NaN or infinite: ``"raise"`` on all workers
            before anything is averaged, or ``"skip"`` that worker and give it the mean of the others.
        workers_per_node: processes of a machine (or ``"all"``) that make up one worker: DDP averages their gradients
            at every step, and the algorithm runs between such nodes. None: every process is a worker.
        ddp_kwargs: arguments for DistributedDataParallel inside nodes, such as ``{"find_unused_parameters": True}``.
        shard_slow_state: whether each worker keeps only its share of anchor and slow momentum.
        offload_slow_state: ``"cpu"`` to keep anchor and slow momentum in the CPU's memory.
        bucket_cap_mb: size of messages in MiB, as DDP's option of that name, equal on all workers. None: 8, or more for
            many workers and large models.
        accelerator: set by Fabric.
        parallel_devices: set by Fabric.
        cluster_environment: set by Fabric, or a plugin of the user's.
        checkpoint_io: set by Fabric, or a plugin of the user's.
        precision: set by Fabric, or a plugin of the user's.
        process_group_backend: backend of torch.distributed; by default NCCL on GPUs and gloo on CPUs.
        timeout: limit for the operations of torch.distributed, in seconds or as a timedelta.
        start_method: how processes are started: ``"popen"``, ``"spawn"``, ``"fork"`` or ``"forkserver"``.

    Raises:
        ValueError: if the algorithm's name is unknown; lists the known ones.
    """

    def __init__(
        self,
        algorithm: Algorithm | str = "slowmo",
        sync_timeout: timedelta | float | None = None,
        on_nonfinite: Literal["raise", "skip"] = "raise",
        workers_per_node: int | Literal["all"] | None = None,
        ddp_kwargs: dict[str, Any] | None = None,
        shard_slow_state: bool = False,
        offload_slow_state: Literal["cpu"] | None = None,
        bucket_cap_mb: float | None = None,
        accelerator: Any = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: Any = None,
        checkpoint_io: Any = None,
        precision: Any = None,
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
            precision=precision,
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
        self._run = Run()
        self._backward_sync_control: Any = self  # which has the method that Fabric looks for

    def __getstate__(self) -> dict[str, Any]:
        """Without the state of the present run; the core leaves out its process groups."""
        return vars(self) | {"_run": Run()}

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

    @property
    def report(self) -> SyncReport | None:
        """Totals over all syncs of the present or last run, on this worker; None if nothing was set up."""
        return self.core.report

    # Set-up -----------------------------------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        """Join the process group, then make this strategy's own groups beside it."""
        refuse_devices(self, self.precision, self.package, "Fabric")
        environment = self.cluster_environment
        assert environment is not None
        environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
        environment.set_world_size(self.num_nodes * self.num_processes)
        join(self, self.core, super().setup_environment, "Fabric")

    def setup_module_and_optimizers(
        self, module: Module, optimizers: list[Optimizer], scheduler: Any = None
    ) -> tuple[Module, list[Optimizer], Any]:
        """Start all workers from rank 0's model, and make the engine; training begins.

        A script may set up several models, each with its optimizers, before the first step.

        Args:
            module: on its device.
            optimizers: of its parameters.
            scheduler: returned as it is.

        Raises:
            RuntimeError: if training has begun.
            SyncError: on every process, if the models, or the optimizers, differ.
        """
        if not self.core.training:
            self._run = Run()
        run = self._run
        if run.stepped:
            raise RuntimeError(
                "Set up all models and optimizers before the first step, or after fabric.strategy.finish()."
            )
        self.core.start_equal(module)
        run.modules.append(module)
        run.optimizers += optimizers
        self._start_anew()
        module = self._in_node(module)
        self._note_versions()
        self._start()
        return module, optimizers, scheduler

    def setup_module(self, module: Module) -> Module:  # type: ignore[override]
        """Set up a model that is not trained, such as a teacher.

        Raises:
            NotImplementedError: if it has parameters to train, whose optimizer must be set up with it.
        """
        if any(parameter.requires_grad for parameter in module.parameters()):
            raise NotImplementedError(
                f"{private.joint_setup_required(self)} A model that is not trained can be set up alone after "
                "`model.requires_grad_(False)`."
            )
        return module

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Refuse: the model must be set up with it.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(private.joint_setup_required(self))

    def _in_node(self, module: Module) -> Module:
        """The module in DDP, which averages gradients inside nodes; the module itself if there are none."""
        node = self.core.node_group
        if node is None:
            return module
        devices = None if self.root_device.type == "cpu" else [self.root_device]
        return DistributedDataParallel(module, device_ids=devices, process_group=node, **self.ddp_kwargs)

    # Training ---------------------------------------------------------------------------------------------------------

    def start_epoch(self, epoch: int) -> None:
        """Say which epoch begins, from 0, for a ``sync_every`` that goes by epochs; on all ranks."""
        self.core.start_epoch(epoch)

    def backward(self, tensor: Tensor, module: Module | None, *args: Any, **kwargs: Any) -> None:
        """Compute gradients, and exchange them, for the algorithms that do, before they are clipped."""
        with self.core.everyone.naming("the average of the gradients in a node"):
            super().backward(tensor, module, *args, **kwargs)
        if self.core.training and not self._run.accumulating:
            scaler: Any = getattr(self.precision, "scaler", None)
            loss_scale = scaler.get_scale() if scaler is not None and scaler.is_enabled() else None
            self.core.running.after_backward(loss_scale)

    def optimizer_step(self, optimizer: Any, **kwargs: Any) -> Any:
        """Step, then sync if it is time.

        Raises:
            RuntimeError: if the step would not be synced.
        """
        engine, run = self.core.running, self._run
        index = self._index_of(optimizer)
        engine.before_step(index)
        run.stepped = run.stepping = True
        try:
            output = super().optimizer_step(optimizer, **kwargs)
        finally:
            run.stepping = False
        engine.after_step(index)
        return output

    def _index_of(self, optimizer: Optimizer) -> int:
        """Number of an optimizer that is about to step."""
        engine, run = self.core.running, self._run
        if not self.core.training:
            raise RuntimeError(
                "Training has ended with fabric.strategy.finish(), so nothing would be synced. To go on, step inside "
                "`with fabric.strategy.training():`."
            )
        if engine.in_consensus:
            raise RuntimeError("The model holds the consensus at present: step outside of fabric.strategy.consensus().")
        index = next((i for i, unit in enumerate(engine.units) if unit.optimizer is optimizer), None)
        if index is None:
            raise RuntimeError(
                f"This {type(optimizer).__name__} was not set up, so its parameters would never be synced. Call "
                "fabric.setup(model, optimizer) with all of them."
            )
        if engine.rounds == 0 and any(private.version_of(parameter) != version for parameter, version in run.versions):
            raise RuntimeError(
                "Parameters were changed between fabric.setup and the first step, which would pass for training "
                "progress. Change them before fabric.setup, or load them with fabric.load or fabric.load_raw."
            )
        run.versions = []
        return index

    @contextmanager
    def no_backward_sync(self, module: Module, enabled: bool) -> Iterator[None]:
        """While gradients accumulate, they are not exchanged: ``fabric.no_backward_sync`` calls this."""
        self._run.accumulating = enabled
        try:
            with module.no_sync() if enabled and isinstance(module, DistributedDataParallel) else nullcontext():
                yield
        finally:
            self._run.accumulating = False

    @contextmanager
    def consensus(self) -> Iterator[None]:
        """Let the models hold the consensus in this context, for a validation or an export.

        All ranks must enter and leave it. Afterwards each worker has its own parameters and buffers back, bit for bit.
        Outside training the models are the consensus already, and nothing happens.

        Raises:
            SyncError: if some ranks do not come, or leave while others still communicate.
        """
        with self._consensus(Reason.CONSENSUS):
            yield

    # Begin and end ----------------------------------------------------------------------------------------------------

    @contextmanager
    def training(self) -> Iterator[None]:
        """Train in this context: at its end all workers get the consensus, and an error is told to those who wait.

        A script may call :meth:`finish` instead; then errors are told if nothing catches them.

        Raises:
            RuntimeError: if nothing was set up before.
        """
        if self.core.engine is None:
            raise RuntimeError("Call fabric.setup(model, optimizer) before fabric.strategy.training().")
        self._start()
        try:
            yield
        except BaseException as error:
            self._fail(error)
            raise
        self.finish()

    def finish(self) -> None:
        """End training: all workers get the consensus; all ranks must call this."""
        if self.core.training:
            self.core.running.finish()
            self._end()

    def _start(self) -> None:
        """From now on every collective begins with a meeting, and steps are synced."""
        if self.core.training:
            return
        run = self._run
        run.failed = False
        self.core.training = True
        self.core.everyone.listen(True)
        run.undo.append(lambda: self.core.everyone.listen(False))
        self._watch_default_group()
        advice = "Call step() on the optimizer that fabric.setup returned."
        run.undo.append(refuse_steps(run.optimizers, lambda: run.stepping or not self.core.training, advice))
        run.undo.append(_before_uncaught(self._fail))

    def _end(self) -> None:
        self.core.training = False
        while self._run.undo:
            self._run.undo.pop()()

    def _fail(self, error: BaseException) -> None:
        """Name in an error of torch.distributed who failed, leave word for the others, and communicate no more."""
        if not self.core.training:
            return
        explained = self.core.everyone.explained(error, "a collective")
        if explained is not None:
            error.args = (str(explained),)
        self.core.report_failure(error)
        self._run.failed = True
        self._end()

    def teardown(self) -> None:
        """Restore what was changed in torch. The engine stays, so that its report can still be read."""
        self._end()
        super().teardown()


def _before_uncaught(act: Callable[[BaseException], None]) -> Callable[[], None]:
    """Call a function with an exception that nothing has caught, before Python prints it and ends this process.

    Returns:
        A function that ends it.
    """
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
        act(error)
        previous(kind, error, traceback)

    sys.excepthook = hook

    def end() -> None:
        if sys.excepthook is hook:  # else somebody else has replaced it since
            sys.excepthook = previous

    return end
