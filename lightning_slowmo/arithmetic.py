"""The three operations of which outer steps are made, written so that a step reads like its paper.

Each returns its result. Where ``out`` is given, the result may take that memory: what lay there is no longer needed. On
a CPU this keeps an outer step at the memory traffic of its inputs and outputs, which a new tensor for each result would
double.
"""

from __future__ import annotations

import torch
from torch import Tensor


def add(a: Tensor, b: Tensor, scale: float = 1.0, *, out: Tensor | None = None) -> Tensor:
    """``a + scale * b``."""
    return torch.add(a, b, alpha=scale, out=out)


def subtract(a: Tensor, b: Tensor, scale: float = 1.0, *, out: Tensor | None = None) -> Tensor:
    """``a - scale * b``."""
    return torch.sub(a, b, alpha=scale, out=out)


def multiply(a: Tensor, scale: float, *, out: Tensor | None = None) -> Tensor:
    """``scale * a``."""
    return torch.mul(a, scale, out=out)
