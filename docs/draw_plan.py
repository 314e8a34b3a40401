"""Draws the pictures of docs/plan.md, all of them predictions: ``python docs/draw_plan.py``."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_slowmo import PRESETS
from lightning_slowmo.communication.probe import Link
from lightning_slowmo.plan import DDP, predict, shapes_of

IMAGES = Path(__file__).parent / "images"

SHAPES = shapes_of(25.6e6)
STEP = 0.17
LATENCY = 2e-4
WAYS = {
    "ddp": DDP(),
    **{name: PRESETS[name] for name in ("slowmo", "diloco", "sgp", "osgp", "qprsgd", "squarm_sgd", "apmsqueeze")},
}
COLOURS = ("#000000", "#D55E00", "#009E73", "#0072B2", "#56B4E9", "#CC79A7", "#E69F00", "#7F7F7F")
"""Okabe and Ito's, which colour-blind readers can tell apart, without yellow and with grey."""

LINES = dict(zip(WAYS, COLOURS, strict=True))
RATES = {"10 Mbit/s": 1e7, "100 Mbit/s": 1e8, "1 Gbit/s": 1e9, "10 Gbit/s": 1e10, "100 Gbit/s": 1e11}
SIZES = np.unique(np.round(np.geomspace(2, 10_000, 16)).astype(int))


def ratio(way: object, workers: int, bandwidth: float) -> float:
    """Step time in units of the computation."""
    return predict(way, SHAPES, workers, STEP, Link(bandwidth, LATENCY)).step / STEP


def finish(axis: Axes, title: str) -> None:
    """What all panels have in common."""
    axis.set(xscale="log", yscale="log", title=title)
    axis.title.set_fontsize(9)
    axis.grid(alpha=0.3)
    axis.axhline(1, color="black", linewidth=0.6)


def add_legend(figure: Figure) -> None:
    """Below the panels, where it hides no line."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False)


def draw_workers() -> Figure:
    """How a step grows with the number of workers, on three links."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for axis, name in zip(axes, ("100 Mbit/s", "1 Gbit/s", "10 Gbit/s"), strict=True):
        for label, way in WAYS.items():
            curve = [ratio(way, int(workers), RATES[name]) for workers in SIZES]
            axis.plot(SIZES, curve, color=LINES[label], label=label, linewidth=2.4 if label == "ddp" else 1.5)
        finish(axis, name)
        axis.set_xlabel("workers")
    axes[0].set_ylabel("step time ÷ computation")
    add_legend(figure)
    figure.suptitle(
        f"Predicted: 25.6 million parameters, {1e3 * STEP:.0f} ms of computation, {1e3 * LATENCY} ms a message"
    )
    return figure


def draw_bandwidth() -> Figure:
    """How a step shrinks with the bandwidth, for three numbers of workers."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    rates = np.geomspace(1e7, 1e11, 17)
    for axis, workers in zip(axes, (4, 32, 1000), strict=True):
        for label, way in WAYS.items():
            curve = [ratio(way, workers, rate) for rate in rates]
            axis.plot(rates, curve, color=LINES[label], label=label, linewidth=2.4 if label == "ddp" else 1.5)
        finish(axis, f"{workers} workers")
        axis.set_xticks(list(RATES.values()), list(RATES), fontsize=7)
        axis.set_xlabel("bandwidth of each worker")
    axes[0].set_ylabel("step time ÷ computation")
    add_legend(figure)
    figure.suptitle(
        f"Predicted: 25.6 million parameters, {1e3 * STEP:.0f} ms of computation, {1e3 * LATENCY} ms a message"
    )
    return figure


if __name__ == "__main__":
    for name, figure in (("workers", draw_workers()), ("bandwidth", draw_bandwidth())):
        figure.savefig(IMAGES / f"plan_{name}.png", dpi=120)
