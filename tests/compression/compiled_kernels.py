"""Compiles every kernel for a GPU, on a machine that need not have one.

The interpreter accepts what the compiler refuses. ``tests/compression/test_kernels.py`` does so in a process of its
own.
"""

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from lightning_slowmo import triton_support
from lightning_slowmo.compression import QSGD, Cast, CountSketch, Sign, seeded_generator
from lightning_slowmo.compression.indices import decode_indices, encode_indices, index_bytes
from lightning_slowmo.compression.packing import unpack


class H100:
    """As much of a driver as compiling needs."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_all() -> set[str]:
    """Compile all kernels; their names. The process can run none afterwards."""
    driver.set_active(H100())
    triton_support._interpreting = True  # the kernels take tensors on the CPU, whose addresses nothing will use
    compiled, run = set(), triton.JITFunction.run

    def compile_only(self, *args, warmup, **settings):
        kernel = run(self, *args, warmup=True, **settings)
        assert "sm_90" in kernel.asm["ptx"]
        # Sums of products would have other bits than the CPU's.
        assert "fma.rn.f32" not in kernel.asm["ptx"], self.__name__
        compiled.add(self.__name__)

    triton.JITFunction.run = compile_only
    flat, segments = torch.ones(5000), (300, 0, 4700)
    sketch = CountSketch(rows=3, columns=64)
    quantizers = [QSGD(bits=3), QSGD(bits=12, bucket=5000, norm="max", contractive=True)]
    for compressor in (Cast("int8"), Sign("l1"), Sign("l2"), sketch, *quantizers):
        payload = compressor.compress(flat, segments, seeded_generator(0))
        compressor.decompress(payload, segments)
    for length, count in ((100, 60), (5000, 50)):
        code = torch.zeros(index_bytes(length, count), dtype=torch.uint8)
        encode_indices(torch.arange(count), length, code)
        decode_indices(code, length, count)
    unpack(torch.zeros(80, dtype=torch.uint8), 20, 32)

    from lightning_slowmo.compression.kernels.places import random_places
    from lightning_slowmo.compression.kernels.select import top_indices

    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        top_indices(flat.to(dtype), segments, (3, 0, 47))
    random_places(torch.zeros(1, dtype=torch.int64), segments, (3, 0, 47))
    return compiled


if __name__ == "__main__":
    print(*sorted(compile_all()))
