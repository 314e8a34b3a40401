"""Private members of PyTorch and of Lightning, each behind a function with a plain name.

No other file of the package touches a private member of a foreign object (``tests/test_architecture.py`` checks it), so
an upgrade that breaks one is repaired here. Every function says which version it was tested with and which public
interface would replace it. Nothing is imported from Lightning, and ``torch.distributed`` only where it is needed, so
every part of the package may use these functions.
"""

from __future__ import annotations

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


def default_store() -> Store:
    """The key-value store of the rendezvous of ``torch.distributed``, which must be initialized.

    Tested with torch 2.15 (``torch.distributed.distributed_c10d._get_default_store``). Public replacement: a store that
    the caller makes with ``torch.distributed.TCPStore``, at the price of a second port.
    """
    import torch.distributed as dist

    return dist.distributed_c10d._get_default_store()


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


# Lightning: callbacks -------------------------------------------------------------------------------------------------


def looks_at_the_clock_every_step(timer: Any) -> bool:
    """Whether a ``Timer`` compares the clock after every batch, rather than every epoch.

    Tested with Lightning 2.6.6 (``Timer._interval``). Public replacement: none.
    """
    return timer._interval == "step"


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
