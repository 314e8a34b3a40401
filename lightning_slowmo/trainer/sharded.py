"""Workers of several processes under the Trainer: FSDP2 and tensor parallelism inside, the algorithm between them.

Two layers around :class:`~lightning_slowmo.trainer.mixin.SlowMoMixin`: beneath it, what it expects of a ``DDPStrategy``
made of Lightning's ``ModelParallelStrategy``; above it, what is different if a process is a part of a worker.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from lightning_slowmo import private
from lightning_slowmo.algorithms import Algorithm
from lightning_slowmo.communication.timeouts import DEFAULT_TIMEOUT
from lightning_slowmo.presets import PRESETS
from lightning_slowmo.private.model_parallel import join_model_parallel, set_device_mesh
from lightning_slowmo.qsdp import QSDP, QuantizedSharding
from lightning_slowmo.sharded_core import ShardedCore
from lightning_slowmo.trainer.clipping import clip_over_meshes
from lightning_slowmo.trainer.mixin import SlowMoMixin
from lightning_slowmo.trainer.sharded_checkpoints import ShardedCheckpointsMixin

if TYPE_CHECKING:
    from lightning.pytorch.strategies import ModelParallelStrategy
else:  # as for DDPStrategy in base.py
    ModelParallelStrategy = object

SHARDED_PRESETS = {"slowmo_fsdp": "slowmo", "local_sgd_fsdp": "local_sgd", "diloco_fsdp": "diloco"}
"""Names that are registered for sharded workers, and the presets that they stand for."""


class ModelParallelBase(ModelParallelStrategy):
    """Lightning's ``ModelParallelStrategy`` as :class:`SlowMoMixin` needs it: it takes DDP's arguments and steps.

    Args:
        process_group_backend: backend of torch.distributed.
        timeout: limit for its operations.
        ddp: what only a ``DDPStrategy`` takes; the Trainer sets it afterwards.
    """

    core: Any

    def __init__(self, process_group_backend: str | None = None, timeout: timedelta | None = None, **ddp: Any) -> None:
        super().__init__(process_group_backend=process_group_backend, timeout=timeout)

    def setup_environment(self) -> None:
        """Join the process group, and make the worker's mesh known; of the sizes the core takes care."""
        self.setup_distributed()
        set_device_mesh(self, self.core.mesh)

    def setup_distributed(self) -> None:
        """Join the process group."""
        join_model_parallel(self)

    def setup(self, trainer: Any) -> None:
        """Set up model and optimizers; all workers start from the first one's model."""
        super().setup(trainer)
        if trainer.state.fn == "fit":
            assert self.model is not None
            self.core.start_equal(self.model)


