"""What must be the same on all workers: algorithm, parameters and where they start from; at a consensus, buffers."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from lightning_slowmo.algorithms.base import Algorithm, Running, require_elementwise
from lightning_slowmo.buffers import Slot, shared, slots
from lightning_slowmo.communication.broadcast import broadcast_tensors
from lightning_slowmo.communication.meeting import require_equal
from lightning_slowmo.communication.workers import SyncError, Workers
from lightning_slowmo.parameters import Layout
from lightning_slowmo.private import held
from lightning_slowmo.shards import is_sharded
from lightning_slowmo.tensors import are_binary, describe, refusal
from lightning_slowmo.tensors import checksum as checksum_of_tensor

LOCAL = "local "
"""What marks the description of a buffer that may differ between workers."""


def check_on_nonfinite(value: str) -> None:
    """Raise ValueError unless ``value`` says what to do with a worker whose parameters are not finite."""
    if value not in ("raise", "skip"):
        raise ValueError(f"on_nonfinite must be 'raise' or 'skip', got {value!r}.")


def require_same_setting(
    algorithm: Algorithm, optimizers: Sequence[Optimizer], everyone: Workers, module: Module | None = None
) -> None:
    """Make sure that all workers run the same algorithm on the same parameters, and that there is one to train.

    Args:
        algorithm: this worker's.
        optimizers: this worker's.
        everyone: all processes; each must call this.
        module: the model, for the names of parameters.

    Raises:
        ValueError: if there is nothing to train, nothing that workers could exchange, or the algorithm needs whole
            tensors and these are sharded.
        SyncError: on every worker, with the two differing descriptions.
    """
    require_equal(
        everyone,
        "The algorithm",
        re.sub(r" at 0x[0-9a-f]+", "", repr(algorithm)),  # a function's address differs between processes
        "Construct the strategy with the same arguments on every rank.",
    )
    require_equal(
        everyone,
        "The model",
        "; ".join(_describe(optimizers)),
        "Build the same model, and freeze the same parameters, on every rank.",
    )
    names = {} if module is None else {id(parameter): name for name, parameter in module.named_parameters()}
    trained = [
        (names.get(id(parameter), f"{index} of group {number}"), parameter)
        for optimizer in optimizers
        for number, group in enumerate(optimizer.param_groups)
        for index, parameter in enumerate(group["params"])
        if parameter.requires_grad
    ]
    for name, parameter in trained:
        reason = refusal(parameter, trained=True)
        if reason is not None:
            raise ValueError(f"Parameter {name} {reason}.")
    if any(is_sharded(parameter) for _, parameter in trained):
        require_elementwise(algorithm)
    if not any(parameter.numel() for _, parameter in trained):
        raise ValueError("There is nothing to train: the optimizers hold no parameter that requires a gradient.")


def start_equal(
    model: Module, everyone: Workers, only: Sequence[Tensor] | None = None, workers: Workers | None = None
) -> None:
    """Overwrite the parameters and buffers of all processes with those of rank 0; shards with those of worker 0.

    Buffers that are not persistent are overwritten where they have the same shape everywhere, and else left alone.

    Args:
        model: whose names, dtypes and shapes must be equal on all workers.
        everyone: all processes; each must call this.
        only: the tensors to overwrite, if not all of the model's.
        workers: between which this process exchanges parameters, the first of whom has the same shards; ``everyone`` if
            None.

    Raises:
        SyncError: on every worker, if names, dtypes or shapes differ.
        ValueError: if a tensor cannot be sent; names it.
    """
    buffers = list(slots(model))
    local = {slot.name: slot.tensor for slot in buffers if not slot.persistent}
    tensors = dict(model.named_parameters()) | {slot.name: slot.tensor for slot in buffers if slot.persistent}
    rows = require_same_tensors(model, tensors, everyone, "Build the same model on every rank.", local)
    alike = [name for name in local if len({row.get(name) for row in rows}) == 1 and refusal(local[name]) is None]
    everything = {id(t): t for t in (*tensors.values(), *(local[name] for name in alike))}
    chosen = list(everything.values()) if only is None else list(only)
    with torch.no_grad():
        broadcast_tensors([tensor for tensor in chosen if not is_sharded(tensor)], everyone)
        shards = [held(tensor) for tensor in chosen if is_sharded(tensor)]
        broadcast_tensors(shards, everyone if workers is None else workers)


def require_same_tensors(
    model: Module,
    tensors: Mapping[str, Tensor],
    everyone: Workers,
    advice: str,
    local: Mapping[str, Tensor] | None = None,
) -> list[dict[str, str]]:
    """Make sure that tensors have the same names, dtypes and shapes on all workers, and can be sent.

    Args:
        model: that they belong to.
        tensors: by name.
        everyone: all processes; each must call this.
        advice: what the user can do about a difference.
        local: tensors that may differ.

    Returns:
        The descriptions of all tensors, by rank.

    Raises:
        SyncError: on every worker; names the tensor, its module, and what each worker has.
        ValueError: on every worker, if a tensor cannot be sent; names it.
    """
    described = {name: describe(tensor) for name, tensor in tensors.items()}
    described |= {name: LOCAL + describe(tensor) for name, tensor in (local or {}).items()}
    rows: list[dict[str, str]] = [json.loads(text) for text in everyone.gather_text(json.dumps(described))]
    for name in dict.fromkeys(name for row in rows for name in row):
        kinds = [row.get(name, "none") for row in rows]
        if len(set(kinds)) > 1 and not all(kind == "none" or kind.startswith(LOCAL) for kind in kinds):
            each = ", ".join(f"{who} has {kind}" for who, kind in zip(everyone.names, kinds, strict=True))
            raise SyncError(f"The model differs between workers: {each} as {name} in {_owner(model, name)}. {advice}")
    for name, tensor in tensors.items():
        reason = refusal(tensor)
        if reason is not None:
            raise ValueError(f"{name} in {_owner(model, name)} {reason}.")
    return rows


def _owner(model: Module, name: str) -> str:
    """The module that a parameter or buffer belongs to: its class, and its name."""
    path = name.rpartition(".")[0]
    try:
        owner = model.get_submodule(path)
    except AttributeError:  # on another worker only
        return path
    return type(owner).__name__ + (f" ({path})" if path else "")


def compare_buffers(module: Module | None, everyone: Workers) -> frozenset[str]:
    """Make sure that all workers have the same persistent buffers and masks, before any are sent.

    It costs one small header; the buffers are described to one another only if they differ.

    Args:
        module: the model.
        everyone: all processes; each must call this.

    Returns:
        The names of the masks, which are equal on all workers and need no mean, see :mod:`lightning_slowmo.buffers`.

    Raises:
        SyncError: on every worker, if shapes, dtypes or masks differ.
        ValueError: on every worker, if a buffer cannot be sent.
    """
    if module is None or everyone.alone:
        return frozenset()
    present = shared(module)
    described = {slot.name: describe(slot.tensor) for slot in present}
    masks = _masks(present)
    unsendable = any(refusal(slot.tensor) is not None for slot in present)
    rows = everyone.gather([_fingerprint(described), _fingerprint(masks), unsendable], "comparing buffers")
    kinds, seen, unsent = (set(column) for column in zip(*rows, strict=True))
    if len(kinds) > 1 or any(unsent):
        advice = "A persistent buffer needs one shape on all workers; with persistent=False it stays local to each."
        require_same_tensors(module, {slot.name: slot.tensor for slot in present}, everyone, advice)
    return frozenset(masks if len(seen) == 1 else _common_masks(masks, everyone))


def _masks(buffers: Sequence[Slot]) -> dict[str, int]:
    """The checksum of each mask among this worker's buffers."""
    candidates = [slot for slot in buffers if slot.like_a_parameter]
    binary = are_binary(slot.tensor for slot in candidates)
    return {slot.name: checksum_of_tensor(slot.tensor) for slot, yes in zip(candidates, binary, strict=True) if yes}


