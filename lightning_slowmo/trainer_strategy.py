"""How the engine lives in a Lightning Trainer, for ``lightning`` and for ``pytorch_lightning`` alike.

:class:`SlowMoMixin` goes in front of either package's ``DDPStrategy``. From that it takes launchers, process group,
samplers, ranks and devices; the model is not wrapped in DistributedDataParallel. The engine syncs at the end of
``optimizer_step``: before the learning-rate scheduler moves on, and not while gradients accumulate.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_slowmo import checkpoint as checkpoints
from lightning_slowmo.algorithms import Algorithm, SyncReport
from lightning_slowmo.callbacks import AtSyncMixin
from lightning_slowmo.communication import Reason, Workers, require_equal
from lightning_slowmo.communication.collectives import broadcast_tensors
from lightning_slowmo.communication.hierarchy import check_per_node, two_levels
from lightning_slowmo.communication.workers import DEFAULT_TIMEOUT
from lightning_slowmo.engine import Engine, check_on_nonfinite
from lightning_slowmo.presets import LAUNCHERS, PRESETS, preset
from lightning_slowmo.signals import Signals

if TYPE_CHECKING:
    from lightning.pytorch.strategies import DDPStrategy
else:  # the mixin itself belongs to neither package
    DDPStrategy = object

SHARDING_PLUGINS = {"FSDPPrecision", "DeepSpeedPrecision", "XLAPrecision"}
"""Precision plugins of strategies that shard the model or run elsewhere."""


class SlowMoMixin(DDPStrategy):
    """The part of :class:`~lightning_slowmo.SlowMoStrategy` that does not depend on which Lightning it serves.

    Args:
        algorithm: a configuration such as ``SlowMo(sync_every=24)``, or the name of a preset.
        sync_timeout: how long a worker waits for the others at a sync before it gives up and says whom it waited for;
            by default as long as ``timeout``.
        on_nonfinite: what happens when a worker's parameters have become NaN or infinite: ``"raise"`` on all workers
            before anything is averaged, or ``"skip"`` that worker and give it the mean of the others.
        workers_per_node: processes of a machine (or ``"all"``) that make up one worker: DDP averages their gradients
            at every step, and the algorithm runs between such nodes. None: every process is a worker.
        ddp_kwargs: arguments for DistributedDataParallel inside nodes, such as ``{"find_unused_parameters": True}``.
        shard_slow_state: whether each worker keeps only its share of anchor and slow momentum, 2/n of the parameters
            instead of twice as much as they; at a sync it costs the same traffic.
        offload_slow_state: ``"cpu"`` to keep anchor and slow momentum in the CPU's memory.
        log_syncs: whether ``sync/...`` metrics go to the Trainer's loggers at each sync.
        accelerator: set by the Trainer.
        parallel_devices: set by the Trainer.
        cluster_environment: set by the Trainer, or a plugin of the user's.
        checkpoint_io: set by the Trainer, or a plugin of the user's.
        precision_plugin: set by the Trainer, or a plugin of the user's.
        process_group_backend: backend of torch.distributed; by default NCCL on GPUs and gloo on CPUs.
        timeout: limit for the operations of torch.distributed.
        start_method: how processes are started: ``"popen"``, ``"spawn"``, ``"fork"`` or ``"forkserver"``.

    Raises:
        ValueError: if the algorithm's name is unknown; lists the known ones.
    """

    strategy_name = "slowmo"

    def __init__(
        self,
        algorithm: str | Algorithm = "slowmo",
        sync_timeout: timedelta | None = None,
        on_nonfinite: Literal["raise", "skip"] = "raise",
        workers_per_node: int | Literal["all"] | None = None,
        ddp_kwargs: dict[str, Any] | None = None,
        shard_slow_state: bool = False,
        offload_slow_state: Literal["cpu"] | None = None,
        log_syncs: bool = True,
        accelerator: Any = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = DEFAULT_TIMEOUT,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
    ) -> None:
        if not isinstance(algorithm, (str, Algorithm)):
            raise ValueError(
                f"algorithm must be the name of a preset ({', '.join(PRESETS)}) or a configuration such as SlowMo(), "
                f"got {algorithm!r}."
            )
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )
        self.algorithm = preset(algorithm) if isinstance(algorithm, str) else algorithm
        self.sync_timeout = sync_timeout or timeout or DEFAULT_TIMEOUT
        self.on_nonfinite = on_nonfinite
        self.workers_per_node = workers_per_node
        self.ddp_kwargs = ddp_kwargs or {}
        self.shard_slow_state = shard_slow_state
        self.offload_slow_state = offload_slow_state
        self.log_syncs = log_syncs
        check_on_nonfinite(on_nonfinite)
        check_per_node(workers_per_node)
        if self.ddp_kwargs and workers_per_node is None:
            raise ValueError(
                "ddp_kwargs apply inside nodes only, but workers_per_node is None: nothing is wrapped in DDP."
            )
        self._forget()

    def _forget(self) -> None:
        """No engine, no groups: the state before :meth:`setup_environment`, and what travels to spawned processes."""
        self.engine: Engine | None = None
        self.everyone = self.workers = Workers()
        self._reduced = False
        self._steps = self._reducing_steps = 0
        self._warned_of_reductions = False
        self._node: Any = None
        self._world: Any = None
        self._training = False
        self._stepping = False
        self._accumulating = False
        self._signals: Signals | None = None
        self._restored = checkpoints.Restored()
        self._undo: list[Callable[[], None]] = []

    def __getstate__(self) -> dict[str, Any]:
        """Without process groups and buffers, which do not travel."""
        state = super().__getstate__()
        for name in ("engine", "workers", "everyone", "_node", "_world", "_restored", "_signals", "_undo"):
            state.pop(name, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """With new, empty ones."""
        self._forget()
        super().__setstate__(vars(self) | state)

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
    def report(self) -> SyncReport:
        """Totals over all syncs of the present or last fit, on this worker."""
        return self.engine.total if self.engine is not None else SyncReport(count=0)

    # Setup ------------------------------------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        """Refuse what cannot work before anything is started."""
        if self.root_device.type == "mps":
            raise ValueError(
                "MPS devices cannot take part in torch.distributed. Use Trainer(accelerator='cpu', devices=...)."
            )
        plugin = type(self.precision_plugin)
        if SHARDING_PLUGINS & {ancestor.__name__ for ancestor in plugin.__mro__}:
            raise ValueError(
                f"{plugin.__name__} belongs to a strategy that shards the model; {type(self).__name__} keeps a whole "
                "model on each worker. Use Trainer(precision=...) instead."
            )
        super().setup_environment()

    def setup_distributed(self) -> None:
        """Join the process group, then make this strategy's own groups beside it (once per process group)."""
        super().setup_distributed()
        if self._world is dist.group.WORLD:
            return
        self._world = dist.group.WORLD
        self.everyone = self.workers = Workers.from_world(self.sync_timeout, self.root_device)
        if self.workers_per_node is not None:
            self._node, self.workers = two_levels(
                self.everyone,
                self.workers_per_node,
                self.node_rank,
                self.local_rank,
                self.sync_timeout,
                self.root_device,
            )

    def configure_ddp(self) -> None:
        """Start all workers from rank 0's model, as DDP does, but wrap it inside nodes only: steps are local."""
        assert self.model is not None
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        require_equal(
            self.everyone,
            "The model",
            "; ".join(f"{name} {tensor.dtype} {list(tensor.shape)}" for name, tensor in tensors.items()),
            "Build the same model on every rank.",
        )
        with torch.no_grad():
            broadcast_tensors(list(tensors.values()), self.everyone)
        if self._node is not None:
            devices = self.determine_ddp_device_ids()
            self.model = DistributedDataParallel(
                self.model, device_ids=devices, process_group=self._node, **self.ddp_kwargs
            )

    def setup(self, trainer: Any) -> None:
        """Set up model and optimizers as DDP does, then the engine."""
        if trainer.state.fn == "fit" and self._layer_sync is not None:
            self._layer_sync = self._layer_sync_inside_nodes()
        super().setup(trainer)
        if trainer.state.fn != "fit":
            return
        self.engine = Engine(
            self.algorithm,
            self.optimizers,
            self.workers,
            module=self.lightning_module,
            everyone=self.everyone if self._node is not None else None,
            on_nonfinite=self.on_nonfinite,
            shard_slow_state=self.shard_slow_state,
            offload_slow_state=self.offload_slow_state,
        )
        self.engine.on_sync = self._on_sync
        warn_of_hidden_collectives(trainer)
        self._watch_optimizers()
        self._signals = Signals(trainer, self.engine, self.everyone, self.launcher, lambda: self._training)
        self._undo.append(self._signals.give_back)

    def _layer_sync_inside_nodes(self) -> Any:
        """SyncBatchNorm communicates in every forward pass, which only the processes of a node do together."""
        if self._node is None:
            raise ValueError(
                "Trainer(sync_batchnorm=True) would make the workers wait for one another in every forward pass. Leave "
                "it out: statistics are averaged with the consensus. Or share BatchNorm inside nodes with "
                "SlowMoStrategy(workers_per_node='all')."
            )
        return NodeBatchNorm(self._layer_sync, self._node)

    def _watch_optimizers(self) -> None:
        """Raise where an optimizer is stepped behind the strategy's back: it would never be synced."""

        def complain(optimizer: Optimizer, *_: Any) -> None:
            if not self._training or self._stepping:
                return
            trained = {id(p) for own in self.optimizers for group in own.param_groups for p in group["params"]}
            if any(id(p) in trained for group in optimizer.param_groups for p in group["params"]):
                raise RuntimeError(
                    f"{type(optimizer).__name__} was stepped without the strategy, so its parameters would never be "
                    "synced. In manual optimization call step() on what self.optimizers() returns, not with "
                    "use_pl_optimizer=False. An optimizer with steps of its own around one that it holds (SAM's "
                    "first_step and second_step) needs step(closure)."
                )

        self._undo.append(register_optimizer_step_pre_hook(complain).remove)

    # Training ---------------------------------------------------------------------------------------------------------

    @property
    def _trainer(self) -> Any:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    @property
    def _failed(self) -> bool:
        """Whether this worker is on its way out after an exception: nobody may be waited for then."""
        module = self.lightning_module
        return module is not None and module._trainer is not None and module.trainer.state.status == "interrupted"

    def on_train_start(self) -> None:
        """From here on every communication begins with a meeting."""
        super().on_train_start()
        self._training = True

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Begin an epoch together."""
        super().on_train_batch_start(batch, batch_idx)
        if batch_idx == 0:
            self._meet(Reason.EPOCH_START)
        assert self.engine is not None
        if self.engine.must_save:
            with self._flags():
                ready = self.engine.pause()
            if ready:
                assert self._signals is not None
                self._signals.save_wanted()

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """While gradients accumulate, they are not exchanged."""
        self._accumulating = True
        try:
            with super().block_backward_sync():
                yield
        finally:
            self._accumulating = False

    def post_backward(self, closure_loss: Tensor) -> None:
        """Exchange gradients, for the algorithms that do, before they are clipped."""
        super().post_backward(closure_loss)
        if self._training and not self._accumulating:
            assert self.engine is not None
            scaler = getattr(self.precision_plugin, "scaler", None)
            loss_scale = scaler.get_scale() if scaler is not None and scaler.is_enabled() else None
            with self._flags():
                self.engine.after_backward(loss_scale)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Step, then sync if it is time."""
        assert self.engine is not None
        unit = next(i for i, own in enumerate(self.optimizers) if own is optimizer)
        self.engine.before_step(unit)
        self._stepping = True
        try:
            output = super().optimizer_step(optimizer, closure, model, **kwargs)
        finally:
            self._stepping = False
        if self._trainer.fit_loop._skip_backward:  # StochasticWeightAveraging's last epoch collects statistics alone
            return output
        self._steps += 1
        self._reducing_steps += self._reduced
        self._reduced = False
        with self._flags():
            report = self.engine.after_step(unit)
        if report is not None and self.log_syncs:
            metrics = report.metrics() | {"sync/count": self.engine.total.count}
            step = self._trainer.fit_loop.epoch_loop._batches_that_stepped  # the axis of Lightning's own metrics
            for logger in self._trainer.loggers:
                logger.log_metrics(metrics, step=step)
        return output

    def _on_sync(self, agreed: bool) -> None:
        """Tell the callbacks that care, and warn if metrics made the workers meet at most steps since the last sync."""
        if 2 <= self._steps < 2 * self._reducing_steps and not self._warned_of_reductions:
            rank_zero_warn(
                f"{self._reducing_steps} of {self._steps} steps between two syncs reduced a metric over the workers, "
                "which makes them wait for one another. Use self.log(..., on_step=False, on_epoch=True, "
                "sync_dist=True), or sync_dist=False."
            )
            self._warned_of_reductions = True
        self._steps = self._reducing_steps = 0
        for callback in self._trainer.callbacks:
            if agreed and isinstance(callback, AtSyncMixin):
                callback.on_sync(self._trainer, self.lightning_module)

    def on_train_end(self) -> None:
        """All workers end with the consensus."""
        super().on_train_end()
        assert self.engine is not None
        with self._flags():
            self.engine.finish()
        if self.engine.must_save:
            assert self._signals is not None
            self._signals.save_wanted()
        self._training = False

    def _meet(self, reason: Reason) -> None:
        """Meet before a collective of Lightning's own, so that a worker that is still training can come to it."""
        if self._training and not self._failed and self.engine is not None and not self.engine.in_consensus:
            with self._flags():
                self.engine.meet(reason)

    @contextmanager
    def _flags(self) -> Iterator[None]:
        """Take the Trainer's wish to stop to a meeting, and bring back everyone's."""
        assert self.engine is not None
        trainer = self._trainer
        self.engine.stop = bool(trainer.should_stop)
        yield
        if self.engine.stop:
            trainer.should_stop = True
        if self.engine.must_terminate and not self.engine.must_save:  # else after that save
            trainer._signal_connector.received_sigterm = True

    # Lightning's own collectives --------------------------------------------------------------------------------------

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all workers; nobody is waited for after an exception."""
        if self._failed:
            return
        self._meet(Reason.BARRIER)
        super().barrier(*args, **kwargs)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Broadcast an object."""
        self._meet(Reason.BROADCAST)
        return super().broadcast(obj, src)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce a tensor, such as a metric."""
        self._meet(Reason.REDUCE)
        self._reduced = self._training
        return super().reduce(tensor, group, reduce_op)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Gather a tensor."""
        self._meet(Reason.GATHER)
        return super().all_gather(tensor, group, sync_grads)

    # Consensus --------------------------------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """Validate the consensus."""
        super().on_validation_start()
        if self._trainer.state.fn == "fit" and self.engine is not None:
            with self._flags():
                self.engine.enter_consensus(Reason.VALIDATION)

    def on_validation_end(self) -> None:
        """Go on with this worker's own parameters."""
        super().on_validation_end()
        if self.engine is not None:
            self.engine.leave_consensus()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The weights to save: the consensus."""
        if not self._training or self._failed:
            return super().lightning_module_state_dict()
        assert self.engine is not None
        with self._flags(), self.engine.consensus(Reason.SAVE):
            state = super().lightning_module_state_dict()
            # What is written must not change when the worker's own parameters come back, also by a writer in the
            # background.
            return {key: _cloned(value) for key, value in state.items()} if self.is_global_zero else state

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write Lightning's file, and beside it what differs by rank (unless only weights are saved)."""

        def write_main() -> None:
            # Under a temporary name, then renamed: Lightning's own writer moves the file from the temporary folder,
            # which is a copy, and can be cut short, where that is on another disk.
            renamed = "://" not in str(filepath) and type(self.checkpoint_io).__name__ == "TorchCheckpointIO"
            target = f"{filepath}.part" if renamed else filepath
            super(SlowMoMixin, self).save_checkpoint(checkpoint, target, storage_options)
            if renamed and self.is_global_zero:
                os.replace(target, filepath)

        if self.engine is None or self._failed or "optimizer_states" not in checkpoint:
            write_main()
            return
        checkpoints.save(
            checkpoint,
            filepath,
            self.everyone,
            self.algorithm.kind,
            self.engine.shared_state(),
            self.engine.local_state(),
            (type(self.precision_plugin).__qualname__,),
            write_main,
        )

    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read Lightning's file; to go on with training, also this rank's own state."""
        checkpoint = super().load_checkpoint(checkpoint_path, *args, **kwargs)
        if self._trainer.state.fn == "fit" and "optimizer_states" in checkpoint:
            self._restored = checkpoints.load(checkpoint, checkpoint_path, self.everyone, self.algorithm.kind)
            if self._restored.warning:
                rank_zero_warn(self._restored.warning)
            checkpoint.update(self._restored.entries or {})
        return checkpoint

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore optimizers, then the engine, which needs their parameters."""
        super().load_optimizer_state_dict(checkpoint)
        assert self.engine is not None
        if self._restored.shared is not None:
            self.engine.load_shared_state(self._restored.shared)
        if self._restored.local is not None:
            self.engine.load_local_state(self._restored.local)
        self._restored = checkpoints.Restored()

    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove Lightning's file and what lies beside it."""
        if self.is_global_zero:
            checkpoints.remove(filepath)
        super().remove_checkpoint(filepath)

    # End --------------------------------------------------------------------------------------------------------------

    def on_exception(self, exception: BaseException) -> None:
        """Leave word for the workers that will wait for this one, and communicate no more."""
        self._training = False
        for workers in {id(workers): workers for workers in (self.everyone, self.workers)}.values():
            workers.report_failure(f"{type(exception).__name__}: {exception}")
        self.everyone.let_others_hear()
        super().on_exception(exception)

    def teardown(self) -> None:
        """Give Lightning back what was changed in it. The engine stays, so that the state can still be saved."""
        self._training = False
        while self._undo:
            self._undo.pop()()
        super().teardown()


