"""What every strategy needs, whether a Trainer, Fabric or a plain script drives it: groups, engine, consensus, saves.

A strategy owns one :class:`StrategyCore` and calls it in this order::

    core = StrategyCore(SlowMo(sync_every=12))                 # checks the options; starts nothing
    core.make_groups(node_rank, local_rank, device)            # once torch.distributed is initialized
    core.start_equal(model)                                    # before the optimizers are made, or right after
    core.make_engine(optimizers, model)
    core.training = True
    ...                                                        # core.engine.after_step(), core.meet(), core.consensus()
    core.save(checkpoint, path, write_main)
    core.engine.finish()                                       # every worker gets the consensus
    core.training = False

Nothing here assumes DistributedDataParallel, Lightning, or that ``model`` is a LightningModule.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from lightning_slowmo import checkpoint as checkpoints
from lightning_slowmo.algorithms import Algorithm, SyncReport
from lightning_slowmo.algorithms.clock import start_epoch
from lightning_slowmo.bucket_sizes import check_bucket_cap
from lightning_slowmo.checkpoint import Restored
from lightning_slowmo.communication import Header, Reason, Workers, meet
from lightning_slowmo.communication.hierarchy import PerNode, check_per_node, two_levels
from lightning_slowmo.communication.timeouts import DEFAULT_TIMEOUT, as_timeout
from lightning_slowmo.consistency import check_on_nonfinite, start_equal
from lightning_slowmo.engine import Engine
from lightning_slowmo.presets import PRESETS, preset
from lightning_slowmo.replace import carry_over


class StrategyCore:
    """Options, process groups, engine and checkpoints of a strategy.

    Args:
        algorithm: a configuration such as ``SlowMo(sync_every=24)``, or the name of a preset.
        sync_timeout: how long a worker waits for the others at a sync, in seconds or as a timedelta.
        on_nonfinite: ``"raise"`` or ``"skip"``, see :class:`~lightning_slowmo.engine.Engine`.
        workers_per_node: processes of a machine (or ``"all"``) that make up one worker; None: every process is one.
        shard_slow_state: whether each worker keeps only its share of anchor and slow momentum.
        offload_slow_state: ``"cpu"`` to keep anchor and slow momentum in the CPU's memory.
        bucket_cap_mb: size of messages in MiB; None: by device, number of workers and size of the model.

    Attributes:
        everyone: all processes; alone until :meth:`make_groups`.
        workers: the processes between which the algorithm runs, this one among them; with ``workers_per_node``, the
            processes at the same place of every node.
        node: the processes that share every gradient with this one, or None without ``workers_per_node``.
        engine: None until :meth:`make_engine`.
        returned: the report that came back from workers which this process started.
        training: whether the workers train at present, so that every collective must begin with a meeting. The strategy
            sets it when training starts and ends.

    Raises:
        ValueError: if an option is invalid; an unknown algorithm's message lists the known ones.
    """

    def __init__(
        self,
        algorithm: Algorithm | str = "slowmo",
        sync_timeout: timedelta | float = DEFAULT_TIMEOUT,
        on_nonfinite: Literal["raise", "skip"] = "raise",
        workers_per_node: PerNode | None = None,
        shard_slow_state: bool = False,
        offload_slow_state: Literal["cpu"] | None = None,
        bucket_cap_mb: float | None = None,
    ) -> None:
        if isinstance(algorithm, type) and issubclass(algorithm, Algorithm):
            raise ValueError(f"algorithm must be a configuration, not a class: write {algorithm.__name__}().")
        if not isinstance(algorithm, (str, Algorithm)):
            raise ValueError(
                f"algorithm must be the name of a preset ({', '.join(PRESETS)}) or a configuration such as SlowMo(), "
                f"got {algorithm!r}."
            )
        self.algorithm = preset(algorithm) if isinstance(algorithm, str) else algorithm
        self.sync_timeout = as_timeout("sync_timeout", sync_timeout)
        self.on_nonfinite = on_nonfinite
        self.workers_per_node = workers_per_node
        self.shard_slow_state = shard_slow_state
        self.offload_slow_state = offload_slow_state
        self.bucket_cap_mb = bucket_cap_mb
        check_bucket_cap(bucket_cap_mb)
        check_on_nonfinite(on_nonfinite)
        check_per_node(workers_per_node)
        self._disconnect()

    def _disconnect(self) -> None:
        """Reset to the state before :meth:`make_groups`, which can be pickled."""
        self.everyone = self.workers = Workers()
        self.node: Workers | None = None
        self.engine: Engine | None = None
        self.returned: SyncReport | None = None
        self.training = False
        self._world: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """The options alone: process groups and buffers cannot be pickled."""
        return {key: value for key, value in vars(self).items() if key not in _CONNECTED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the options, unconnected."""
        vars(self).update(state)
        self._disconnect()

    # Set-up -----------------------------------------------------------------------------------------------------------

    def make_groups(self, node_rank: int, local_rank: int, device: torch.device, backend: str | None = None) -> None:
        """Make this strategy's process groups; every process must call this, after ``init_process_group``.

        Called again with the same default process group, it keeps the groups that there are.

        Args:
            node_rank: number of this process's machine.
            local_rank: number of this process on its machine.
            device: where the parameters are.
            backend: what they travel by, see :meth:`Workers.from_world`.

        Raises:
            ValueError: if ``workers_per_node`` does not divide the processes of a machine.
        """
        if self._world is dist.group.WORLD:
            return
        self._world = dist.group.WORLD
        self.everyone = self.workers = Workers.from_world(self.sync_timeout, device, backend, self.bucket_cap_mb)
        if self.workers_per_node is not None:
            self.node, self.workers = two_levels(self.everyone, self.workers_per_node, node_rank, local_rank)

    def join(self, workers: Workers) -> None:
        """Be one of these workers, whatever carries their messages, in place of :meth:`make_groups`."""
        self.everyone = self.workers = workers

    @property
    def node_group(self) -> dist.ProcessGroup | None:
        """Process group of the processes that share every gradient with this one; None without ``workers_per_node``."""
        return self.node.group if self.node is not None else None

    def start_equal(self, model: Module, only: Sequence[Tensor] | None = None) -> None:
        """Overwrite the parameters and buffers of all processes with those of rank 0; every process must call this.

        Args:
            model: whose names, dtypes and shapes must be equal on all processes.
            only: the tensors to overwrite, if not all of the model's.

        Raises:
            SyncError: on every process, if names, dtypes or shapes differ.
            ValueError: if a tensor cannot be sent; names it.
        """
        start_equal(model, self.everyone, only, self.workers)

    def make_engine(self, optimizers: Sequence[Optimizer], module: Module) -> Engine:
        """Make the engine, with new slow state; every process must call this.

        Args:
            optimizers: whose parameters are synced.
            module: the model, for buffers and parameters that no optimizer trains.

        Raises:
            ValueError, SyncError: see :class:`~lightning_slowmo.engine.Engine`.
        """
        self.engine = Engine(
            self.algorithm,
            optimizers,
            self.workers,
            module=module,
            everyone=None if self.node is None else self.everyone,
            on_nonfinite=self.on_nonfinite,
            shard_slow_state=self.shard_slow_state,
            offload_slow_state=self.offload_slow_state,
        )
        return self.engine

    def replace_optimizers(self, optimizers: Sequence[Optimizer], model: Module) -> Engine:
        """Go on with other optimizers in the middle of training; every process must call this.

        Parameters that no optimizer has held until now start from rank 0's values, without momentum; all others start
        from the consensus, with the slow state that they have. A new period begins.

        Args:
            optimizers: to go on with; parameters may be new, gone, or held by another optimizer than before.
            model: the model with its present parameters.

        Raises:
            SyncError: if not all processes do this, or their models or optimizers differ.
            ValueError: if the slow state does not fit the new optimizers.
        """
        if self.shard_slow_state:
            raise ValueError(
                "The optimizers were replaced during training, which does not go with shard_slow_state=True. Leave it "
                "out, or call trainer.fit once for each set of optimizers."
            )
        old = self.running
        held = {id(parameter) for unit in old.units for parameter in unit.layout.parameters}
        present = [
            parameter for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]
        ]
        old.leave_consensus()
        old.meet(Reason.TRAIN_END)
        self.start_equal(model, [parameter for parameter in present if id(parameter) not in held])
        old.finish()
        new = self.make_engine(optimizers, model)
        carry_over(old, new)
        return new

    @property
    def running(self) -> Engine:
        """The engine.

        Raises:
            RuntimeError: if there is none yet.
        """
        if self.engine is None:
            raise RuntimeError("There is no engine before the model and its optimizers are set up.")
        return self.engine

    @property
    def exchanges_gradients(self) -> bool:
        """Whether every optimizer's gradients are averaged at every step, so that the workers never differ."""
        return self.engine is not None and self.engine.exchanges_gradients

    @property
    def may_skip_steps(self) -> bool:
        """Whether a worker may compute no gradients in a step: whether no others wait for them."""
        exchange = any(unit.innermost.exchanges_gradients for unit in self.running.units)
        return self.node is None and not exchange

    def start_epoch(self, epoch: int) -> None:
        """Tell schedules that go by epochs which one begins, from 0."""
        start_epoch(self.running.units, epoch)

    @property
    def report(self) -> SyncReport | None:
        """Totals over all syncs so far, on this worker or those that it started; None without an engine."""
        return self.engine.total if self.engine is not None else self.returned

    # Training ---------------------------------------------------------------------------------------------------------

    def meet(self, reason: Reason) -> None:
        """Meet before a collective that is not the engine's own, so that workers with more batches finish them first.

        Nothing happens outside training. While the model holds the consensus, all workers must be at the same place, so
        the meeting only checks that they are: otherwise one that came alone would wait until the timeout.

        Args:
            reason: which collective follows.

        Raises:
            SyncError: on every worker, if they came for different reasons.
        """
        if not self.training:
            return
        if self.running.in_consensus:
            engine = self.running
            header = Header(reason, rounds=engine.rounds, pending=(0,) * len(engine.units))
            meet(header, self.everyone, together=True)
        else:
            self.running.meet(reason)

    def enter_consensus(self, reason: Reason) -> None:
        """Put this worker's parameters and buffers aside and load the consensus; all workers must call this.

        Args:
            reason: what it is needed for.
        """
        self.running.enter_consensus(reason)

    def leave_consensus(self, reason: Reason) -> None:
        """Give this worker its own parameters and buffers back, bit for bit; all workers must call this.

        Args:
            reason: as for :meth:`enter_consensus`.

        Raises:
            SyncError: on every worker, if one of them is still busy with something else inside the consensus.
        """
        if self.running.in_consensus:
            self.meet(reason)
            self.running.leave_consensus()

    @contextmanager
    def consensus(self, reason: Reason = Reason.CONSENSUS) -> Iterator[None]:
        """Let the model hold the consensus in this context; outside training it does already.

        All workers must enter it; afterwards each has its own parameters and buffers back, bit for bit.
        """
        if not self.training or self.running.in_consensus:
            self.meet(reason)
            yield
            return
        self.enter_consensus(reason)
        try:
            yield
        except BaseException:
            self.running.leave_consensus()  # the others may never come
            raise
        self.leave_consensus(reason)

    def report_failure(self, exception: BaseException) -> None:
        """Leave a message for the workers that will wait for this one, and communicate no more."""
        self.training = False
        for workers in {id(workers): workers for workers in (self.everyone, self.workers)}.values():
            workers.report_failure(f"{type(exception).__name__}: {exception}")
        self.everyone.let_others_hear()

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def save(
        self,
        checkpoint: dict[str, Any],
        path: str | os.PathLike,
        write_main: Callable[[], None],
        per_rank: Sequence[str] = (),
    ) -> None:
        """Write a checkpoint with which training can go on exactly; every process must call this.

        Args:
            checkpoint: content of the main file, with the consensus weights; a note of the per-rank files is added.
            path: of the main file; the per-rank files lie beside it.
            write_main: writes ``checkpoint`` to ``path``, on the rank that does.
            per_rank: entries of ``checkpoint`` of which every rank keeps its own, such as a gradient scaler's; the
                Trainer's optimizers, schedulers and loops are among them always.
        """
        checkpoints.save(
            checkpoint,
            path,
            self.everyone,
            self.algorithm.kind,
            self.running.shared_state(whole=False),
            self.running.local_state(),
            tuple(per_rank),
            write_main,
        )

    def load(
        self, checkpoint: Mapping[str, Any], path: str | os.PathLike, weights: Sequence[str] = ("state_dict",)
    ) -> Restored:
        """Read what :meth:`save` wrote beside a main file; every process must call this.

        The engine need not exist yet: what is returned goes to :meth:`restore` when it does.

        Args:
            checkpoint: the main file's content.
            path: of the main file.
            weights: the entries of ``checkpoint`` that hold the consensus weights.
        """
        return checkpoints.load(checkpoint, path, self.everyone, self.algorithm.kind, weights)

    def restore(self, restored: Restored) -> None:
        """Give the engine the state that :meth:`load` read, as far as it could be read.

        Call it when the optimizers have their state: some algorithms keep buffers of their own there.
        """
        if restored.shared is not None:
            self.running.load_shared_state(restored.shared)
        if restored.local is not None:
            self.running.load_local_state(restored.local)


_CONNECTED = ("everyone", "workers", "node", "engine", "returned", "training", "_world")
"""Attributes of a core that exist in one process only, while it is connected to others."""