def _common_masks(masks: Mapping[str, int], everyone: Workers) -> list[str]:
    """The masks of all workers; what is binary on some of them only is none.

    Raises:
        SyncError: on every worker, if a mask differs.
    """
    rows = [json.loads(text) for text in everyone.gather_text(json.dumps(masks))]
    common = [name for name in rows[0] if all(name in row for row in rows)]
    for name in common:
        others = [who for who, row in zip(everyone.names, rows, strict=True) if row[name] != rows[0][name]]
        if others:
            raise SyncError(
                f"The mask {name} differs between workers: {', '.join(others)} and {everyone.names[0]} have pruned "
                "different weights, and a mean of masks is no mask. Prune on all workers alike: inside `with "
                "trainer.strategy.consensus():`, or with lightning_slowmo.callbacks.PruneConsensus."
            )
    return common


def _fingerprint(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content).encode())


def require_same_start(running: Sequence[Running], everyone: Workers, workers: Workers) -> None:
    """Make sure that all workers start from the same point: differences between them would pass for training progress.

    Args:
        running: the algorithms, by optimizer.
        everyone: all processes; each must call this.
        workers: between which this process exchanges parameters. Where the processes of a worker hold shards, only
            these hold the same ones.

    Raises:
        SyncError: on every worker; names those that start elsewhere, or says which optimizers keep other copies of the
            parameters.
    """
    require_equal(
        everyone,
        "The optimizers' own copies of the parameters",
        "; ".join(str(each.iterates) for each in running),
        "Use the same optimizers on every rank.",
    )
    high, low = divmod(checksum(each.layout for each in running), 2**32)
    sharded = any(is_sharded(parameter) for each in running for parameter in each.layout.parameters)
    place = workers.places[0] if sharded else 0
    sums = everyone.gather([place, high, low], "checksums of the initial parameters")
    first = {own[0]: own for own in reversed(sums)}
    others = [name for name, own in zip(everyone.names, sums, strict=True) if own != first[own[0]]]
    if others:
        does = "do" if len(others) > 1 else "does"
        raise SyncError(
            f"The initial parameters differ between workers: {', '.join(others)} {does} not start from those of "
            f"{everyone.names[0]}. Use the same seed on every rank, or broadcast the model from one of them."
        )


def checksum(layouts: Iterable[Layout]) -> int:
    """A number below 2**64 that depends on every bit of the parameters and on its place.

    Integers add up to the same in any order, so equal parameters have equal checksums on all devices.
    """
    total = 0
    for bucket in (bucket for layout in layouts for bucket in layout.buckets):
        for _, flat in bucket.blocks(bucket.pack()):
            bits = flat.view(torch.int64 if flat.element_size() == 8 else torch.int32)
            places = torch.arange(1, 2 * flat.numel(), 2, device=flat.device)  # odd, so that no single change cancels
            total = total * 31 + int((bits * places).sum())
    return total % 2**64


def _describe(optimizers: Sequence[Optimizer]) -> Iterator[str]:
    """The parameters that are synced, one description each."""
    for optimizer in optimizers:
        for index, group in enumerate(optimizer.param_groups):
            yield f"{type(optimizer).__name__} group {index}"
            for parameter in group["params"]:
                kind = describe(parameter)
                yield kind if parameter.requires_grad else f"frozen {kind}"
