"""What a process of a sharded worker holds: parameters, anchor, slow momentum, the optimizer's state.

    python -m benchmarks.sharded_memory                                   # a GPT of 3 M parameters, on this CPU
    python -m benchmarks.sharded_memory --device cuda --layers 36 --width 1536 --vocabulary 32768 --sizes 2x1 2x2

``2x4`` is 2 workers of 4 FSDP2 shards each. Every layout takes a few steps of SlowMo over AdamW; what is counted are
the tensors themselves, of rank 0, which has the largest shards. On a GPU, all processes share the first one (NCCL over
sockets), and what the allocator has reached at most is reported too: it includes gradients, activations and the layers
that are gathered at a time.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
from torch.distributed.fsdp import fully_shard

from benchmarks.processes import run_trainers
from lightning_slowmo import SlowMo
from lightning_slowmo.sharded_core import ShardedCore
from lightning_slowmo.storage import local
from recipes.text.gpt import GPT

STEPS, SYNC_EVERY = 4, 2

ONE_CARD = {
    "NCCL_SOCKET_IFNAME": "lo",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_IB_DISABLE": "1",
    "NCCL_P2P_DISABLE": "1",
    "NCCL_SHM_DISABLE": "1",
}
"""NCCL takes several processes on one card if they seem to be on different hosts, see ``tests/gpu/on_one_card.py``."""


def mebibytes(tensors: Any) -> float:
    """What tensors take, of a DTensor this process's part."""
    return sum(part.numel() * part.element_size() for part in map(local, tensors)) / 2**20


def measure(rank: int, workers: int, shards: int, given: argparse.Namespace) -> dict[str, float]:
    """Train a few steps, and count. Runs in each of the processes."""
    device = torch.device(given.device)
    os.environ["NCCL_HOSTID"] = f"host{rank}"
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    core = ShardedCore(SlowMo(sync_every=SYNC_EVERY), workers, shards)
    core.make_groups(0, rank, device)
    assert core.mesh is not None
    torch.manual_seed(1)
    with torch.device("meta"):
        model = GPT(given.vocabulary, given.length, given.layers, given.width, given.heads)
    mesh = core.mesh["data_parallel"]
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh)
    model.to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            torch.nn.init.ones_(parameter) if parameter.dim() == 1 else local(parameter).normal_(std=0.02)
    core.start_equal(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    engine = core.make_engine([optimizer], model)
    for _ in range(STEPS):
        tokens = torch.randint(given.vocabulary, (given.batch, given.length + 1), device=device)
        logits = model(tokens[:, :-1])
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        engine.after_step()
    [unit] = engine.units
    found = {
        "parameters": mebibytes(model.parameters()),
        "anchor": mebibytes(unit.anchor),  # type: ignore[attr-defined]
        "slow momentum": mebibytes(unit.momentum),  # type: ignore[attr-defined]
        "optimizer": mebibytes(value for state in optimizer.state.values() for value in state.values()),
        "peak": torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else float("nan"),
        "all parameters": float(sum(parameter.numel() for parameter in model.parameters())),
    }
    engine.finish()
    return found


def main() -> None:
    """Measure each layout and print a table."""
    reader = argparse.ArgumentParser("python -m benchmarks.sharded_memory")
    reader.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    reader.add_argument("--sizes", nargs="+", default=["2x1", "2x2", "1x4"], help="workers x shards")
    for name, default in (
        ("layers", 4),
        ("width", 256),
        ("heads", 8),
        ("vocabulary", 256),
        ("length", 64),
        ("batch", 2),
    ):
        reader.add_argument(f"--{name}", type=int, default=default)
    reader.add_argument("--limit", type=float, default=300, help="seconds for one layout")
    given = reader.parse_args()
    columns = ["parameters", "anchor", "slow momentum", "optimizer", *(["peak"] if given.device == "cuda" else [])]
    print(f"| workers x shards | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for size in given.sizes:
        workers, shards = map(int, size.split("x"))
        environment = ONE_CARD if given.device == "cuda" else {}
        found = run_trainers(
            workers * shards, measure, workers, shards, given, environment=environment, limit=given.limit
        )
        print(f"| {workers} x {shards} | {' | '.join(f'{found[0][name]:.2f}' for name in columns)} |", flush=True)
    print(f"MiB per process, {found[0]['all parameters'] / 1e6:.4g} M parameters")


if __name__ == "__main__":
    main()
