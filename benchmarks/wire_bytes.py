"""Bytes of one sync: as predicted from lengths alone, as counted by the package, and as the network interface saw them.

    sudo python -m benchmarks.wire_bytes        # in a network namespace of its own

Predicted are the payloads and the headers of the meetings; the interface adds TCP's own and gloo's, about half a
kilobyte a message. All workers talk over the loopback of the namespace, where nobody else does. Exits with an error
unless predicted and counted are equal, and the interface within 3 %.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.overlap import on_the_interface
from benchmarks.processes import run
from lightning_slowmo import QPRSGD, Algorithm, APMSqueeze, Engine, LocalSGD, SlowMo, SQuARM, Workers
from lightning_slowmo.communication.compressed import mean_bytes
from lightning_slowmo.communication.meeting import Header, Reason
from lightning_slowmo.compression import QSGD, Compressor, Sign, SignTopK, TopK
from lightning_slowmo.parameters import Layout

THREE_BITS = QSGD(bits=3, norm="max", bucket=512)
HEADER = 8 * len(Header(Reason.SYNC, pending=(1,)).numbers())
FLAG = 8


def exact(size: int, layout: Layout) -> float:
    """A ring all-reduce of float32."""
    return 2 * (size - 1) / size * 4 * layout.numel


def mean(compressor: Compressor, size: int, layout: Layout) -> float:
    """A compressed mean, on average over the workers."""
    ranks = range(size)
    return sum(mean_bytes(compressor, b.segments, b.dtype, size, r) for b in layout.buckets for r in ranks) / size


def gossip(compressor: Compressor, size: int, layout: Layout) -> float:
    """A message to each of two neighbours on a ring."""
    return min(2, size - 1) * sum(compressor.payload_bytes(bucket.segments, bucket.dtype) for bucket in layout.buckets)


VARIANTS: dict[str, tuple[Algorithm, Callable[[int, Layout], float], int]] = {
    "Local SGD": (LocalSGD(1), exact, 0),
    "QPRSGD, ring, 3 bits": (QPRSGD(1, THREE_BITS), partial(mean, THREE_BITS), 0),
    "QPRSGD, two shots, 3 bits": (QPRSGD(1, THREE_BITS, "two_shot"), partial(mean, THREE_BITS), 0),
    "QPRSGD, gossip, 3 bits": (QPRSGD(1, THREE_BITS, "gossip"), partial(gossip, THREE_BITS), 0),
    "SlowMo, top 1 %": (SlowMo(sync_every=1, compressor=TopK(0.01)), partial(mean, TopK(0.01)), 0),
    "SQuARM, signs of the top 1 %": (SQuARM("ring", 1), partial(gossip, SignTopK(0.01)), FLAG),
    "APMSqueeze, signs": (APMSqueeze(1), partial(mean, Sign("l2")), FLAG),
}
"""Each algorithm, what it is predicted to send in a sync, and the bytes that it tells each other worker beside."""


def worker(rank: int, width: int, depth: int, syncs: int) -> dict[str, tuple[float, float, float]]:
    """Bytes of one sync: predicted and counted for this worker, and on the interface for all."""
    everyone = Workers.from_world()
    generator = torch.Generator().manual_seed(rank)
    results = {}
    for name, (algorithm, predict, flag) in VARIANTS.items():
        shapes = [(width, width), (width,)] * depth
        parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
        kind = torch.optim.Adam if isinstance(algorithm, APMSqueeze) else torch.optim.SGD
        engine = Engine(algorithm, [kind(parameters, lr=1e-3)], everyone)

        def step(engine: Engine = engine, parameters: list = parameters) -> None:
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            engine.after_backward()
            engine.before_step()
            engine.units[0].optimizer.step()
            engine.after_step()

        for _ in range(2):  # APMSqueeze's warm-up, and connections
            step()
        everyone.gather([0.0])
        time.sleep(0.5)  # until the link is quiet
        counted, interface = everyone.traffic.sent, on_the_interface()
        everyone.gather([0.0])
        for _ in range(syncs):
            step()
        sent = everyone.traffic.sent - counted
        everyone.gather([0.0])
        time.sleep(0.5)
        passed = on_the_interface() - interface
        everyone.gather([0.0])
        predicted = predict(everyone.size, engine.units[0].layout) + (everyone.size - 1) * (HEADER + flag)
        results[name] = predicted, sent / syncs, passed / syncs
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--width", type=int, default=2896, help="of the model's square matrices")
    parser.add_argument("--depth", type=int, default=4, help="how many there are, each with a bias")
    parser.add_argument("--syncs", type=int, default=3)
    arguments = parser.parse_args()
    if "WIRE_NAMESPACE" not in os.environ:
        command = ["unshare", "--net", sys.executable, "-m", "benchmarks.wire_bytes", *sys.argv[1:]]
        sys.exit(subprocess.run(command, env=os.environ | {"WIRE_NAMESPACE": "1"}).returncode)

    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    # A receiver that waits for its turn on a busy CPU acknowledges late, and is sent everything again to be sure.
    Path("/proc/sys/net/ipv4/tcp_early_retrans").write_text("0")
    by_rank = run(arguments.workers, worker, arguments.width, arguments.depth, arguments.syncs, limit=1500)
    numel = arguments.depth * arguments.width * (arguments.width + 1)
    print(f"{arguments.workers} workers, {numel / 1e6:.1f} M parameters; MB a sync and worker\n")
    print("| | predicted | counted | at the interface | less than Local SGD |\n|---|---|---|---|---|")
    differ = []
    for name in VARIANTS:
        rows = [results[name] for results in by_rank]
        predicted, counted = (sum(column) / len(rows) for column in list(zip(*rows, strict=True))[:2])
        interface = rows[0][2] / len(rows)
        full = exact(len(rows), Layout([[torch.empty(numel)]]))
        values = " | ".join(f"{value / 1e6:.4f}" for value in (predicted, counted, interface))
        print(f"| {name} | {values} | {max(0, 1 - predicted / full):.1%} |")
        if abs(counted / predicted - 1) > 1e-4 or abs(interface / predicted - 1) > 0.03:
            differ.append(name)
    if differ:
        sys.exit(f"Not as predicted: {', '.join(differ)}.")


if __name__ == "__main__":
    main()
