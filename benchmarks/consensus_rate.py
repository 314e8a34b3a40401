"""How fast workers agree under pure gossip: real processes against the prediction of the spectral gap.

    python -m benchmarks.consensus_rate                       # prints a table, draws docs/images/gossip_consensus.png

The learning rate is 0, so every optimizer step is a round of gossip and nothing else. The factor per step is measured
over whole periods, from when the slowest mode has taken over until the distance nears the precision of float64.
"""

from __future__ import annotations

import argparse
import functools
import math
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.processes import run
from lightning_slowmo import Engine, Gossip, Workers, topology

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "gossip_consensus.png"
STEPS = 36
SEEDS = 200


def algorithms(workers: int) -> dict[str, list[Gossip]]:
    """What is measured, several seeds of what is random; graphs that agree exactly have no rate to measure."""
    found = {}
    for name in topology.NAMES:
        if topology.make(name).supports(workers) and topology.make(name).on(workers).consensus_rate:
            random = name == "random_matching"
            seeds = range(SEEDS if random else 1)
            found[name] = [Gossip(topology.make(name, seed=seed) if random else name) for seed in seeds]
    return found


def gossip(rank: int, configs: dict[str, list[Gossip]], steps: int) -> dict[str, np.ndarray]:
    """The model of this worker after 0..steps rounds, by topology: an array of shape (seeds, steps + 1, elements)."""
    workers = Workers.from_world()
    found = {}
    for name, several in configs.items():
        rows = []
        for config in several:
            generator = torch.Generator().manual_seed(rank)
            model = torch.nn.Parameter(torch.zeros(200, dtype=torch.float64))
            engine = Engine(config, [torch.optim.SGD([model], lr=0.0)], workers)
            model.data.copy_(torch.randn(200, generator=generator, dtype=torch.float64))  # all began with equal models
            engine.units[0].moved()
            models = [model.detach().numpy().copy()]
            for _ in range(steps if len(several) == 1 else steps // 3):
                engine.after_step()
                models.append(model.detach().numpy().copy())
            rows.append(models)
        found[name] = np.array(rows)
    return found


def measured_rate(distance: np.ndarray, period: int | None) -> float:
    """The factor per step, over whole periods in the later half of what float64 resolves; if random, over all of it."""
    last = int(np.flatnonzero(distance > 1e-11)[-1])
    if period is None:
        return float(distance[last] ** (1 / last))
    periods = max(1, last // 2 // period)
    return float((distance[last] / distance[last - periods * period]) ** (1 / (periods * period)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    arguments = parser.parse_args()
    configs = algorithms(arguments.workers)
    by_rank = run(arguments.workers, functools.partial(gossip, configs=configs, steps=STEPS), limit=300)

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    print("| topology | predicted | measured | off by |\n|---|---|---|---|")
    for index, name in enumerate(configs):
        models = np.stack([found[name] for found in by_rank])
        distances = np.linalg.norm(models - models[:, :, :1].mean(axis=0), axis=(0, 3))
        distance = np.sqrt((distances**2).mean(axis=0))  # the rate of random matchings is that of the expected square
        distance /= distance[0]
        schedule = topology.make(name).on(arguments.workers)
        predicted, measured = schedule.consensus_rate, measured_rate(distance, schedule.period)
        print(f"| `{name}` | {predicted:.4f} | {measured:.4f} | {abs(math.log(measured / predicted)):.1%} |")
        steps = np.arange(len(distance))
        resolved = distance > 1e-11
        label = f"{name.replace('_', ' ')}: {predicted:.3f}, {measured:.3f}"
        axes.plot(steps[resolved], distance[resolved], "o", color=f"C{index}", markersize=3, label=label)
        anchor = np.flatnonzero(resolved)[-1]
        line = distance[anchor] * predicted ** (steps - float(anchor))
        axes.plot(steps[resolved], line[resolved], "-", color=f"C{index}", linewidth=1)
    axes.set(yscale="log", ylim=(1e-11, 3), xlim=(-0.5, STEPS), xlabel="step")
    axes.set_ylabel("distance from the mean, relative")
    axes.set_title(f"{arguments.workers} processes, pure gossip: measured (dots), predicted (lines)", fontsize=9)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    title = "factor per step,\npredicted and measured"
    figure.legend(loc="outside right upper", fontsize=8, title=title, title_fontsize=8, frameon=False)
    figure.savefig(arguments.picture, dpi=110)


if __name__ == "__main__":
    main()
