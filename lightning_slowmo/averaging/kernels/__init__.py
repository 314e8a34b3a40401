"""Triton kernels for averages and outer steps on a GPU: each works on all tensors of a bucket in one launch.

Without Triton, or for parameters on a CPU, averages run plain torch operations; :func:`available` alone decides.
Nothing here imports Triton before the first tensor on a GPU asks for it.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from lightning_slowmo.parameters import Bucket

if TYPE_CHECKING:
    from lightning_slowmo.averaging.kernels.table import Table

_interpreting = False


def available(device: torch.device) -> bool:
    """Whether the kernels of this folder work on tensors of ``device``: a GPU that Triton can compile for."""
    return _compiles(device) if device.type == "cuda" else _interpreting


def table_of(bucket: Bucket) -> Table | None:
    """The kernels' view of a bucket, kept with it; None if its parameters are for plain torch operations."""
    if not available(bucket.device):
        return None
    from lightning_slowmo.averaging.kernels import table

    return table.table_of(bucket)


@contextmanager
def interpreted() -> Iterator[None]:
    """For tests: use the kernels for tensors on the CPU, in Triton's interpreter.

    The variable ``TRITON_INTERPRET=1`` must be set before Triton is imported.

    Raises:
        RuntimeError: if it is not set.
    """
    global _interpreting
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("set TRITON_INTERPRET=1 before Triton is imported")
    _interpreting = True
    try:
        yield
    finally:
        _interpreting = False


@lru_cache(maxsize=64)
def _compiles(device: torch.device) -> bool:
    missing = _missing(device)
    if missing:
        warnings.warn(f"averages on {device} use torch operations, several times slower: {missing}", stacklevel=4)
    return not missing


def _missing(device: torch.device) -> str:
    """What keeps Triton from compiling for ``device``; empty if nothing does."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (7, 0):
        return "Triton needs compute capability 7.0"
    if not os.environ.get("CC") and not any(map(shutil.which, ("gcc", "clang", "cc"))):
        return "Triton needs a C compiler (gcc or clang)"
    return ""
