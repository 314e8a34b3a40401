"""What is measured on the machines at hand: a step, a compressor, a sync's own work."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Module

from lightning_slowmo.algorithms import SlowMo
from lightning_slowmo.communication import Workers
from lightning_slowmo.compression import Compressor, seeded_generator
from lightning_slowmo.engine import Engine
from lightning_slowmo.plan.model import Costs


def measure_costs(compressor: Compressor, numel: int = 2**20, repeats: int = 5) -> Costs:
    """Seconds per element of a compressor on this processor, the median of some repeats."""
    flat = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    generator = seeded_generator(0, 0)
    times: list[tuple[float, float]] = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        payload = compressor.compress(flat, None, generator)
        middle = time.perf_counter()
        compressor.decompress(payload, (numel,))
        times.append((middle - start, time.perf_counter() - middle))
    compress, decompress = (statistics.median(column) / numel for column in zip(*times[1:], strict=True))
    return Costs(compress, decompress)


def measure_handling(numel: int = 2**21, repeats: int = 5) -> float:
    """Seconds per element of a slow update on this processor, all but the messages: the median of some repeats."""
    parameters = [torch.nn.Parameter(torch.zeros(numel // 8)) for _ in range(8)]
    engine = Engine(SlowMo(sync_every=1), [torch.optim.SGD(parameters, lr=0.1)], Workers())
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        engine.after_step()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) / numel


def measure_step(step: Callable[[], Any], workers: Workers, repeats: int = 10) -> float:
    """Seconds of a training step, the mean over workers that all take it at once; the same on all of them."""
    times = []
    for repeat in range(repeats + 2):
        workers.gather([0.0], "the beginning of a measured step")
        start = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if repeat >= 2:  # the first ones allocate
            times.append(time.perf_counter() - start)
    everyone = workers.gather([statistics.median(times)], "a measured step")
    return statistics.mean(row[0] for row in everyone)


def synthetic(params: float, batch: int = 32) -> tuple[Module, Callable[[], Any]]:
    """A stack of square dense layers of about so many parameters, and a training step of it."""
    width = max(8, min(1024, int(math.sqrt(params))))
    layers = [torch.nn.Linear(width, width) for _ in range(max(1, round(params / (width * width + width))))]
    model = torch.nn.Sequential(*(module for layer in layers for module in (layer, torch.nn.ReLU())))
    optimizer, inputs = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9), torch.randn(batch, width)

    def step() -> None:
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()

    return model, step
