"""All GPU kernels in Triton's interpreter: in one process of their own, as Triton interprets or compiles, not both."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = ["tests/averaging/interpreted_kernels.py", "tests/compression/interpreted_kernels.py"]


def test_kernels_in_the_interpreter_do_what_the_torch_code_does():
    pytest.importorskip("triton", reason="Triton is not installed: the GPU kernels are not tested")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *FILES]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=900)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
