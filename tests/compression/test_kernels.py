"""Runs the tests of the GPU kernels in Triton's interpreter, which has to be chosen before Triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_kernels_in_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed: the GPU kernels are not tested")
    file = Path(__file__).with_name("interpreted_kernels.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", str(file)]
    result = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


def test_triton_is_not_imported_with_the_package():
    """It takes a second, and is not installed everywhere."""
    program = "import sys, lightning_slowmo.compression; sys.exit('triton.language' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
