"""SparseLoCo: sparse pseudo-gradients of 2 bits with an error that decays, in place of an outer momentum.

Sarfi et al., "Communication Efficient LLM Pre-training with SparseLoCo", 2025, https://arxiv.org/abs/2508.15706. With x
the common point, D_i = x - x_i after the local steps of worker i, and Q of 2 bits on the largest of every chunk::

    e_i = beta e_i + D_i;    q_i = Q(TopK_chunk(e_i));    e_i = e_i - q_i;    x = x - eta mean_i q_i

``docs/algorithms/sparse_loco.md`` lists which details are choices of ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor
from torch.optim import Optimizer

from lightning_slowmo import traffic
from lightning_slowmo.algorithms.base import Algorithm, Running, check_compressor, check_period, check_rate
from lightning_slowmo.algorithms.local_sgd import RunningLocalSGD
from lightning_slowmo.algorithms.outer_loop import RunningOuterLoop, Scalars
from lightning_slowmo.algorithms.post_local import RunningPostLocal
from lightning_slowmo.algorithms.schedules import PostLocal, Schedule, check_sync_every, header, usual
from lightning_slowmo.arithmetic import subtract
from lightning_slowmo.averaging.gathered import GatheredAverager
from lightning_slowmo.communication.meeting import Round
from lightning_slowmo.communication.workers import Workers
from lightning_slowmo.compression import ChunkedTopK, Compressor
from lightning_slowmo.parameters import Layout


@dataclass(frozen=True)
class SparseLoCo(Algorithm):
    """Local steps, then an outer step along the mean of sparse, quantized differences; optimizers' buffers stay local.

    Args:
        sync_every: optimizer steps between outer steps, or a schedule, see :class:`~lightning_slowmo.LocalSGD`.
        outer_lr: eta.
        error_decay: beta, what is kept of the error from one outer step to the next, in [0, 1].
        compressor: Q(TopK_chunk(.)).
        seed: of the compressor's randomness, if it draws any.

    Raises:
        ValueError: if an argument is out of its range.

    Example::

        Trainer(strategy=SlowMoStrategy(SparseLoCo(sync_every=30)))
    """

    is_outer_loop = True

    sync_every: int | Schedule = 30
    outer_lr: float = 1.0
    error_decay: float = 0.95
    compressor: Compressor = field(default_factory=ChunkedTopK)
    seed: int = 0

    def __post_init__(self) -> None:
        check_sync_every(self.sync_every)
        check_rate("outer_lr", self.outer_lr)
        check_rate("error_decay", self.error_decay)
        if self.error_decay > 1:
            raise ValueError(f"error_decay must be a number in [0, 1], got {self.error_decay!r}.")
        check_compressor(self.compressor)
        check_period("seed", self.seed, least=0)

    def bind(self, optimizer: Optimizer, workers: Workers) -> Running:
        """Make the running state for one optimizer."""
        if isinstance(self.sync_every, PostLocal):
            return RunningPostLocal(self, self.sync_every, optimizer, workers)
        return RunningSparseLoCo(self, optimizer, workers)

    def syncs(self, layout: Layout, workers: int) -> list[traffic.Sync]:
        """Everybody's compressed differences, every ``sync_every`` steps."""
        mean = traffic.gathered_mean(layout, workers, self.compressor)
        return [traffic.together(usual(self.sync_every), header(self.sync_every, workers), mean)]

    def state_numel(self, layout: Layout, workers: int) -> float:
        """Anchor and error, and the room that every outer loop has for a momentum."""
        return 3 * layout.numel


def outer_step(
    anchor: Tensor, start: Tensor, total: Tensor, momentum: Tensor, *, share: float, outer_lr: float
) -> tuple[Tensor, Tensor]:
    """A step along the mean of what the workers told; no momentum.

    Args:
        anchor: x.
        start: x as the parameters could hold it.
        total: the mean of the workers as it was told, x - mean_i q_i.
        momentum: unused.
        share: what makes the mean of the total.
        outer_lr: eta.

    Returns:
        The new x, and the momentum as it was.
    """
    told = subtract(start, total, share, out=total)  # mean_i q_i
    return subtract(anchor, told, outer_lr, out=anchor), momentum  # x = x - eta mean_i q_i


class RunningSparseLoCo(RunningOuterLoop):
    """SparseLoCo at work. ``anchor`` is x."""

    rule = staticmethod(outer_step)

    def __init__(self, config: SparseLoCo, optimizer: Optimizer, workers: Workers) -> None:
        def make(layout: Layout) -> GatheredAverager:
            return GatheredAverager(layout, workers, config.compressor, config.error_decay, config.seed)

        base = RunningLocalSGD(config.sync_every, optimizer, workers, make)
        super().__init__(base, config.sync_every, "maintain", optimizer, workers)
        self.config = config

    def scalars(self, round: Round) -> list[Scalars]:
        """The outer learning rate."""
        return [{"outer_lr": self.config.outer_lr}] * len(self.optimizer.param_groups)
