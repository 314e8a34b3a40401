"""Pictures of topologies, with matplotlib."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_slowmo.topology.graphs import rounds, torus_sides
from lightning_slowmo.topology.topologies import make

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure


def draw(
    topology: Any, workers: int, *, steps: int | None = None, figure: Figure | SubFigure | None = None
) -> Figure | SubFigure:
    """Draws a topology, one panel a step.

    A line stands for messages both ways with equal weights, an arrow for a message one way; the wider, the larger the
    weight. Workers that sit a step out are pale.

    Args:
        topology: Anything that :func:`make` takes.
        workers: The world size.
        steps: How many steps to draw; by default one period, or three steps of a random topology.
        figure: The matplotlib figure or sub-figure to draw into; by default a new one.

    Returns:
        The figure. It is not shown, nor known to pyplot: ``draw("ring", 8).savefig("ring.png")``.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The topology does not connect that many workers.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("lightning_slowmo.topology.draw needs matplotlib: pip install matplotlib") from error

    topology = make(topology)
    schedule = topology.on(workers)
    steps = steps or schedule.period or 3
    busiest, mean = schedule.traffic
    side = max(2.2, 0.13 * workers)  # inches a panel
    figure = figure or Figure(figsize=(max(side * steps, 2.9), side + 0.7), layout="constrained")
    figure.suptitle(topology.name.replace("_", " "), fontsize=11, weight="bold")
    traffic = f"messages per worker and step: {mean:.3g}" + (f", at most {busiest}" if busiest > mean else "")
    figure.supxlabel(f"{traffic}\nspectral gap: {schedule.spectral_gap:.3g}", fontsize=8.5)
    places = _places(topology.name, workers)
    for step, axes in enumerate(figure.subplots(1, steps, squeeze=False)[0]):
        weights = schedule.weights(step)
        for receiver, sender in np.argwhere(weights):
            weight, back = weights[receiver, sender], weights[sender, receiver]
            mutual = math.isclose(weight, back)
            if receiver == sender or (mutual and receiver < sender):
                continue
            there, here = places[receiver], places[sender]
            # Bend where an arrow comes back, and where a third worker is on the line: the detour by it is no detour.
            detours = np.sort(abs(places - here) + abs(there - places) - abs(there - here))
            bend = 0.15 if back and not mutual else 0.25 if (detours[2:] < 0.01).any() else 0
            style: dict[str, Any] = {"arrowstyle": "-" if mutual else "-|>", "connectionstyle": f"arc3,rad={bend}"}
            style |= {"linewidth": 0.6 + 3 * weight, "shrinkA": 8, "shrinkB": 8, "color": "#5b7c99"}
            axes.annotate("", (there.real, there.imag), (here.real, here.imag), arrowprops=style)
        colours = np.where(weights.diagonal() < 1, "#d9822b", "#eccfae")
        axes.scatter(places.real, places.imag, s=190, c=colours, zorder=3, clip_on=False)
        for rank, place in enumerate(places):
            axes.text(place.real, place.imag, str(rank), size=8, color="white", ha="center", va="center_baseline")
        axes.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), aspect="equal")
        axes.set_title(f"step {step}" if steps > 1 else "", fontsize=9)
        axes.axis("off")
    return figure


def _places(name: str, workers: int) -> np.ndarray:
    """Where to draw the ranks, in the complex plane: on a circle, unless another form shows the graph better."""
    ranks = np.arange(workers)
    places = 1j * np.exp(-2j * np.pi * ranks / workers)  # clockwise from the top
    if name == "star":
        places = np.sign(ranks) * 1j * np.exp(-2j * np.pi * (ranks - 1) / max(workers - 1, 1))
    elif name == "torus":
        row, column = divmod(ranks, torus_sides(workers)[1])
        places = column - 1j * row
    elif name == "hypercube":  # two bits choose the corner of a square, the next two that of the square of squares
        bit = np.arange(rounds(workers))
        places = (ranks[:, None] >> bit & 1) @ (1j**bit * (0.5 + 0.3j) ** (bit // 2))
    low, high = (complex(end(places.real), end(places.imag)) for end in (np.min, np.max))
    return (places - (low + high) / 2) / (max((high - low).real, (high - low).imag) / 2 or 1)
