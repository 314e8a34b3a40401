"""The folder of a distributed checkpoint (DCP), and the state of optimizers whose tensors are sharded.

An optimizer's state is kept in three forms: each process's own part, for an exact resume; named as torch's
``get_optimizer_state_dict`` names it, in the folder, which any number of processes can read; and whole, in a single
file that ``ddp`` opens. torch's own function is not used for the second: it takes a step of an optimizer whose state is
empty, which it is after a reset, and the next step would no longer be a first one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.nn import Module
from torch.optim import Optimizer

from lightning_slowmo.algorithms.optimizer_state import roles
from lightning_slowmo.communication.workers import Workers
from lightning_slowmo.pieces import map_leaves
from lightning_slowmo.private import held
from lightning_slowmo.shards import is_sharded, own_part

META = "meta.pt"
"""The file of the folder that holds what is not sharded, where Lightning looks for it."""

FILES = "lightning_slowmo_files"
"""Where :data:`META` has the SHA-256 of each other file of the folder."""

LOCAL = "local part of a sharded tensor"
"""The key by which a process's part is known in its own state."""

WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
"""What ``torch.compile`` and activation checkpointing add to the names of parameters, and DCP leaves out."""


# The folder -----------------------------------------------------------------------------------------------------------


def write(folder: Path, content: dict[str, Any], everyone: Workers, first: bool, group: Any) -> dict[str, str]:
    """Write a folder without :data:`META`; every process must call this.

    Args:
        folder: is removed first, if it is there.
        content: weights and optimizers' states, with this process's shards.
        everyone: all processes.
        first: whether this one belongs to the first worker, which writes.
        group: process group of the first worker.

    Returns:
        The SHA-256 of each file.
    """
    if everyone.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    everyone.gather([0], "making the folder of a checkpoint")
    if first:
        dcp.save(content, checkpoint_id=folder, process_group=group)
    everyone.gather([0], "writing the shards of a checkpoint")
    files = sorted(os.listdir(folder))[everyone.rank :: everyone.size]
    texts = everyone.gather_text(json.dumps({file: sha256(folder / file) for file in files}))
    return {file: digest for text in texts for file, digest in json.loads(text).items()}


def verify(folder: Path, expected: Mapping[str, str], everyone: Workers) -> None:
    """Compare the files of a folder with their checksums; every process must call this.

    Raises:
        ValueError: on all processes; names the files that are damaged, missing, or of another save.
    """
    wrong = []
    for file, digest in sorted(expected.items())[everyone.rank :: everyone.size]:
        path = folder / file
        if not path.is_file():
            wrong.append(f"{file} is missing")
        elif sha256(path) != digest:
            wrong.append(f"{file} is damaged or of another save")
    found = [text for text in everyone.gather_text("; ".join(wrong)) if text]
    if found:
        raise ValueError(f"The checkpoint {folder} is torn: {'; '.join(found)}. Resume from another one.")


