"""Many workers that share one model: what each has of its own, and the stage on which they take turns."""

from lightning_slowmo.replicas.host import free_bytes
from lightning_slowmo.replicas.memory import Memory, memory_of_worker
from lightning_slowmo.replicas.stage import Replica, Stage

__all__ = ["Memory", "Replica", "Stage", "free_bytes", "memory_of_worker"]
