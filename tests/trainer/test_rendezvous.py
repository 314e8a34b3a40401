"""Where processes listen: nothing is open to other machines when all workers are on one."""

import os
import socket
import sys
from pathlib import Path

import pytest

from lightning_slowmo.rendezvous import listen_at
from tests.harness import free_port, run_trainers
from tests.on_workers import TIMEOUT
from tests.trainer.models import Regression, data, trainer

LISTEN = "0A"
"""State of a socket that listens, in ``/proc/net/tcp``."""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def listening() -> set[str]:
    """Local addresses at which this process listens: four bytes in hexadecimal, or sixteen."""
    links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    own = {link.removeprefix("socket:[").removesuffix("]") for link in links if link.startswith("socket:[")}
    rows = [row.split() for kind in ("tcp", "tcp6") for row in Path("/proc/net", kind).read_text().splitlines()[1:]]
    return {row[1].split(":")[0] for row in rows if row[3] == LISTEN and row[9] in own}


class Look(Regression):
    def on_train_start(self):
        self.addresses = listening()


def fit(rank):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    module = Look()
    trainer(2, "slowmo", max_epochs=1).fit(module, data(rank))
    return module.addresses


@pytest.mark.processes
def test_workers_of_one_machine_listen_on_loopback_alone():
    loopback = socket.inet_aton("127.0.0.1")[::-1].hex().upper()
    assert run_trainers(2, fit) == [{loopback}] * 2


@pytest.mark.parametrize(
    ("address", "loopback"),
    [("a-name.example", True), ("127.0.0.1", False), ("192.0.2.1", True), ("2001:db8::1", True)],
)
def test_names_and_addresses_of_other_machines_are_left_to_torch(address, loopback):
    assert listen_at(address, free_port(), loopback, TIMEOUT) is None


def test_a_port_in_use_is_left_to_torch_which_says_so():
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert listen_at("127.0.0.1", server.getsockname()[1], True, TIMEOUT) is None
