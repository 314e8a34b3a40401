"""Local steps with slow momentum, gossip and compressed messages, behind one flag of PyTorch Lightning.

Importing this package registers its presets with every Lightning that is installed::

    import lightning as L
    import lightning_slowmo

    trainer = L.Trainer(strategy="slowmo", devices=4)
"""

from importlib.util import find_spec

from lightning_slowmo.__about__ import __version__
from lightning_slowmo.algorithms import (
    BMUF,
    DESLOC,
    QPRSGD,
    QSR,
    Algorithm,
    AllReduce,
    APMSqueeze,
    DiLoCo,
    Gossip,
    LocalSGD,
    NoLoCo,
    PostLocal,
    Ramp,
    SensedSGD,
    SketchedSGD,
    SlowMo,
    SparseLoCo,
    SQuARM,
    Stages,
    SyncReport,
    Threshold,
    suggest_consensus_step,
)
from lightning_slowmo.communication import SyncError, Workers
from lightning_slowmo.communication.in_process import together
from lightning_slowmo.engine import Engine
from lightning_slowmo.presets import PRESETS
from lightning_slowmo.qsdp import QSDP

if find_spec("lightning_fabric") or find_spec("lightning"):
    from lightning_slowmo.fabric import SlowMoFabricStrategy
if find_spec("pytorch_lightning"):
    from lightning_slowmo.pl import SimulatedStrategy, SlowMoModelParallelStrategy, SlowMoStrategy
if find_spec("lightning"):
    from lightning_slowmo.strategy import (  # type: ignore[assignment]
        SimulatedStrategy,
        SlowMoModelParallelStrategy,
        SlowMoStrategy,
    )

__all__ = [
    "BMUF",
    "DESLOC",
    "PRESETS",
    "QPRSGD",
    "QSDP",
    "QSR",
    "APMSqueeze",
    "Algorithm",
    "AllReduce",
    "DiLoCo",
    "Engine",
    "Gossip",
    "LocalSGD",
    "NoLoCo",
    "PostLocal",
    "Ramp",
    "SQuARM",
    "SensedSGD",
    "SimulatedStrategy",
    "SketchedSGD",
    "SlowMo",
    "SlowMoFabricStrategy",
    "SlowMoModelParallelStrategy",
    "SlowMoStrategy",
    "SparseLoCo",
    "Stages",
    "SyncError",
    "SyncReport",
    "Threshold",
    "Workers",
    "__version__",
    "suggest_consensus_step",
    "together",
]
