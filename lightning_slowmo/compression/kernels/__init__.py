"""Triton kernels for vectors on a GPU. Each works on all tensors of a vector at once and waits for nothing.

Without Triton, or for vectors on a CPU, the compressors run plain torch operations; :func:`available` alone decides.
Payloads are the same bytes either way, except for ``l1`` and ``l2`` norms, which may differ in the last digits because
they are summed in another order. One payload decodes to the same bits everywhere.

Nothing here imports Triton before the first vector on a GPU asks for it; the modules of this folder other than
``tables`` do, so they are imported where they are used.
"""

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

_interpreting = False


def available(tensor: Tensor) -> bool:
    """Whether the kernels of this folder work on ``tensor``: it is on a GPU that Triton can compile for."""
    if tensor.is_cuda:
        return _compiles(tensor.device)
    return _interpreting


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
        warnings.warn(f"compression on {device} uses torch operations, many times slower: {missing}", stacklevel=4)
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