def move(written: Path, path: Path) -> None:
    """Let what was written take the place of an older checkpoint, folder or file."""
    old = Path(f"{path}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.is_dir():
        os.replace(path, old)
    elif path.exists() and written.is_dir():
        path.unlink()
    os.replace(written, path)
    shutil.rmtree(old, ignore_errors=True)


def sha256(path: Path) -> str:
    """The SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while chunk := file.read(2**20):
        digest.update(chunk)
    return digest.hexdigest()


# Optimizers -----------------------------------------------------------------------------------------------------------


def names_of(module: Module) -> dict[int, str]:
    """The name of each parameter in a distributed checkpoint, by its id."""
    names = {}
    for name, parameter in module.named_parameters():
        for wrapper in WRAPPERS:
            name = name.replace(wrapper, "")
        names[id(parameter)] = name
    return names


def own_state(optimizer: Optimizer) -> dict[str, Any]:
    """This process's part of an optimizer's ``state_dict``: tensors that are not sharded."""
    return map_leaves(lambda leaf: {LOCAL: held(leaf)} if _is_shard(leaf) else leaf, optimizer.state_dict())


def load_own_state(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Restore what :func:`own_state` returned in the same process."""
    parameters = _parameters(optimizer)

    def of(parameter: Tensor, values: Any) -> Any:
        return map_leaves(lambda leaf: _shard(parameter, leaf[LOCAL]) if _is_own(leaf) else leaf, values)

    states = {number: of(parameters[number], values) for number, values in state["state"].items()}
    optimizer.load_state_dict({**state, "state": states})


def whole_state(optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's ``state_dict`` with whole tensors on the CPU; all processes of a worker must call this."""
    return map_leaves(lambda leaf: leaf.full_tensor().cpu() if _is_shard(leaf) else leaf, optimizer.state_dict())


def load_whole_state(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Restore what :func:`whole_state` returned, or the ``state_dict`` of an optimizer of whole parameters.

    Raises:
        ValueError: if it is of other parameters.
    """
    parameters = _parameters(optimizer)
    if sum(len(group["params"]) for group in state["param_groups"]) != len(parameters):
        raise ValueError("The checkpoint's optimizer has another number of parameters; is it the same model?")

    def of(parameter: Tensor, value: Any) -> Any:
        fits = isinstance(value, Tensor) and is_sharded(parameter) and value.shape == parameter.shape
        return _shard(parameter, own_part(parameter, value)) if fits else value

    states = {
        number: {name: of(parameters[number], value) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": states})


def named_state(optimizer: Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    """An optimizer's state as a distributed checkpoint holds it.

    Where it is empty (after a reset, or of a parameter that was never used), it is what a first step would find: zeros.

    Args:
        optimizer: of this process.
        names: of its parameters, by id.
    """
    known = roles(optimizer)
    states: dict[str, Any] = {}
    groups = []
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            state = dict(optimizer.state.get(parameter, {}))
            for (place, name), entry in (known.of(index, parameter) or {}).items():
                if place == 0 and name not in state and entry.dtype is not None:
                    scalar = torch.zeros((), dtype=entry.dtype)
                    state[name] = scalar if entry.role == "counter" else torch.zeros_like(parameter, dtype=entry.dtype)
            states[names[id(parameter)]] = state
        groups.append({**group, "params": [names[id(parameter)] for parameter in group["params"]]})
    return {"state": states, "param_groups": groups}


def load_named_state(folder: Path, key: str, optimizer: Optimizer, names: Mapping[int, str]) -> bool:
    """Restore from a folder what :func:`named_state` or torch's own function put there; all processes must call this.

    Args:
        folder: of the distributed checkpoint.
        key: of the optimizer in it.
        optimizer: of this process, whose parameters may be sharded in another way than in the folder.
        names: of its parameters, by id.

    Returns:
        Whether the folder has the optimizer's state.
    """
    stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    wanted: dict[str, Any] = {}
    places: dict[tuple[int, str], str] = {}
    for number, parameter in enumerate(_parameters(optimizer)):
        start = f"{key}.state.{names[id(parameter)]}."
        for entry, kind in stored.items():
            if entry.startswith(start):
                places[number, entry.removeprefix(start)] = entry
                wanted[entry] = _room(parameter, kind)
    groups = [entry for entry in stored if entry.startswith(f"{key}.param_groups")]
    if not (places or groups):
        return False
    wanted |= {entry: _room(None, stored[entry]) for entry in groups}
    dcp.load(wanted, checkpoint_id=folder)
    states: dict[int, dict[str, Any]] = {}
    for (number, name), entry in places.items():
        states.setdefault(number, {})[name] = wanted[entry]
    state = optimizer.state_dict()
    for entry in groups:
        _set_option(state["param_groups"], entry.removeprefix(f"{key}.param_groups"), wanted[entry])
    optimizer.load_state_dict({"state": states, "param_groups": state["param_groups"]})
    return True


def _set_option(groups: list[dict[str, Any]], path: str, value: Any) -> None:
    """Set a parameter group's option (a path such as ``.0.lr``), or all groups' (no path), but for the parameters."""
    if path:
        number, _, option = path.removeprefix(".").partition(".")
        values = [(int(number), {option: value})] if option in groups[int(number)] else []
    else:
        values = list(enumerate(value))
    for index, options in values:
        groups[index] |= {option: value for option, value in options.items() if option != "params"}


def _room(parameter: Tensor | None, kind: Any) -> Any:
    """Where an entry of a folder is to go: a tensor sharded as the parameter is, if it has its shape."""
    if not isinstance(kind, TensorStorageMetadata):
        return None
    if parameter is not None and kind.size == parameter.shape:
        return torch.zeros_like(parameter, dtype=kind.properties.dtype, requires_grad=False)
    return torch.zeros(kind.size, dtype=kind.properties.dtype)


def _parameters(optimizer: Optimizer) -> Sequence[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _is_shard(value: Any) -> bool:
    return isinstance(value, Tensor) and is_sharded(value)


def _is_own(value: Any) -> bool:
    return type(value) is dict and LOCAL in value


def _shard(parameter: Any, part: Any) -> Tensor:
    """A tensor that is sharded as a parameter is, of this process's part of it."""
    return DTensor.from_local(
        part.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
