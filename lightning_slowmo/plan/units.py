"""Numbers with units, as the command line takes and prints them."""

from __future__ import annotations

import math
import re

TENSORS = 160
"""Parameters of a model of which only the size is known, all of one size; ResNet-50 has 161."""


def parse_bandwidth(text: str) -> float:
    """Bits per second from ``1gbit``, ``100mbit``, ``10Gbit/s``.

    Raises:
        ValueError: if it is anything else, or 0, or infinite.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)([kmgt]?)bit(?:/s)?", text.strip(), re.IGNORECASE)
    if match is None or not 0 < float(match[1]) < math.inf:
        raise ValueError(f"{text!r} is no bandwidth: write 100mbit, 1gbit or 10Gbit/s.")
    return float(match[1]) * 1000 ** " kmgt".index(match[2].lower() or " ")


def parse_seconds(text: str) -> float:
    """Seconds from ``0.2ms``, ``50us``, ``1s``, ``0``.

    Raises:
        ValueError: if it is anything else, or infinite. Only 0 needs no unit.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e-?\d+)?)(us|ms|s)?", text.strip())
    number = float(match[1]) if match else math.inf
    if match is None or number == math.inf or (number and not match[2]):
        raise ValueError(f"{text!r} is no duration: write 0.2ms, 50us, 1s or 0.")
    return number * {"us": 1e-6, "ms": 1e-3, "s": 1.0}[match[2] or "s"]


def parse_count(text: str) -> float:
    """A number of parameters from ``25.6e6``, ``25.6M``, ``1.5B``, ``25557032``.

    Raises:
        ValueError: if it is anything else, or less than 1, or infinite.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)([KMB]?)", text.strip(), re.IGNORECASE)
    number = float(match[1]) * {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9}[match[2].lower()] if match else 0.0
    if not 1 <= number < math.inf:
        raise ValueError(f"{text!r} is no number of parameters: write 25.6e6, 25.6M or 1.5B.")
    return number


def parse_bits(text: str) -> tuple[int | None, int | None]:
    """Bits of weights and of gradients from ``8/8``, ``8/4``, ``none/8``; None for full precision.

    Raises:
        ValueError: if it is anything else.
    """
    match = re.fullmatch(r"(\d+|none)/(\d+|none)", text.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} are no bits of weights and gradients: write 8/8, 8/4 or none/8.")
    weights, gradients = (None if bits.lower() == "none" else int(bits) for bits in match.groups())
    return weights, gradients


def shapes_of(params: float) -> list[tuple[int, ...]]:
    """Shapes of a model of which only the size is known: :data:`TENSORS` matrices, as nearly square as may be."""
    each = max(1, round(params / TENSORS))
    side = max(1, round(math.sqrt(each)))
    count = max(1, round(params / (side * side)))
    return [(side, side)] * count
