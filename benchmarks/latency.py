"""Syncs over links with latency, beside what the plan predicts: ``python -m benchmarks.latency`` (Linux, root).

Every worker lives in a network namespace whose only interface is a TUN device. One process reads the packets of all,
holds them at the sender's rate and for the latency, drops those that would wait longer than a real queue lets them, and
writes them to the receiver. Kernels without ``netem`` can do that, too.

The table has a line for each latency, size of buckets and number in flight: seconds of an average of the parameters,
measured (the median of some) and predicted (:func:`lightning_slowmo.traffic.all_reduce`) from the rate that was made
and the latency that was measured, which has the work of sending and receiving in it.
"""

from __future__ import annotations

import argparse
import fcntl
import heapq
import multiprocessing
import os
import select
import statistics
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from benchmarks.network import NAMESPACES, address, enter

QUEUE_SECONDS = 0.2
"""How much traffic may wait at a link before packets are dropped."""

MTU = 9000
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000


def open_tun() -> int:
    """A TUN device ``eth0`` in the present network namespace."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", b"eth0", IFF_TUN | IFF_NO_PI))
    return device


def forward(names: list[str], rate: float, latency: float, ready: Any) -> None:
    """Carry packets between the namespaces until this process is ended.

    Args:
        names: of the namespaces, host by host.
        rate: of each link and direction, in bits per second.
        latency: seconds from one host to another.
        ready: is set when the devices are there.
    """
    with suppress(OSError):
        os.nice(-15)
    devices = []
    for host, name in enumerate(names):
        enter(name)
        devices.append(open_tun())
        for line in ("link set lo up", f"link set eth0 mtu {MTU} up", f"address add {address(host)}/16 dev eth0"):
            subprocess.run(["ip", *line.split()], check=True)
    ready.set()
    hosts = {bytes(map(int, address(host).split("."))): host for host in range(len(names))}
    up, down = [0.0] * len(names), [0.0] * len(names)
    waiting: list[tuple[float, int, int, bytes]] = []
    count = 0
    while True:
        now = time.perf_counter()
        while waiting and waiting[0][0] <= now:
            _, _, host, packet = heapq.heappop(waiting)
            with suppress(BlockingIOError):
                os.write(devices[host], packet)
        pause = max(0.0, waiting[0][0] - time.perf_counter()) if waiting else 1.0
        readable, _, _ = select.select(devices, [], [], pause)
        now = time.perf_counter()
        for device in readable:
            source = devices.index(device)
            for _ in range(64):
                try:
                    packet = os.read(device, 65536)
                except BlockingIOError:
                    break
                host = hosts.get(packet[16:20]) if packet[0] >> 4 == 4 else None
                takes = 8 * len(packet) / rate
                if host is None or up[source] - now > QUEUE_SECONDS:
                    continue
                up[source] = max(now, up[source]) + takes
                arrives = up[source] + latency
                if down[host] - arrives > QUEUE_SECONDS:
                    continue
                down[host] = max(arrives, down[host] + takes)
                heapq.heappush(waiting, (down[host], count, host, packet))
                count += 1


@contextmanager
def network(hosts: int, rate: float, latency: float) -> Iterator[list[str]]:
    """Namespaces with links between them; gives their names."""
    names = [f"slowlinks-{os.getpid()}-{host}" for host in range(hosts)]
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    for name in names:
        subprocess.run(["ip", "netns", "add", name], check=True)
    process = context.Process(target=forward, args=(names, rate, latency, ready), daemon=True)
    process.start()
    try:
        if not ready.wait(30):
            raise RuntimeError("The TUN devices could not be made: is there /dev/net/tun, and are you root?")
        yield names
    finally:
        process.terminate()
        process.join()
        for name in names:
            if (NAMESPACES / name).exists():
                subprocess.run(["ip", "netns", "delete", name], check=True)


def worker(
    rank: int, names: list[str], rate: float, cases: list[tuple[int, int]], numel: int, repeats: int, results: Any
) -> None:
    """Time averages of the parameters, for each size of buckets and number in flight."""
    enter(names[rank])
    with suppress(OSError):
        os.nice(-10)
    import torch
    import torch.distributed as dist

    from lightning_slowmo.averaging.mean import average
    from lightning_slowmo.bucket_sizes import BucketSizes
    from lightning_slowmo.communication import Workers
    from lightning_slowmo.communication.probe import Link, measure_link
    from lightning_slowmo.parameters import Layout
    from lightning_slowmo.plan import transfer_seconds
    from lightning_slowmo.scratch import Scratch
    from lightning_slowmo.traffic import all_reduce

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
    store = dist.TCPStore(address(0), 29500, len(names), rank == 0, timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=len(names), timeout=timedelta(seconds=300))
    workers = Workers.from_world(timedelta(seconds=300))
    link = Link(rate, measure_link(workers, repeats=2).latency)
    parameters = [torch.zeros(numel // 8) for _ in range(8)]
    found = []
    for bucket_bytes, in_flight in cases:
        layout = Layout([parameters], BucketSizes(bucket_bytes, in_flight=in_flight))
        times = []
        for _ in range(repeats + 1):
            workers.gather([0.0])
            start = time.perf_counter()
            average(layout.buckets, workers, Scratch(in_flight))
            times.append(max(row[0] for row in workers.gather([time.perf_counter() - start])))
        predicted = transfer_seconds(all_reduce(layout, len(names)), link)
        found.append((len(layout.buckets), statistics.median(times[1:]), predicted))
    if rank == 0:
        results.put((link, found))
    dist.destroy_process_group()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser("python -m benchmarks.latency", description=__doc__)
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--mbit", type=float, default=100)
    parser.add_argument("--latency-ms", type=float, nargs="+", default=[1, 10, 50])
    parser.add_argument("--numel", type=int, default=2**21)
    parser.add_argument("--bucket-kib", type=int, nargs="+", default=[256, 1024, 8192])
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 2, 3, 6])
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    cases = [(1024 * kib, depth) for kib in given.bucket_kib for depth in given.in_flight]
    context = multiprocessing.get_context("fork")
    print("| latency | bucket, KiB | in flight | buckets | measured, s | predicted, s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for latency in given.latency_ms:
        with network(given.hosts, 1e6 * given.mbit, latency / 1e3) as names:
            results = context.SimpleQueue()
            arguments = (names, 1e6 * given.mbit, cases, given.numel, given.repeats, results)
            processes = [context.Process(target=worker, args=(rank, *arguments)) for rank in range(given.hosts)]
            for process in processes:
                process.start()
            for process in processes:
                process.join()
            link, found = results.get()
        reached = f"{latency:g} ms made, {1e3 * link.latency:.1f} measured"
        for (size, depth), (buckets, seconds, predicted) in zip(cases, found, strict=True):
            cells = [reached, size // 1024, depth, buckets, f"{seconds:.2f}", f"{predicted:.2f}"]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
