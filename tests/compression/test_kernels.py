"""The GPU kernels on a machine without a GPU: they compile, and Triton is imported only where it is wanted."""

import ast
import re
from pathlib import Path

import pytest
import torch

from lightning_slowmo.compression import kernels
from tests.harness import run


@pytest.fixture(autouse=True)
def _needs_triton():
    pytest.importorskip("triton", reason="Triton is not installed: the GPU kernels are not tested")


def compiled(rank: int) -> set[str]:
    from tests.compression.compiled_kernels import compile_all

    return compile_all()


def test_every_kernel_compiles_for_a_gpu():
    (found,) = run(1, compiled, limit=300)
    files = Path(kernels.__file__).parent.glob("*.py")
    launched = {name for file in files for name in re.findall(r"launch\(\s*(_\w+)", file.read_text())}
    assert launched == found


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
