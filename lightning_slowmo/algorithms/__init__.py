"""The algorithms, one paper family a file."""

from lightning_slowmo.algorithms.all_reduce import AllReduce
from lightning_slowmo.algorithms.base import Algorithm, Round, Running, SyncReport
from lightning_slowmo.algorithms.block_momentum import BMUF
from lightning_slowmo.algorithms.compressed_gossip import SQuARM, Threshold
from lightning_slowmo.algorithms.consensus_step import suggest_consensus_step
from lightning_slowmo.algorithms.des_loc import DESLOC
from lightning_slowmo.algorithms.diloco import DiLoCo
from lightning_slowmo.algorithms.gossip import Gossip
from lightning_slowmo.algorithms.local_sgd import LocalSGD
from lightning_slowmo.algorithms.noloco import NoLoCo
from lightning_slowmo.algorithms.quantized_averaging import QPRSGD
from lightning_slowmo.algorithms.ramp import Ramp
from lightning_slowmo.algorithms.schedules import QSR, PostLocal, Schedule, Stages
from lightning_slowmo.algorithms.sensed_sgd import SensedSGD
from lightning_slowmo.algorithms.sketched_sgd import SketchedSGD
from lightning_slowmo.algorithms.slow_momentum import SlowMo
from lightning_slowmo.algorithms.sparse_loco import SparseLoCo
from lightning_slowmo.algorithms.squeezed_adam import APMSqueeze

__all__ = [
    "BMUF",
    "DESLOC",
    "QPRSGD",
    "QSR",
    "APMSqueeze",
    "Algorithm",
    "AllReduce",
    "DiLoCo",
    "Gossip",
    "LocalSGD",
    "NoLoCo",
    "PostLocal",
    "Ramp",
    "Round",
    "Running",
    "SQuARM",
    "Schedule",
    "SensedSGD",
    "SketchedSGD",
    "SlowMo",
    "SparseLoCo",
    "Stages",
    "SyncReport",
    "Threshold",
    "suggest_consensus_step",
]