class ShardedMixin(ShardedCheckpointsMixin, SlowMoMixin):
    """FSDP2 and tensor parallelism inside workers, an algorithm such as slow momentum between them.

    The LightningModule is what Lightning's ``ModelParallelStrategy`` asks for: ``configure_model`` shards it over
    ``self.device_mesh``, which has the processes of this worker alone.

    Args:
        algorithm: an elementwise configuration such as ``SlowMo(sync_every=24)``, or the name of such a preset.
        workers: number of workers, each of which is ``data_parallel_size * tensor_parallel_size`` consecutive ranks;
            None: one for each machine.
        data_parallel_size: shards of a worker's FSDP modules; ``"auto"``: what the other sizes leave.
        tensor_parallel_size: processes that share each tensor-parallel layer.
        save_distributed_checkpoint: whether checkpoints are folders in which every process of the first worker writes
            its shards (DCP), or single files with whole tensors.
        sync_timeout: how long a worker waits for the others at a sync; by default as long as ``timeout``.
        on_nonfinite: what happens when a worker's parameters have become NaN or infinite, in whichever of its shards:
            ``"raise"`` on all workers, or ``"skip"`` that worker and give it the mean of the others.
        offload_slow_state: ``"cpu"`` to keep anchor and slow momentum in the CPU's memory.
        log_syncs: whether ``sync/...`` metrics go to the Trainer's loggers at each sync. The drift is of one shard.
        bucket_cap_mb: size of messages between workers in MiB, as DDP's option of that name, equal on all processes.
            None: 8, or more for many workers and large shards.
        qsdp: rounds the weights and gradients that ``fully_shard`` modules send inside a worker, such as
            ``QSDP(weight_bits=8, gradient_bits=8)``; None: they travel as they are.
        process_group_backend: backend of torch.distributed; by default NCCL on GPUs and gloo on CPUs.
        timeout: limit for the operations of torch.distributed.

    Raises:
        ValueError: if the algorithm's name is unknown, it is not elementwise, or a size or another option is invalid.

    Example::

        class Module(L.LightningModule):
            def configure_model(self):
                for block in self.blocks:
                    fully_shard(block, mesh=self.device_mesh["data_parallel"])
                fully_shard(self, mesh=self.device_mesh["data_parallel"])

        Trainer(devices=8, strategy=SlowMoModelParallelStrategy(SlowMo(sync_every=24), workers=2))
    """

    core: ShardedCore
    strategy_name = "slowmo_fsdp"

    def __init__(
        self,
        algorithm: Algorithm | str = "slowmo",
        workers: int | None = None,
        data_parallel_size: int | Literal["auto"] = "auto",
        tensor_parallel_size: int = 1,
        save_distributed_checkpoint: bool = True,
        sync_timeout: timedelta | float | None = None,
        on_nonfinite: Literal["raise", "skip"] = "raise",
        offload_slow_state: Literal["cpu"] | None = None,
        log_syncs: bool = True,
        bucket_cap_mb: float | None = None,
        qsdp: QSDP | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | float | None = DEFAULT_TIMEOUT,
    ) -> None:
        super().__init__(
            algorithm,
            sync_timeout,
            log_syncs=log_syncs,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.core = ShardedCore(
            algorithm,
            workers,
            data_parallel_size,
            tensor_parallel_size,
            self.core.sync_timeout,
            on_nonfinite,
            offload_slow_state,
            bucket_cap_mb,
            qsdp,
        )
        self.save_distributed_checkpoint = save_distributed_checkpoint

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Register the presets for sharded workers."""
        for name, algorithm in SHARDED_PRESETS.items():
            if name not in strategy_registry:
                description = f"{PRESETS[algorithm]!r} between workers of FSDP2 shards"
                strategy_registry.register(name, cls, description=description, algorithm=algorithm)

    @property
    def quantized(self) -> QuantizedSharding | None:
        """The model with quantized messages, which counts them in ``quantized.traffic``; None without ``qsdp``."""
        return self.core.quantized

    # Set-up -----------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Any) -> None:
        """Set up model, quantized messages, optimizers and engine."""
        if private.sync_batch_norm(self) is not None:
            raise ValueError(
                "Trainer(sync_batchnorm=True) does not reach modules that configure_model has sharded. Call "
                "torch.nn.SyncBatchNorm.convert_sync_batchnorm there, before fully_shard, with "
                "process_group=self.device_mesh['data_parallel'].get_group()."
            )
        assert self.model is not None
        self.core.quantize(self.model)
        super().setup(trainer)
        if trainer.state.fn == "fit":
            self._fit.undo.append(clip_over_meshes(self.precision_plugin))

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Every data-parallel process of every worker has data of its own; a tensor-parallel group shares its data."""
        assert self.core.sizes is not None
        workers, data_parallel, tensor_parallel = self.core.sizes
        return {"num_replicas": workers * data_parallel, "rank": self.global_rank // tensor_parallel}

    # Batches ----------------------------------------------------------------------------------------------------------

    def _run_epoch(self, run: Callable[[Any], None], batches: Any) -> None:
        """See first that the processes of this worker have equally many batches: they need one another in each."""
        self.core.require_alike({"training batches": self._trainer.fit_loop.max_batches})
        super()._run_epoch(run, batches)

    def _run_validation(self, run: Callable[[], Any]) -> Any:
        """See first that the processes of this worker have equally many batches."""

        def alike() -> Any:
            loop = self._trainer.fit_loop.epoch_loop.val_loop
            loop.setup_data()
            self.core.require_alike({"validation batches": sum(loop.max_batches)})
            return run()

        return super()._run_validation(alike)
