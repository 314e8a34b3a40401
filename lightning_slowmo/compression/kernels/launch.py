"""How all kernels are launched."""

from typing import Any

import torch
from torch import Tensor


def launch(kernel: Any, programs: int, *arguments: Tensor | int, num_warps: int = 4, **constants: Any) -> None:
    """Run ``programs`` programs of a kernel on the device of the first argument; nothing if there are none.

    Multiplications and additions are never fused, so that floats have the bits of the torch code.
    """
    if not programs:
        return
    device = arguments[0].device  # type: ignore[union-attr]
    with torch.cuda.device(device if device.type == "cuda" else -1):  # Triton launches on the current device
        kernel[(programs,)](*arguments, num_warps=num_warps, enable_fp_fusion=False, **constants)
