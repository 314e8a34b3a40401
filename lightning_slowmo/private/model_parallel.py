"""Set-up of Lightning's ``ModelParallelStrategy`` in steps of one's own."""

from __future__ import annotations

from typing import Any


def join_model_parallel(strategy: Any) -> None:
    """Let a ``ModelParallelStrategy`` find its ranks and join the process group, without making a mesh.

    Tested with Lightning 2.6.6 (``ModelParallelStrategy._setup_distributed``). Public replacement:
    ``setup_environment``, if it did not demand that its two sizes make up all processes.
    """
    strategy._setup_distributed()


def set_device_mesh(strategy: Any, mesh: Any) -> None:
    """Make a mesh known as ``device_mesh``, to a ``ModelParallelStrategy`` and to its module's ``configure_model``.

    Tested with Lightning 2.6.6 (``ModelParallelStrategy._device_mesh``, ``LightningModule._device_mesh``). Public
    replacement: none.
    """
    strategy._device_mesh = mesh
    strategy.lightning_module._device_mesh = mesh
