"""Runs the checks of the GPU kernels, each in a process of its own: Triton interprets or compiles, not both in one."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_slowmo.compression import kernels

HERE = Path(__file__).parent


def run(*command, **environment):
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command], env=inherited | environment, capture_output=True, text=True, timeout=600
    )


@pytest.fixture(autouse=True)
def _needs_triton():
    pytest.importorskip("triton", reason="Triton is not installed: the GPU kernels are not tested")


def test_kernels_in_the_interpreter():
    file = str(HERE / "interpreted_kernels.py")
    result = run("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


def test_every_kernel_compiles_for_a_gpu():
    result = run(str(HERE / "compiled_kernels.py"))
    assert result.returncode == 0, result.stderr[-5000:]
    files = Path(kernels.__file__).parent.glob("*.py")
    launched = {name for file in files for name in re.findall(r"launch\(\s*(_\w+)", file.read_text())}
    assert launched == set(result.stdout.split())


def test_triton_is_not_imported_with_the_package():
    """It takes a second, and is not installed everywhere: its kernels are imported inside functions only."""
    folder = Path(kernels.__file__).parent
    for file in [*folder.parent.glob("*.py"), folder / "__init__.py", folder / "tables.py"]:
        for node in ast.parse(file.read_text()).body:
            names = [alias.name for alias in getattr(node, "names", [])] + [getattr(node, "module", None) or ""]
            assert not [name for name in names if name.startswith(("triton", kernels.__name__ + "."))], file


def test_the_interpreter_must_be_chosen_before(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1"), kernels.interpreted():
        pass
    assert not kernels.available(torch.zeros(1))
