"""Triton kernels for vectors on a GPU. Each works on all tensors of a vector at once and waits for nothing.

Without Triton, or for vectors on a CPU, the compressors run plain torch operations; :func:`available` alone decides.
Payloads are the same bytes either way, except for ``l1`` and ``l2`` norms, which may differ in the last digits because
they are summed in another order. One payload decodes to the same bits everywhere.

Nothing here imports Triton before the first vector on a GPU asks for it; the modules of this folder other than
``tables`` do, so they are imported where they are used.
"""

from torch import Tensor

from lightning_slowmo.triton_support import interpreted, works_on

__all__ = ["available", "interpreted"]


def available(tensor: Tensor) -> bool:
    """Whether the kernels of this folder work on ``tensor``."""
    return works_on(tensor.device)
