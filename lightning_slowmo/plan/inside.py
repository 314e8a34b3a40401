"""What the shards of one worker send one another: FSDP2's messages, as they are or quantized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_slowmo.qsdp import QSDP

GATHERS = 2
"""How often ``fully_shard`` gathers weights in a step: for the forward and for the backward pass."""


@dataclass(frozen=True)
class Inside:
    """Bytes that one shard sends to the others of its worker in a step with one backward pass.

    Attributes:
        gathered: of weights.
        reduced: of gradients.
    """

    gathered: int
    reduced: int

    @property
    def sent(self) -> int:
        """Of both."""
        return self.gathered + self.reduced


def inside(shapes: Sequence[Sequence[int]], shards: int, qsdp: QSDP | None = None, gathers: int = GATHERS) -> Inside:
    """What FSDP2 sends inside a worker.

    Args:
        shapes: of the parameters, float32.
        shards: between which they are cut.
        qsdp: how messages are quantized; None: they are not.
        gathers: how often weights are gathered in a step; 1 with ``reshard_after_forward=False``.

    Raises:
        ValueError: if there are fewer than two shards, which send nothing.

    Example:
        >>> inside([(1024, 1024)], shards=2)
        Inside(gathered=4194304, reduced=2097152)
    """
    if shards < 2:
        raise ValueError(f"Nothing is sent inside a worker of {shards} shard, so there is nothing to quantize.")
    weights, gradients = (qsdp or QSDP(None, None)).bytes_sent(shapes, shards)
    return Inside(gathers * weights, gradients)