class NodeBatchNorm:
    """Lightning's SyncBatchNorm plugin, restricted to the processes of a node.

    Args:
        plugin: Lightning's own.
        node: process group of the node.
    """

    def __init__(self, plugin: Any, node: dist.ProcessGroup) -> None:
        self.plugin, self.node = plugin, node

    def apply(self, model: torch.nn.Module) -> torch.nn.Module:
        """Convert BatchNorm layers."""
        return torch.nn.SyncBatchNorm.convert_sync_batchnorm(model, process_group=self.node)

    def revert(self, model: torch.nn.Module) -> torch.nn.Module:
        """Convert them back."""
        return self.plugin.revert(model)


def warn_of_hidden_collectives(trainer: Any) -> None:
    """Warn of settings that make the workers wait for one another at every step, and say what to use instead."""
    for callback in trainer.callbacks:
        names = {ancestor.__name__ for ancestor in type(callback).__mro__}
        if "Timer" in names and getattr(callback, "_interval", None) == "step":
            rank_zero_warn(
                "max_time (or the Timer callback) broadcasts the clock after every batch, so local steps wait for rank "
                "0. Use max_steps or max_epochs, or Timer(interval='epoch')."
            )
        if "ModelCheckpoint" in names and getattr(callback, "_train_time_interval", None) is not None:
            rank_zero_warn(
                "ModelCheckpoint(train_time_interval=...) broadcasts the clock after every batch, so local steps wait "
                "for rank 0. Use every_n_train_steps, a multiple of sync_every."
            )
        if "WeightAveraging" in names and not isinstance(callback, AtSyncMixin):
            rank_zero_warn(
                f"{type(callback).__name__} averages each worker's local weights, which differ between syncs. Use "
                "lightning_slowmo.callbacks.EMAAtSync."
            )


def _cloned(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
