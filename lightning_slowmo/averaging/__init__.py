"""Means over the workers: exact, sharded, delayed or compressed, behind one interface."""

from lightning_slowmo.averaging.averager import Averager, OnSum
from lightning_slowmo.averaging.compressed import CompressedAverager
from lightning_slowmo.averaging.delayed import DelayedAverager
from lightning_slowmo.averaging.exact import Contributor, ExactAverager
from lightning_slowmo.averaging.mean import average_tensors
from lightning_slowmo.averaging.sharded import ShardedAverager

__all__ = [
    "Averager",
    "CompressedAverager",
    "Contributor",
    "DelayedAverager",
    "ExactAverager",
    "OnSum",
    "ShardedAverager",
    "average_tensors",
]
