"""Several processes on one GPU that talk over NCCL, which takes them for processes of different hosts."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests import harness

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

BOTH = "cpu:gloo,cuda:nccl"
"""Lets the same processes run on the GPU and, for comparison, on the CPU."""

OVER_SOCKETS = {
    "NCCL_SOCKET_IFNAME": "lo",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_IB_DISABLE": "1",
    "NCCL_P2P_DISABLE": "1",
    "NCCL_SHM_DISABLE": "1",
    "LOCAL_WORLD_SIZE": "1",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",  # as docs/gpu.md says for plain loops, which make the default group themselves
}


def run(size: int, function: Callable, *arguments: Any, limit: float = 120.0, expect_failure: bool = False) -> list:
    """Call ``function(rank, *arguments)`` on ``size`` processes that a launcher has started, one a host."""
    return harness.run_trainers(
        size,
        _on_a_host_of_its_own,
        function,
        arguments,
        environment=OVER_SOCKETS,
        limit=limit,
        expect_failure=expect_failure,
    )


def _on_a_host_of_its_own(rank: int, function: Callable, arguments: tuple) -> Any:
    os.environ |= {"NCCL_HOSTID": f"host{rank}", "GROUP_RANK": str(rank), "LOCAL_RANK": "0"}
    return function(rank, *arguments)


def join() -> None:
    """Join the default process group, for both devices."""
    torch.distributed.init_process_group(BOTH)
