"""Whether Triton kernels can work on a device: the one place that decides between them and plain torch operations.

Nothing here imports Triton: what does is imported where a tensor on a GPU asks for it.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec

import torch

_interpreting = False


def works_on(device: torch.device) -> bool:
    """Whether Triton kernels work on tensors of a device: a GPU that Triton can compile for."""
    return _compiles(device) if device.type == "cuda" else _interpreting


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
        warnings.warn(
            f"Syncs on {device} use plain torch operations, which take several times as long: {missing}.", stacklevel=4
        )
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
