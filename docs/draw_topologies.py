"""Draws the pictures of docs/topologies.md and prints its table: ``python docs/draw_topologies.py``."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from lightning_slowmo import topology

IMAGES = Path(__file__).parent / "images"


def table() -> str:
    """The weights, traffic and spectral gap of every topology that goes by a name, as Markdown."""
    sizes = (4, 8, 16, 36)
    head = ["topology", "weights", "period, n = 16", "messages, n = 16", *(f"gap, n = {n}" for n in sizes)]
    rows = [head, ["---"] * len(head)]
    for name in topology.NAMES:
        graph = topology.make(name)
        schedule = graph.on(16)
        weights = "doubly stochastic" if schedule.doubly_stochastic else "column-stochastic"
        busiest, mean = schedule.traffic
        messages = f"{mean:.3g}" + (f", at most {busiest}" if busiest > mean else "")
        gaps = [f"{graph.on(n).spectral_gap:.3f}" if graph.supports(n) else "–" for n in sizes]
        rows.append([f"`{name}`", weights, str(schedule.period or "random"), messages, *gaps])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def consensus_distance(schedule: topology.Schedule, steps: int) -> np.ndarray:
    """Pure gossip with push-sum from random models: their distance from the mean after 0..steps steps, relative."""
    models = np.random.default_rng(0).standard_normal((schedule.workers, 200))
    mean, push_sum = models.mean(axis=0), np.ones((schedule.workers, 1))
    distances = [np.linalg.norm(models - mean)]
    for step in range(steps):
        weights = schedule.weights(step)
        models, push_sum = weights @ models, weights @ push_sum
        distances.append(np.linalg.norm(models / push_sum - mean))
    return np.array(distances) / distances[0]


def draw_static() -> Figure:
    """The graphs that stay the same."""
    figure = Figure(figsize=(8.4, 6.4), layout="constrained")
    sizes = {"ring": 8, "star": 8, "exponential": 8, "torus": 16, "hypercube": 8, "complete": 8}
    for part, (name, workers) in zip(figure.subfigures(2, 3, hspace=0.05).flat, sizes.items(), strict=True):
        topology.draw(name, workers, figure=part)
    return figure


def draw_changing() -> Figure:
    """The graphs that change from step to step."""
    figure = Figure(figsize=(8.4, 9), layout="constrained")
    sizes = {"one_peer_exponential": 8, "bipartite_exponential": 8, "random_matching": 9}
    for part, (name, workers) in zip(figure.subfigures(3, 1, hspace=0.05), sizes.items(), strict=True):
        topology.draw(name, workers, steps=4, figure=part)
    return figure


def draw_consensus(workers: int = 12, steps: int = 36, settled: int = 24) -> Figure:
    """How fast gossip agrees: as predicted and as measured, by steps and by messages."""
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    by_step, by_message = figure.subplots(1, 2, sharey=True)
    for index, name in enumerate(name for name in topology.NAMES if name not in ("hypercube", "complete")):
        # The rate of random matchings is that of the expected square, so take the root mean square over many draws.
        seeds = range(200 if name == "random_matching" else 1)
        schedules = [topology.make(name, seed=seed).on(workers) for seed in seeds]
        squares = [consensus_distance(schedule, steps) ** 2 for schedule in schedules]
        distance, predicted = np.sqrt(np.mean(squares, axis=0)), schedules[0].consensus_rate
        measured = (distance[steps] / distance[settled]) ** (1 / (steps - settled))
        line = distance[settled] * predicted ** (np.arange(steps + 1.0) - settled)
        label = f"{name.replace('_', ' ')}: {predicted:.3f}, {measured:.3f}"
        style = {"color": f"C{index}", "markersize": 3, "linewidth": 1}
        by_step.plot(distance, "o", label=label, **style)
        by_step.plot(line, "-", **style)
        by_message.plot(np.arange(steps + 1) * schedules[0].traffic.max, distance, "o-", **style)
    by_step.set(
        yscale="log", ylim=(1e-6, 1.5), xlim=(-1, steps), xlabel="step", ylabel="distance from the mean, relative"
    )
    by_step.set_title(f"{workers} workers, pure gossip: measured (dots) and predicted (lines)", fontsize=9)
    by_message.set(xlim=(-1, 60), xlabel="messages sent by the busiest worker")
    by_message.set_title("the same measurements, by traffic", fontsize=9)
    title = "factor per step, predicted and measured"
    figure.legend(loc="outside lower center", ncols=3, fontsize=8.5, title=title, title_fontsize=8.5, frameon=False)
    for axes in (by_step, by_message):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    """Draws all pictures, prints the table."""
    for name, draw in {"static": draw_static, "changing": draw_changing, "consensus": draw_consensus}.items():
        draw().savefig(IMAGES / f"topologies_{name}.png", dpi=110)
    print(table())


if __name__ == "__main__":
    main()
