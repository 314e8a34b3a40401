"""Kernels without a GPU: in Triton's interpreter, compiled for other machines' GPUs, and when there are none."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from lightning_slowmo.averaging.kernels import trace
from lightning_slowmo.bucket_sizes import DEFAULT_SIZES, GPU_SIZES, sizes_for
from lightning_slowmo.triton_support import works_on

ROOT = Path(__file__).parents[2]


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment = inherited | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=300)


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_the_kernels_in_the_interpreter():
    file = "tests/averaging/interpreted_kernels.py"
    result = run("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-1000:]


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_the_kernels_compile_for_a_gpu_that_is_not_here(tmp_path):
    result = run("-m", "tests.averaging.compile_kernels", "90", TRITON_CACHE_DIR=str(tmp_path))
    assert result.returncode == 0, result.stderr[-3000:]
    assert "16 bytes at a time" in result.stdout


def test_without_a_gpu_no_kernel_is_asked_for():
    assert not works_on(torch.device("cpu"))
    script = (
        "import sys, torch; from lightning_slowmo import Engine, SlowMo, Workers\n"
        "optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], 0.1)\n"
        "Engine(SlowMo(sync_every=1), [optimizer], Workers()).after_step()\n"
        "sys.exit('lightning_slowmo.averaging.kernels.table' in sys.modules)"
    )
    assert run("-c", script).returncode == 0


def test_a_rule_with_an_operation_that_kernels_have_not_is_refused():
    def rule(anchor, start, total, momentum):
        return torch.sqrt(anchor), momentum

    with pytest.raises(TypeError, match="sqrt is none of them"):
        trace.trace(rule, {})


def test_sizes_follow_the_device():
    assert sizes_for("cuda:1") is GPU_SIZES
    assert sizes_for("cpu") is DEFAULT_SIZES
