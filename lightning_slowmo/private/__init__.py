"""Private members of PyTorch and of Lightning, each behind a function with a plain name.

Nothing outside of this folder touches a private member of a foreign object (``tests/test_architecture.py`` checks it):
an upgrade that breaks one is repaired here. Every function says which version it was tested with and which public
interface would replace it. Nothing is imported from Lightning, and ``torch.distributed`` only where it is needed, so
every part of the package may use these functions.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import Store
    from torch.nn import Module
    from torch.optim.swa_utils import AveragedModel

# PyTorch --------------------------------------------------------------------------------------------------------------


def foreach_copy_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source to its target, with one kernel launch for many tensors on GPUs.

    Tested with torch 2.15 (``torch._foreach_copy_``). Public replacement: none; ``Tensor.copy_`` in a loop is slower.

    Args:
        targets: tensors that are overwritten.
        sources: as many tensors, of the same shapes; dtypes may differ.
    """
    torch._foreach_copy_(list(targets), list(sources))


def foreach_norm(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The Euclidean norm of each tensor, with one kernel launch for many tensors on GPUs.

    Tested with torch 2.15 (``torch._foreach_norm``). Public replacement: ``torch.nn.utils.get_total_norm`` (torch 2.6),
    where one norm of all tensors will do.
    """
    return list(torch._foreach_norm(list(tensors)))


def version_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place.

    Tested with torch 2.15 (``Tensor._version``). Public replacement: none; ``torch.autograd.graph`` uses the same
    counter for its own checks.
    """
    return tensor._version


def is_persistent(module: Module, name: str) -> bool:
    """Whether a buffer of a module is part of its ``state_dict``.

    Tested with torch 2.15 (``Module._non_persistent_buffers_set``). Public replacement: the keys of ``state_dict()``,
    at the price of its hooks.
    """
    return name not in module._non_persistent_buffers_set


def held(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: its own part of a ``DTensor``, and any other tensor itself.

    Tested with torch 2.15 (``DTensor._local_tensor``). Public replacement: ``DTensor.to_local()``, which makes a view
    for autograd each time: 4 µs instead of 0.05, at every look at every parameter.
    """
    return getattr(tensor, "_local_tensor", tensor)


def place_of_shard(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where what this process holds of a ``DTensor`` lies in the whole.

    Tested with torch 2.15 (``DTensor.__create_chunk_list__``, of which distributed checkpoints are made). Public
    replacement: none.

    Returns:
        Offset and extent in each dimension.
    """
    [chunk] = tensor.__create_chunk_list__()  # type: ignore[attr-defined]
    return tuple(chunk.offsets), tuple(chunk.sizes)


def default_store() -> Store:
    """The key-value store of the rendezvous of ``torch.distributed``, which must be initialized.

    Tested with torch 2.15 (``torch.distributed.distributed_c10d._get_default_store``). Public replacement: a store that
    the caller makes with ``torch.distributed.TCPStore``, at the price of a second port.
    """
    import torch.distributed as dist

    return dist.distributed_c10d._get_default_store()


def before_collectives(act: Callable[[], None]) -> Callable[[], None]:
    """Call a function before every collective that Python code begins on the default process group.

    Whatever the code is (``torch.distributed.all_reduce``, torchmetrics, a hook of Lightning), it calls a method of
    ``ProcessGroup``; messages between two processes (``send``, ``recv``) are left alone.

    Tested with torch 2.15 (methods of the class ``torch.distributed.ProcessGroup`` are replaced, some of them private).
    Public replacement: ``ProcessGroup.register_pre_hook``, which torch 2.15 has and does not document.

    Returns:
        A function that ends it.
    """
    import torch.distributed as dist

    kinds = ("all", "broadcast", "reduce", "gather", "scatter", "barrier", "monitored_barrier")
    methods = {
        name: method
        for name, method in vars(dist.ProcessGroup).items()
        if name.lstrip("_").startswith(kinds) and callable(method)
    }
    replaced = {}

    def acting(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(group: Any, *arguments: Any, **options: Any) -> Any:
            if group is dist.group.WORLD:
                act()
            return method(group, *arguments, **options)

        return call

    for name, method in methods.items():
        replaced[name] = acting(method)
        setattr(dist.ProcessGroup, name, replaced[name])

    def end() -> None:
        for name, method in methods.items():
            if vars(dist.ProcessGroup)[name] is replaced[name]:  # else somebody else has replaced it since
                setattr(dist.ProcessGroup, name, method)

    return end


# Lightning: signals ---------------------------------------------------------------------------------------------------


def disable_sigterm_broadcast(trainer: Any) -> Callable[[], None]:
    """Keep the Trainer from broadcasting, before every batch, whether rank 0 received SIGTERM.

    Tested with Lightning 2.6.6 (``_TrainingEpochLoop._broadcast_sigterm_tensor``). Public replacement: a flag of the
    Trainer that turns the broadcast off; there is none.

    Returns:
        A function that enables it again.
    """
    loop = trainer.fit_loop.epoch_loop
    if not hasattr(type(loop), "_broadcast_sigterm_tensor"):  # Lightning before 2.5.2 does not broadcast
        return lambda: None
    loop._broadcast_sigterm_tensor = lambda: None
    return lambda: delattr(loop, "_broadcast_sigterm_tensor")


def replace_sigterm_handler(trainer: Any, handler: Callable[[int, Any], None]) -> Callable[[], None]:
    """Let the Trainer install this handler of SIGTERM; its own one broadcasts, which blocks if one rank is signalled.

    Tested with Lightning 2.6.6 (``_SignalConnector._sigterm_notifier_fn``). Public replacement: ``signal.signal`` after
    the Trainer has installed its own handlers, for which there is no hook.

    Returns:
        A function that gives the Trainer its own handler back.
    """
    connector = trainer._signal_connector
    if not hasattr(type(connector), "_sigterm_notifier_fn"):  # as for the broadcast
        return lambda: None
    connector._sigterm_notifier_fn = handler
    return lambda: delattr(connector, "_sigterm_notifier_fn")


def mark_sigterm_received(trainer: Any) -> None:
    """Make the Trainer stop as it does after SIGTERM.

    Tested with Lightning 2.6.6 (``Trainer._signal_connector.received_sigterm``). Public replacement: a setter of
    ``Trainer.received_sigterm``, which can only be read.
    """
    trainer._signal_connector.received_sigterm = True


# Lightning: training --------------------------------------------------------------------------------------------------


def attached_trainer(module: Any) -> Any:
    """The Trainer that a LightningModule is attached to, or None.

    Tested with Lightning 2.6.6 (``LightningModule._trainer``). Public replacement: ``LightningModule.trainer``, which
    raises an error where this returns None.
    """
    return module._trainer


def allow_skipped_steps(trainer: Any) -> Callable[[], None]:
    """Let ``training_step`` return None although there are several processes: then no gradients are computed.

    Tested with Lightning 2.6.6 (``_AutomaticOptimization._training_step``, ``call._call_strategy_hook``). Public
    replacement: none; Lightning asks the number of processes, where it should ask the strategy.

    Returns:
        A function that forbids it again.
    """
    loop = trainer.fit_loop.epoch_loop.automatic_optimization
    hooks = sys.modules[type(loop).__module__].call  # type: ignore[attr-defined]

    def training_step(kwargs: Any) -> Any:
        output = hooks._call_strategy_hook(trainer, "training_step", *kwargs.values())
        trainer.strategy.post_training_step()
        return loop.output_result_cls.from_training_step_output(output, trainer.accumulate_grad_batches)

    loop._training_step = training_step
    return lambda: delattr(loop, "_training_step")


def validate(trainer: Any) -> None:
    """Run validation at the end of a training epoch, as the Trainer does after a batch.

    Tested with Lightning 2.6.6 (``_TrainingEpochLoop.on_advance_end``, ``_LoggerConnector._first_loop_iter``). Public
    replacement: none; ``Trainer.validate`` ends the fit.
    """
    connector = trainer._logger_connector
    first = connector._first_loop_iter
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True
    connector._first_loop_iter = first


def skips_backward(trainer: Any) -> bool:
    """Whether the present epoch computes no gradients: the last one of ``StochasticWeightAveraging``.

    Tested with Lightning 2.6.6 (``_FitLoop._skip_backward``). Public replacement: none.
    """
    return trainer.fit_loop._skip_backward


def logging_step(trainer: Any) -> int:
    """The step that the Trainer gives its loggers: batches after which an optimizer stepped.

    Tested with Lightning 2.6.6 (``_TrainingEpochLoop._batches_that_stepped``). Public replacement:
    ``Trainer.global_step``, which counts several optimizers' steps apart, so that metrics would not be aligned.
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped


# Lightning: synchronized BatchNorm ------------------------------------------------------------------------------------


def sync_batch_norm(strategy: Any) -> Any:
    """The plugin that ``Trainer(sync_batchnorm=True)`` gives a strategy, or None.

    Tested with Lightning 2.6.6 (``ParallelStrategy._layer_sync``). Public replacement: none.
    """
    return strategy._layer_sync


def set_sync_batch_norm(strategy: Any, plugin: Any) -> None:
    """Replace the plugin of :func:`sync_batch_norm`.

    Tested with Lightning 2.6.6 (``ParallelStrategy._layer_sync``). Public replacement: none.
    """
    strategy._layer_sync = plugin


# Lightning: metrics --------------------------------------------------------------------------------------------------


def logged_metrics(trainer: Any) -> list[dict[str, Any]]:
    """What the present training epoch has logged, without the values: plain data, to be sent to other workers.

    Tested with Lightning 2.6.6 (``_TrainingEpochLoop._results``, ``_ResultMetric``, ``_Metadata``). Public replacement:
    none; ``Trainer.callback_metrics`` computes the values, which communicates.
    """
    described = []
    for key, metric in trainer.fit_loop.epoch_loop._results.items():
        if not metric.has_reset:
            meta = {name: value for name, value in vars(metric.meta).items() if name not in ("reduce_fx", "_sync")}
            sync = {name: getattr(metric.meta.sync, name) for name in ("should", "op", "rank_zero_only")}
            fx = metric.meta.reduce_fx.__name__
            described.append({"key": key, "tensor": metric.is_tensor, "fx": fx, "meta": meta, "sync": sync})
    return described


def log_nothing(trainer: Any, described: Sequence[dict[str, Any]]) -> None:
    """Log the metrics that other workers logged, without a value: a mean of no examples, an empty metric.

    Tested with Lightning 2.6.6 (``_ResultCollection``, ``_ResultMetric``, ``_Metadata``, ``_Sync``). Public
    replacement: none; ``LightningModule.log`` needs a value.

    Args:
        trainer: whose present training epoch is meant.
        described: what :func:`logged_metrics` returned on another worker.
    """
    results = trainer.fit_loop.epoch_loop._results
    kinds = sys.modules[type(results).__module__]
    for entry in described:
        meta = kinds._Metadata(**entry["meta"], reduce_fx=entry["fx"])  # type: ignore[attr-defined]
        sync = entry["sync"]
        meta.sync = kinds._Sync(  # type: ignore[attr-defined]
            fn=trainer.strategy.reduce, _should=sync["should"], _op=sync["op"], rank_zero_only=sync["rank_zero_only"]
        )
        metric = kinds._ResultMetric(meta, entry["tensor"])  # type: ignore[attr-defined]
        if not entry["tensor"]:
            metric.value = operator.attrgetter(meta.metric_attribute)(trainer.lightning_module)
        metric._update_count = 1  # or it would warn that nothing was logged
        results[entry["key"]] = metric.to(trainer.strategy.root_device)


# Lightning: Fabric ----------------------------------------------------------------------------------------------------


def joint_setup_required(strategy: Any) -> str:
    """What Fabric's strategies say when a model and its optimizers are set up one by one.

    Tested with Lightning 2.6.6 (``Strategy._err_msg_joint_setup_required``). Public replacement: none.
    """
    return strategy._err_msg_joint_setup_required()


# Lightning: callbacks -------------------------------------------------------------------------------------------------


def looks_at_the_clock_every_step(timer: Any) -> bool:
    """Whether a ``Timer`` compares the clock after every batch, rather than every epoch.

    Tested with Lightning 2.6.6 (``Timer._interval``). Public replacement: none.
    """
    return timer._interval == "step"


def stop_by_own_clock(timer: Any) -> Callable[[], None]:
    """Let a ``Timer`` that looks after every batch decide by this worker's clock, not by a broadcast of rank 0's.

    Tested with Lightning 2.6.6 (``Timer._check_time_remaining``, ``Timer._duration``). Public replacement: none;
    ``Timer.time_remaining`` is public, but the decision is not.

    Returns:
        A function that gives the timer its broadcast back.
    """

    def check(trainer: Any) -> None:
        remaining = timer.time_remaining()
        trainer.should_stop |= remaining is not None and remaining <= 0

    timer._check_time_remaining = check
    return lambda: delattr(timer, "_check_time_remaining")


def forget_last_save(checkpoint: Any) -> None:
    """Let a ``ModelCheckpoint`` save again although this worker has taken no step since it saved last.

    Tested with Lightning 2.6.6 (``ModelCheckpoint._last_global_step_saved``). Public replacement: none.
    """
    checkpoint._last_global_step_saved = -1


def saves_by_the_clock(checkpoint: Any) -> bool:
    """Whether a ``ModelCheckpoint`` saves at intervals of time.

    Tested with Lightning 2.6.6 (``ModelCheckpoint._train_time_interval``). Public replacement: its ``state_key``, from
    which the argument could be parsed.
    """
    return checkpoint._train_time_interval is not None


def averaged_model(averaging: Any) -> AveragedModel:
    """The averaged weights of a ``WeightAveraging`` callback, during fit.

    Tested with Lightning 2.6.6 (``WeightAveraging._average_model``). Public replacement: none; its checkpoints have the
    averaged weights.
    """
    return averaging._average_model
