"""Every preset on a GPU, over NCCL and over gloo with staged copies, against the same run on the CPU."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from lightning_slowmo import Algorithm, Engine, SyncError, Workers
from lightning_slowmo.algorithms import BMUF, APMSqueeze, DiLoCo, LocalSGD, SensedSGD, SketchedSGD, SlowMo
from lightning_slowmo.bucket_sizes import BucketSizes
from lightning_slowmo.presets import PRESETS
from tests.gpu.on_one_card import BOTH, join, run

pytestmark = pytest.mark.gpu

STEPS = 20
SHAPES = [(30, 7), (7,), (), (5, 4, 3), (200,)]
SMALL = BucketSizes(bucket_bytes=800, in_place_bytes=2**60, in_flight=2)
"""Several buckets of a small model, the same ones on both devices."""

DRAWS = {"qprsgd", "qprsgd_gossip", "sketched_sgd", "sensed_sgd"}
"""Presets whose compressors may draw other random numbers on a GPU than on a CPU."""

OPTIMIZERS: dict[type[Algorithm], Callable[..., torch.optim.Optimizer]] = {
    APMSqueeze: torch.optim.Adam,
    SketchedSGD: torch.optim.SGD,
    SensedSGD: torch.optim.SGD,
}
"""What an algorithm needs other than SGD with momentum."""

TIMEOUT = timedelta(seconds=15)


def often(algorithm: Algorithm) -> Algorithm:
    """The same algorithm with syncs every few steps."""
    period = getattr(algorithm, "sync_every", 1)
    return replace(algorithm, sync_every=4) if isinstance(period, int) and period > 4 else algorithm


CASES: dict[str, tuple[Algorithm, dict[str, Any]]] = {name: (often(it), {}) for name, it in PRESETS.items()}
CASES |= {
    "overlap": (SlowMo(sync_every=4, overlap=2), {}),
    "fragments": (SlowMo(sync_every=4, fragments=2), {}),
    "overlap and fragments": (DiLoCo(sync_every=4, fragments=2, overlap=1), {}),
    "average without outer step, overlap": (LocalSGD(4, overlap=3), {}),
    "sharded": (SlowMo(sync_every=4), {"shard_slow_state": True}),
    "offloaded": (SlowMo(sync_every=4), {"offload_slow_state": "cpu"}),
    "offloaded, overlap": (BMUF(sync_every=4, overlap=2), {"offload_slow_state": "cpu"}),
}


def train(
    workers: Workers, algorithm: Algorithm, placement: dict[str, Any], device: str, dtype: torch.dtype = torch.float64
) -> list[torch.Tensor]:
    """Parameters of this worker after some steps, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    own = [Parameter(value.to(device, dtype)) for value in values]
    targets = [torch.full_like(parameter, float(workers.rank)) for parameter in own]
    groups = [{"params": own[:2]}, {"params": own[2:], "lr": 0.05}]
    optimizer = OPTIMIZERS.get(type(algorithm), partial(torch.optim.SGD, momentum=0.5))(groups, lr=0.1)
    engine = Engine(algorithm, [optimizer], workers, **placement)
    for step in range(STEPS):
        for parameter, target in zip(own, targets, strict=True):
            difference = parameter.detach() - target
            parameter.grad = difference + 0.1 * torch.sin(3 * difference + step)
        engine.after_backward()
        optimizer.step()
        engine.after_step()
    return [parameter.detach().cpu() for parameter in own]


def compare(rank: int) -> dict[str, list[float]]:
    """For each case, the largest difference to the CPU's run, of NCCL and of gloo."""
    join()
    worlds = {
        "CPU": ("cpu", Workers.from_world(TIMEOUT, "cpu", BOTH)),
        "NCCL": ("cuda", Workers.from_world(TIMEOUT, "cuda", BOTH)),
        "gloo": ("cuda", Workers.from_world(TIMEOUT, "cuda", "gloo")),
    }
    differences: dict[str, list[float]] = {}
    for name, (algorithm, placement) in CASES.items():
        results = []
        for device, workers in worlds.values():
            workers.sizes = SMALL
            results.append(train(workers, algorithm, placement, device))
        cpu, *gpu = [torch.cat([tensor.flatten() for tensor in result]) for result in results]
        differences[name] = [float((other - cpu).abs().max()) for other in gpu]
    return differences


@pytest.mark.parametrize("size", [2, 3])
def test_every_preset_is_what_it_is_on_a_cpu(size):
    for rank, differences in enumerate(run(size, compare)):
        assert set(differences) == set(CASES)
        exact = {name: both for name, both in differences.items() if name not in DRAWS}
        assert {name: both for name, both in exact.items() if max(both) > 1e-9} == {}, rank
        assert {name: both for name, both in differences.items() if not max(both) < 1} == {}, rank


def half_precision(rank: int) -> list[bool]:
    join()
    workers = Workers.from_world(TIMEOUT, "cuda", BOTH)
    cpu = Workers.from_world(TIMEOUT, "cpu", BOTH)
    near = []
    for dtype, unit in ((torch.float32, 1e-5), (torch.bfloat16, 2**-5), (torch.float16, 2**-8)):
        for algorithm in (LocalSGD(4), SlowMo(sync_every=4), SlowMo(sync_every=4, overlap=2)):
            one, other = (train(where, algorithm, {}, kind, dtype) for where, kind in ((workers, "cuda"), (cpu, "cpu")))
            pairs = zip(one, other, strict=True)
            near.append(all(torch.allclose(a.double(), b.double(), rtol=unit, atol=unit) for a, b in pairs))
    return near


def test_other_precisions():
    for near in run(2, half_precision):
        assert near == [True] * 9


def lose_a_worker(rank: int, in_the_sum: bool) -> tuple[str, float]:
    """What the survivors hear when worker 1 is killed, before a meeting or between its header and the sum."""
    join()
    workers = Workers.from_world(TIMEOUT, "cuda", BOTH)
    parameter = Parameter(torch.ones(1000, device="cuda"))
    optimizer = torch.optim.SGD([parameter], 0.1)
    engine = Engine(LocalSGD(1), [optimizer], workers)
    engine.after_step()
    if rank == 1:
        if in_the_sum:
            engine.units[0].sync = lambda round: os.kill(os.getpid(), signal.SIGKILL)
            engine.after_step()
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    try:
        engine.after_step()
    except SyncError as error:
        return str(error), time.monotonic() - start
    return "nothing", time.monotonic() - start


@pytest.mark.parametrize("in_the_sum", [False, True])
def test_a_killed_worker_is_named_in_time(in_the_sum):
    first, died, third = run(3, lose_a_worker, in_the_sum, limit=60, expect_failure=True)
    assert died == f"died with exit code {-signal.SIGKILL}"
    for text, seconds in (first, third):
        assert "rank 1" in text
        assert seconds < TIMEOUT.total_seconds() + 10
