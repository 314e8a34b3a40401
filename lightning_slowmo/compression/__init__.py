"""Compressors: a flat float vector becomes a small ``uint8`` payload of a size known beforehand, and back.

Tensors and numbers only; processes and networks are other modules' business.
"""

from lightning_slowmo.compression.base import Compressor, compute_dtype
from lightning_slowmo.compression.bins import Bins
from lightning_slowmo.compression.grid import ShiftedGrid
from lightning_slowmo.compression.hashing import seeded_generator
from lightning_slowmo.compression.quantize import QSGD, Cast, Identity
from lightning_slowmo.compression.segments import slice_segments
from lightning_slowmo.compression.sensing import Recovery, Sensing
from lightning_slowmo.compression.sign import Sign
from lightning_slowmo.compression.sketch import CountSketch
from lightning_slowmo.compression.sparsify import ChunkedTopK, RandomK, SignTopK, TopK

__all__ = [
    "QSGD",
    "Bins",
    "Cast",
    "ChunkedTopK",
    "Compressor",
    "CountSketch",
    "Identity",
    "RandomK",
    "Recovery",
    "Sensing",
    "ShiftedGrid",
    "Sign",
    "SignTopK",
    "TopK",
    "compute_dtype",
    "seeded_generator",
    "slice_segments",
]
