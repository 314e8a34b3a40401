"""How much of a message's time overlap hides, on a link where a message takes as long as a step's computation.

    sudo python -m benchmarks.overlap         # in a network namespace of its own, its loopback slowed down by tc

All workers' messages share the one slow link, and headers queue behind models there. Steps without communication, with
gossip and with SlowMo, each with and without overlap, alternate within one run. SlowMo's all-reduce takes 2(n - 1)/n
times as long as a message of gossip, once in ten steps. Computation is a sleep, as on an accelerator: the CPU is free
to move messages. The best of the repeats counts, since other load can only add. The bytes are compared with what the
network interface counted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.processes import run
from lightning_slowmo import Engine, Gossip, LocalSGD, SlowMo, Workers

VARIANTS = {
    "none": LocalSGD(sync_every=10**9),
    "sgp": Gossip(),
    "osgp": Gossip(overlap=1),
    "slowmo": SlowMo(sync_every=10),
    "slowmo(overlap=3)": SlowMo(sync_every=10, overlap=3),
    "slowmo(overlap=1, fragments=5)": SlowMo(sync_every=10, overlap=1, fragments=5),
}

HIDES = {"osgp": "sgp", "slowmo(overlap=3)": "slowmo", "slowmo(overlap=1, fragments=5)": "slowmo"}
"""What waits for the communication that is hidden here."""


def on_the_interface() -> int:
    """Bytes that the loopback of this network namespace has transmitted."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def worker(rank: int, numel: int, compute: float, steps: int, repeats: int) -> dict[str, list[tuple[float, int, int]]]:
    """Seconds per step, bytes by this worker's count, and bytes on the interface by all, of each repeat."""
    everyone = Workers.from_world()
    engines, results = {}, {}
    for name, algorithm in VARIANTS.items():
        model = [torch.nn.Parameter(torch.ones(numel // 10)) for _ in range(10)]
        engines[name] = Engine(algorithm, [torch.optim.SGD(model, lr=0.0)], everyone)
        results[name] = []
        for _ in range(5):  # what SlowMo sends is then taken in within the same run of whole periods
            engines[name].after_step()
    for repeat in range(repeats + 1):
        for name, engine in engines.items():
            for unit in engine.units:
                unit.averager.drain()
            everyone.gather([0.0])
            time.sleep(0.3)  # until the link is quiet
            everyone.gather([0.0])
            start, counted, interface = time.perf_counter(), everyone.traffic.sent, on_the_interface()
            for _ in range(steps):
                time.sleep(compute)
                engine.after_step()
            seconds = (time.perf_counter() - start) / steps
            for unit in engine.units:
                unit.averager.drain()
            everyone.gather([0.0])
            passed = on_the_interface() - interface
            if repeat:  # the first is a warm-up
                results[name].append((seconds, (everyone.traffic.sent - counted) // steps, passed // steps))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--numel", type=int, default=2**20, help="parameters of the model, float32")
    parser.add_argument("--compute", type=float, default=0.2, help="seconds of a step, and of its messages on the link")
    parser.add_argument("--steps", type=int, default=20, help="a multiple of 10, in which SlowMo has whole periods")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.steps < 10 or arguments.steps % 10:
        parser.error(f"--steps must be a multiple of 10, the period of SlowMo's rows; got {arguments.steps}")
    if "OVERLAP_NAMESPACE" not in os.environ:
        command = ["unshare", "--net", sys.executable, "-m", "benchmarks.overlap", *sys.argv[1:]]
        sys.exit(subprocess.run(command, env=os.environ | {"OVERLAP_NAMESPACE": "1"}).returncode)

    rate = int(arguments.workers * arguments.numel * 4 * 8 / arguments.compute)
    for line in ("ip link set lo up", "ip link set lo mtu 9000"):
        subprocess.run(line.split(), check=True)
    subprocess.run(f"tc qdisc add dev lo root tbf rate {rate}bit burst 256kb limit 64mb".split(), check=True)
    by_rank = run(
        arguments.workers, worker, arguments.numel, arguments.compute, arguments.steps, arguments.repeats, limit=400
    )
    seconds = {name: min(row[0] for row in rows) for name, rows in by_rank[0].items()}
    print(f"{arguments.workers} workers, {4 * arguments.numel / 1e6:.1f} MB a model, link {rate / 1e6:.0f} Mbit/s")
    print("| | ms per step | MB sent per worker and step | at the interface |\n|---|---|---|---|")
    for name, rows in by_rank[0].items():
        interface = statistics.median(row[2] for row in rows) / arguments.workers
        print(f"| {name} | {seconds[name] * 1e3:.0f} | {rows[0][1] / 1e6:.3f} | {interface / 1e6:.3f} |")
    for name, waiting in HIDES.items():
        hidden = (seconds[waiting] - seconds[name]) / (seconds[waiting] - seconds["none"])
        print(f"{name} hides {hidden:.0%} of the communication that {waiting} waits for.")


if __name__ == "__main__":
    main()
