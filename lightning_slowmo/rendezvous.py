"""Where the rendezvous listens: at the address that all workers were given, not on every interface of a machine."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_log = logging.getLogger(__name__)


def listen_at(address: str, port: int, loopback: bool, timeout: timedelta) -> Any:
    """Let the rendezvous store that this process is about to open listen at one address alone.

    torch listens on all interfaces. It shares the server of stores in one process that have the same port, so the one
    that ``init_process_group`` opens uses the server that is made here.

    Args:
        address: that the workers were given. Names are left to torch: a machine may know its own name as another
            address than the rest of the network does.
        port: that the workers were given.
        loopback: whether all workers are on this machine, so that a loopback address serves them all.
        timeout: of the store.

    Returns:
        What to keep until the process group is there; None if torch listens on all interfaces, because the address is
        a name, or not one of this machine's (behind a router or in a container), or the port is in use.
    """
    try:
        ip = ipaddress.ip_address("127.0.0.1" if address == "localhost" else address)
    except ValueError:
        return None
    if ip.is_loopback and not loopback:
        return None
    listening = socket.socket(socket.AF_INET6 if ip.version == 6 else socket.AF_INET)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((str(ip), port))
        listening.listen(socket.SOMAXCONN)
    except OSError as error:
        listening.close()
        _log.info("The rendezvous listens on all interfaces: %s cannot be listened at (%s).", address, error)
        return None
    return dist.TCPStore(
        str(ip),
        port,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=listening.detach(),  # which the store closes
    )


def for_strategy(strategy: Any, timeout: timedelta) -> Any:
    """Call :func:`listen_at` if this process is the one that will hold a Trainer's rendezvous.

    Args:
        strategy: that knows its ranks and its cluster environment already.
        timeout: of the store.

    Returns:
        What to keep until the process group is there.
    """
    held_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if dist.is_initialized() or held_by_torchrun or not strategy.is_global_zero or strategy.world_size == 1:
        return None
    environment = strategy.cluster_environment
    return listen_at(environment.main_address, environment.main_port, strategy.num_nodes == 1, timeout)
