"""The core of a strategy whose workers are several processes, each with shards of the model: FSDP2, tensor parallelism.

The processes of a worker are consecutive ranks: ranks 0 to ``data_parallel_size * tensor_parallel_size - 1`` are the
first one. The algorithm runs between processes at equal places of the workers, each on its own shards, so slow state is
sharded as the parameters are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn import Module

from lightning_slowmo import checkpoint as checkpoints
from lightning_slowmo.algorithms import Algorithm
from lightning_slowmo.algorithms.base import require_elementwise
from lightning_slowmo.checkpoint import Restored
from lightning_slowmo.communication import Reason
from lightning_slowmo.communication.hierarchy import consecutive
from lightning_slowmo.communication.timeouts import DEFAULT_TIMEOUT
from lightning_slowmo.communication.workers import SyncError, Workers
from lightning_slowmo.core import StrategyCore
from lightning_slowmo.pieces import Pieces, map_leaves
from lightning_slowmo.qsdp import QSDP, QuantizedSharding

DIMENSIONS = ("worker", "data_parallel", "tensor_parallel")
"""Names of the dimensions in which all processes are arranged; the last two are the users'."""


class ShardedCore(StrategyCore):
    """Groups, engine and checkpoints where the processes of a worker hold shards of a model.

    Args:
        algorithm: an elementwise configuration such as ``SlowMo(sync_every=24)``, or the name of such a preset.
        workers: number of workers; None: one for each machine.
        data_parallel_size: shards of a worker's FSDP modules; ``"auto"``: what the other sizes leave.
        tensor_parallel_size: processes that share each tensor-parallel layer.
        sync_timeout: how long a worker waits for the others at a sync.
        on_nonfinite: ``"raise"`` or ``"skip"``, see :class:`~lightning_slowmo.engine.Engine`.
        offload_slow_state: ``"cpu"`` to keep anchor and slow momentum in the CPU's memory.
        bucket_cap_mb: size of messages between workers in MiB; None: by device, number of workers and size of the
            shards.
        qsdp: how the messages of ``fully_shard`` modules inside a worker are quantized; None: they are not.

    Attributes:
        mesh: the processes of this worker, with the dimensions ``data_parallel`` and ``tensor_parallel``; what users
            give to ``fully_shard`` and ``parallelize_module``. None until :meth:`make_groups`.
        sizes: workers, data-parallel size and tensor-parallel size; None until :meth:`make_groups`.
        quantized: the model with quantized messages; None until :meth:`quantize`, and without ``qsdp``.

    Raises:
        ValueError: if an option is invalid, or the algorithm takes norms or the like over whole tensors.
    """

    def __init__(
        self,
        algorithm: Algorithm | str = "slowmo",
        workers: int | None = None,
        data_parallel_size: int | Literal["auto"] = "auto",
        tensor_parallel_size: int = 1,
        sync_timeout: timedelta | float = DEFAULT_TIMEOUT,
        on_nonfinite: Literal["raise", "skip"] = "raise",
        offload_slow_state: Literal["cpu"] | None = None,
        bucket_cap_mb: float | None = None,
        qsdp: QSDP | None = None,
    ) -> None:
        super().__init__(
            algorithm, sync_timeout, on_nonfinite, offload_slow_state=offload_slow_state, bucket_cap_mb=bucket_cap_mb
        )
        require_elementwise(self.algorithm)
        _check_size("workers", workers, None)
        _check_size("data_parallel_size", data_parallel_size, "auto")
        _check_size("tensor_parallel_size", tensor_parallel_size)
        self.asked = workers, data_parallel_size, tensor_parallel_size
        if not (qsdp is None or isinstance(qsdp, QSDP)):
            raise ValueError(f"qsdp must be QSDP(weight_bits=8, gradient_bits=8) or the like, or None, got {qsdp!r}.")
        self.qsdp = qsdp
        if data_parallel_size == 1:
            self._require_messages()

    def _disconnect(self) -> None:
        super()._disconnect()
        self.mesh: DeviceMesh | None = None
        self.sizes: tuple[int, int, int] | None = None
        self.quantized: QuantizedSharding | None = None
        self._drawn: dict[str, list[int]] = {}

    def _require_messages(self) -> None:
        """Refuse to quantize messages where every data-parallel group is one process."""
        if self.qsdp is not None:
            raise ValueError(
                f"{self.qsdp} rounds what fully_shard sends between the data-parallel processes of a worker, but "
                "data_parallel_size is 1, so it sends nothing (tensor-parallel layers are not rounded). Take a larger "
                "data_parallel_size, or leave out qsdp."
            )

    def make_groups(self, node_rank: int, local_rank: int, device: torch.device, backend: str | None = None) -> None:
        """Make this strategy's process groups and the mesh; every process must call this.

        Args:
            node_rank: number of this process's machine.
            local_rank: number of this process on its machine.
            device: where the parameters are.
            backend: what they travel by between workers, see :meth:`Workers.from_world`.

        Raises:
            ValueError: if the sizes do not make up the number of processes, or leave nothing to quantize to ``qsdp``.
        """
        if self._world is dist.group.WORLD:
            return
        self._world = dist.group.WORLD
        self.everyone = Workers.from_world(self.sync_timeout, device, backend, self.bucket_cap_mb)
        machines = len({machine for (machine,) in self.everyone.gather([node_rank], "counting the machines")})
        self.sizes = sizes = arrange(*self.asked, processes=self.everyone.size, machines=machines)
        if sizes[1] == 1:
            self._require_messages()
        self.node, self.workers = consecutive(self.everyone, sizes[1] * sizes[2])
        # A dimension of all processes would get the default group, on which other collectives begin with meetings.
        own: dict[int | str, Any] = {
            name: dist.get_backend() for name, size in zip(DIMENSIONS, sizes, strict=True) if size == self.everyone.size
        }
        whole = init_device_mesh(device.type, sizes, mesh_dim_names=DIMENSIONS, backend_override=own or None)
        self.mesh = whole[DIMENSIONS[1:]]
        for name in DIMENSIONS[1:]:
            self.everyone.close_also(self.mesh[name].get_group())

    def quantize(self, model: Module) -> None:
        """Let the ``fully_shard`` modules of a model send what ``qsdp`` says; every process must call this.

        Args:
            model: already sharded.

        Raises:
            ValueError: if there is no such module, or one that cannot be quantized.
        """
        if self.qsdp is not None:
            # Workers round with random numbers of their own: noise that they shared would not average out.
            own = replace(self.qsdp, seed=self.qsdp.seed + (self.workers.rank << 32))
            self.quantized = own.apply(model)

    def enter_consensus(self, reason: Reason) -> None:
        """Load the consensus; quantized messages note how far their random numbers are."""
        if self.quantized is not None:
            self._drawn = self.quantized.state_dict()
        super().enter_consensus(reason)

    def leave_consensus(self, reason: Reason) -> None:
        """Give this worker its own parameters back; its messages then draw what they would have drawn without it."""
        inside = self.running.in_consensus
        super().leave_consensus(reason)
        if inside and self.quantized is not None:
            self.quantized.load_state_dict(self._drawn)

    @property
    def node_group(self) -> None:
        """None: gradients inside a worker are FSDP2's business, not DistributedDataParallel's."""
        return None

    def save(
        self,
        checkpoint: dict[str, Any],
        path: str | os.PathLike,
        write_main: Callable[[], None],
        per_rank: Sequence[str] = (),
        own: Mapping[str, Any] | None = None,
    ) -> None:
        """Write what is not in the main file or folder; every process must call this.

        Args:
            checkpoint: see :meth:`StrategyCore.save`.
            path: likewise.
            write_main: likewise.
            per_rank: likewise.
            own: further entries of which every process keeps its own, such as its part of the optimizers' state.
        """
        assert self.sizes is not None
        shared = self.running.shared_state(whole=False)
        if self.workers.rank:  # the first worker's processes have all of it
            shared = map_leaves(lambda leaf: replace(leaf, pieces=()) if isinstance(leaf, Pieces) else leaf, shared)
        kind, state = self.algorithm.kind, self.running.local_state()
        if self.quantized is not None:
            drawn = self._drawn if self.running.in_consensus else self.quantized.state_dict()
            own = {**(own or {}), "qsdp": drawn}
        checkpoints.save(
            checkpoint, path, self.everyone, kind, shared, state, tuple(per_rank), write_main, self.sizes[1:], own
        )

    def load(
        self, checkpoint: Mapping[str, Any], path: str | os.PathLike, weights: Sequence[str] = ("state_dict",)
    ) -> Restored:
        """Read what :meth:`save` wrote; every process must call this."""
        assert self.sizes is not None
        return checkpoints.load(checkpoint, path, self.everyone, self.algorithm.kind, weights, self.sizes[1:])

    def restore(self, restored: Restored) -> None:
        """Give the engine the state that :meth:`load` read, and the quantized messages their random numbers."""
        super().restore(restored)
        drawn = (restored.entries or {}).get("qsdp")
        if self.quantized is not None and drawn is not None:
            self.quantized.load_state_dict(drawn)

    def require_alike(self, numbers: Mapping[str, float]) -> None:
        """Make sure that numbers are equal on all processes of this worker, which call this together.

        Args:
            numbers: by what they count, such as ``"training batches"``.

        Raises:
            SyncError: on all of them; says what each has.
        """
        assert self.node is not None
        rows = self.node.gather(list(numbers.values()), "comparing batches inside a worker")
        for what, column in zip(numbers, zip(*rows, strict=True), strict=True):
            if len(set(column)) > 1:
                each = ", ".join(f"{name} has {number:g}" for name, number in zip(self.node.names, column, strict=True))
                raise SyncError(
                    f"The processes of one worker have different numbers of {what}: {each}. They hold shards of one "
                    "model and need one another in every batch. Give them equally many, for instance with "
                    "DistributedSampler(drop_last=True)."
                )


def arrange(
    workers: int | None,
    data_parallel_size: int | Literal["auto"],
    tensor_parallel_size: int,
    *,
    processes: int,
    machines: int = 1,
) -> tuple[int, int, int]:
    """How processes are arranged: workers, data-parallel size and tensor-parallel size.

    Args:
        workers: None: one for each machine.
        data_parallel_size: ``"auto"``: what the others leave.
        tensor_parallel_size: of each worker.
        processes: of all workers.
        machines: on which they run.

    Raises:
        ValueError: if the sizes do not make up the number of processes.
    """
    count = machines if workers is None else workers
    inside = count * tensor_parallel_size
    sharded = processes // inside if data_parallel_size == "auto" else data_parallel_size
    if not sharded or inside * sharded != processes:
        raise ValueError(
            f"workers={count} times data_parallel_size={data_parallel_size} times tensor_parallel_size="
            f"{tensor_parallel_size} must be the number of processes, {processes}."
        )
    return count, sharded, tensor_parallel_size


def _check_size(name: str, value: object, *others: object) -> None:
    if value in others or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return
    allowed = " or ".join(["an integer of at least 1", *map(repr, others)])
    raise ValueError(f"{name} must be {allowed}, got {value!r}.")
