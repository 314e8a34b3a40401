"""Hosts on this machine, each with a network of its own behind a link of a given rate.

A host is a network namespace with one interface, ``eth0``. A cable leads from it to a switch, a bridge in one more
namespace; the machine's own network is not touched, and when the namespaces go, everything goes with them. A token
bucket (``tc tbf``) on either end of every cable holds both directions at the rate.

Needs Linux, root, and iproute2. Processes join a host with :func:`enter`; whatever they connect to by its address then
goes through the cables::

    with Network(hosts=4, rate=100e6) as network:
        network.address(0)          # 10.77.0.1
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

PREFIX = "slowlinks"
"""How the names of all namespaces begin: ``slowlinks-<process>-<host>``."""

NAMESPACES = Path("/run/netns")

MTU = 9000
"""Large packets, so that their headers take less than a percent of the rate, and the machine handles fewer."""

QUEUE_SECONDS = 0.2
"""How much traffic may wait at a link before packets are dropped."""

CLONE_NEWNET = 0x40000000


class Unavailable(RuntimeError):
    """This machine cannot make such networks; says what is missing."""


@dataclass(frozen=True)
class Link:
    """A token bucket.

    Small bursts matter: tokens that gather while a link is idle let a short message through at once, which no cable
    does. A millisecond's worth is the compromise with the work of handling many small packets, and no packet may be
    larger than the bucket. Large buckets let the kernel handle large packets, as network cards that cut them do.

    Args:
        rate: bits per second.
        burst_seconds: traffic that fits into the bucket.
    """

    rate: float
    burst_seconds: float = 1e-3

    @property
    def burst(self) -> int:
        """Size of the bucket in bytes."""
        return max(MTU + 100, int(self.rate / 8 * self.burst_seconds))

    @property
    def largest(self) -> int:
        """Bytes that the sender's network stack may hand over at once, to be cut into packets later."""
        return min(65536, max(MTU, self.burst // 2))

    @property
    def limit(self) -> int:
        """Bytes that may wait."""
        return max(256 * 1024, int(self.rate / 8 * QUEUE_SECONDS))

    def arguments(self) -> list[str]:
        """For ``tc qdisc``."""
        return ["tbf", "rate", f"{self.rate:.0f}bit", "burst", str(self.burst), "limit", str(self.limit)]


def build_commands(tag: str, hosts: int, link: Link) -> list[list[str]]:
    """The commands that make a network.

    Args:
        tag: begins the namespaces' names.
        hosts: how many.
        link: of each.
    """
    switch = f"{tag}-switch"
    lines = [
        f"ip netns add {switch}",
        f"ip -n {switch} link add bridge type bridge",
        f"ip -n {switch} link set bridge mtu {MTU} up",
    ]
    for host in range(hosts):
        name, port = f"{tag}-{host}", f"port{host}"
        shape = " ".join(link.arguments())
        lines += [
            f"ip netns add {name}",
            f"ip -n {name} link set lo up",
            f"ip -n {switch} link add {port} mtu {MTU} type veth peer name eth0 mtu {MTU} netns {name}",
            f"ip -n {switch} link set {port} gso_max_size {link.largest} master bridge up",
            f"ip -n {name} link set eth0 gso_max_size {link.largest} up",
            f"ip -n {name} address add {address(host)}/16 dev eth0",
            f"tc -n {switch} qdisc add dev {port} root {shape}",
            f"tc -n {name} qdisc add dev eth0 root {shape}",
        ]
    return [line.split() for line in lines]


def cleanup_commands(names: list[str]) -> list[list[str]]:
    """The commands that remove namespaces, and with them all that is in them."""
    return [["ip", "netns", "delete", name] for name in names]


def address(host: int) -> str:
    """The IPv4 address of a host."""
    return f"10.77.{(host + 1) // 256}.{(host + 1) % 256}"


def stale(names: list[str], alive: set[int]) -> list[str]:
    """Which namespaces an earlier run has left behind: ours, of a process that is no more.

    Args:
        names: of all namespaces.
        alive: processes that exist.
    """
    owners = {name: re.fullmatch(rf"{PREFIX}-(\d+)-(\d+|switch)", name) for name in names}
    return [name for name, owner in owners.items() if owner and int(owner[1]) not in alive]


def check() -> None:
    """Make sure that networks can be made here, by making a small one.

    Raises:
        Unavailable: if not; says what is missing.
    """
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise Unavailable(f"{' and '.join(missing)} cannot be found: install iproute2.")
    if os.geteuid() != 0:
        raise Unavailable("Network namespaces need root: run this with sudo, or in a container that may make them.")
    with Network(hosts=1, rate=1e6):
        pass


@dataclass
class Network:
    """A network, from ``with`` to the end of the block, whatever happens inside. Leftovers of crashed runs go too.

    Args:
        hosts: how many.
        rate: of each link and direction, in bits per second.
        burst_seconds: size of their token buckets, see :class:`Link`.

    Raises:
        Unavailable: if a command fails, with what it said.
    """

    hosts: int
    rate: float
    burst_seconds: float = 1e-3
    tag: str = field(init=False)

    def __post_init__(self) -> None:
        self.tag = f"{PREFIX}-{os.getpid()}"

    def __enter__(self) -> Network:
        names = [path.name for path in NAMESPACES.iterdir()] if NAMESPACES.exists() else []
        alive = {int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()}
        for command in cleanup_commands(stale(names, alive)):
            _run(command)
        try:
            for command in build_commands(self.tag, self.hosts, Link(self.rate, self.burst_seconds)):
                _run(command)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def name(self, host: int) -> str:
        """The namespace of a host."""
        return f"{self.tag}-{host}"

    def address(self, host: int) -> str:
        """The address of a host."""
        return address(host)

    def _remove(self) -> None:
        names = [*(self.name(host) for host in range(self.hosts)), f"{self.tag}-switch"]
        for command in cleanup_commands([name for name in names if (NAMESPACES / name).exists()]):
            with suppress(Unavailable):  # the others must go too
                _run(command)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip() or f"exit code {done.returncode}"
        hint = " Is the kernel module there (sch_tbf, veth, bridge)?" if "not supported" in reason.lower() else ""
        if "Specified qdisc" in reason or "Unknown device type" in reason:
            hint = " The kernel lacks that module (sch_tbf, veth or bridge)."
        raise Unavailable(f"`{' '.join(command)}` failed: {reason}{hint}")


def enter(name: str) -> None:
    """Move this process, which must have one thread as yet, into a host's network.

    Args:
        name: of the namespace, :meth:`Network.name`.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    with open(NAMESPACES / name) as namespace:
        if libc.setns(namespace.fileno(), CLONE_NEWNET):  # os.setns is there from Python 3.12 on
            error = ctypes.get_errno()
            raise OSError(error, f"cannot enter {name}: {os.strerror(error)}")


def interface_bytes(text: str | None = None) -> tuple[int, int]:
    """Bytes that ``eth0`` of this process's network has sent and received, all protocols' headers included.

    Args:
        text: what ``/proc/net/dev`` says, if not this process's own.
    """
    text = Path("/proc/self/net/dev").read_text() if text is None else text
    columns = next(line.split(":")[1].split() for line in text.splitlines() if line.strip().startswith("eth0:"))
    return int(columns[8]), int(columns[0])
