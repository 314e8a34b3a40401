"""Kernels without a GPU: compiled for other machines' GPUs, and when there are none."""

import os
import sys
from importlib.util import find_spec

import pytest
import torch

from lightning_slowmo import Engine, SlowMo, Workers
from lightning_slowmo.averaging.kernels import trace
from lightning_slowmo.bucket_sizes import DEFAULT_SIZES, GPU_SIZES, sizes_for
from lightning_slowmo.triton_support import works_on
from tests.harness import run


def compiled(rank: int, folder: str) -> list[str]:
    os.environ["TRITON_CACHE_DIR"] = folder
    from tests.averaging.compile_kernels import compile_for

    return compile_for(90)


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_the_kernels_compile_for_a_gpu_that_is_not_here(tmp_path):
    (found,) = run(1, compiled, str(tmp_path), limit=300)
    assert "16 bytes at a time" in found


def sync_on_the_cpu(rank: int) -> bool:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], 0.1)
    Engine(SlowMo(sync_every=1), [optimizer], Workers()).after_step()
    return "lightning_slowmo.averaging.kernels.table" in sys.modules


def test_without_a_gpu_no_kernel_is_asked_for():
    assert not works_on(torch.device("cpu"))
    assert run(1, sync_on_the_cpu) == [False]


def test_a_rule_with_an_operation_that_kernels_have_not_is_refused():
    def rule(anchor, start, total, momentum):
        return torch.sqrt(anchor), momentum

    with pytest.raises(TypeError, match="sqrt is none of them"):
        trace.trace(rule, {})


def test_sizes_follow_the_device():
    assert sizes_for("cuda:1") is GPU_SIZES
    assert sizes_for("cpu") is DEFAULT_SIZES
