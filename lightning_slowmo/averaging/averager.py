"""What every average of parameters over the workers is, and what an outer step does to it on the way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_slowmo.communication.meeting import Round
from lightning_slowmo.communication.workers import Workers
from lightning_slowmo.parameters import Block, Layout
from lightning_slowmo.pieces import Pieces
from lightning_slowmo.scratch import Scratch
from lightning_slowmo.shards import as_saved, own_part

OnSum = Callable[[Block, Tensor, float], None]
"""Called with each block of parameters, the sum over the workers and the sum of their weights, as soon as the sum has
come (while the cache holds it). It overwrites the sum with the new values of the parameters; without it, they become
the mean, ``sum / weight``."""


class Averager(ABC):
    """Replaces the parameters of a layout by their mean over the workers, or by what an outer step makes of it.

    Args:
        layout: the parameters.
        workers: all of whom must call the same methods together.

    Attributes:
        scratch: memory for buckets that are under way.
        fragment: index of the layout's fragment that the next average is of; 0 if there is one fragment.
    """

    def __init__(self, layout: Layout, workers: Workers) -> None:
        self.layout = layout
        self.workers = workers
        self.scratch = Scratch(layout.sizes.in_flight)
        self.fragment = 0

    @abstractmethod
    def average(self, round: Round, on_sum: OnSum | None = None) -> float:
        """Average the parameters: line 6 of SlowMo's Algorithm 1.

        Workers weigh as many steps as they took since the last sync, which is equal in all but uneven inputs.

        Args:
            round: the circumstances.
            on_sum: makes the new values of the parameters from the sum; None: they become the mean.

        Returns:
            The drift: distance of this worker from the mean before, relative to the norm of the mean.
        """

    @abstractmethod
    def consensus(self, round: Round) -> None:
        """Overwrite the parameters with the model that is evaluated and saved, and change nothing else."""

    def agrees(self, round: Round) -> bool:
        """Whether :meth:`average` makes all parameters equal on all workers, and at once."""
        return True

    def after_step(self) -> bool:
        """Take note of an optimizer step.

        Returns:
            Whether an average has been under way for long enough and is to be taken in now, see :meth:`land`.
        """
        return False

    def land(self) -> None:
        """Take in the average that is under way, if there is one."""

    def drain(self) -> None:
        """Wait for the messages that are still under way; all workers have sent theirs."""

    def finish(self, round: Round) -> None:
        """End with the consensus for good: whoever trains on starts from it."""
        self.consensus(round)

    def adopt_layout(self, layout: Layout) -> None:
        """Take over a new layout, and carry along what is kept of parameters that are in both."""
        self.layout = layout

    def sharded(self) -> Averager:
        """The same average, in which each worker works on a share of the parameters.

        Raises:
            ValueError: if this average cannot be divided so.
        """
        raise ValueError(
            "shard_slow_state needs an outer loop that averages over LocalSGD or AllReduce, all parameters at once and "
            "without overlap or a compressor: gossip has no common state to share out."
        )

    def cut(self, buffers: list[Tensor]) -> list[Tensor]:
        """What this worker keeps of slow state in the whole layout: all of it, or its share in new memory."""
        return buffers

    def saved(self, kept: list[Tensor]) -> list[Tensor | Pieces]:
        """Slow state as it is saved, for each parameter and in its shape: all of it, or this worker's pieces."""
        return list(map(as_saved, self.layout.parameters, self.layout.per_parameter(kept)))

    def load(self, kept: list[Tensor], saved: Sequence[Tensor | Pieces], what: str) -> None:
        """Copy saved slow state into what this worker keeps.

        Args:
            kept: what :meth:`cut` gave it.
            saved: for each parameter, the whole or pieces of it.
            what: its name, for messages.

        Raises:
            ValueError: if it does not fit the parameters.
        """
        if len(saved) == len(self.layout.parameters):
            saved = list(map(own_part, self.layout.parameters, saved))
        copy_state(self.layout.per_parameter(kept), saved, what)

    def share_reference(self, anchor: list[Tensor]) -> None:
        """Use an outer loop's anchor as the common point that all workers know, if one is needed."""

    # State ------------------------------------------------------------------------------------------------------------

    def shared_state(self) -> dict[str, Any]:
        """State that is equal on all workers: tensors and plain values only."""
        return {}

    def local_state(self) -> dict[str, Any]:
        """State that differs between workers: tensors and plain values only."""
        return {}

    def load_shared_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`shared_state` returned; also with another number of workers.

        Raises:
            ValueError: if it was saved with another number of fragments.
        """
        check_fragments(state, self.layout.fragments)

    def load_local_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`local_state` returned on this worker.

        Raises:
            ValueError: if an average was under way that this one does not know.
        """
        if state.get("in_flight"):
            raise ValueError(
                "The checkpoint was saved while an average was on its way. Resume with the same overlap, or load the "
                "weights alone."
            )


def check_fragments(state: dict[str, Any], fragments: int) -> None:
    """Raise ValueError if a checkpoint's parameters were averaged in another number of fragments."""
    saved = state.get("fragments", 1)
    if saved != fragments:
        raise ValueError(
            f"The checkpoint was saved with fragments={saved}, and this is fragments={fragments}. Resume with the same "
            "fragments, or load the weights alone."
        )


def copy_state(targets: Sequence[Tensor], sources: Sequence[Tensor | Pieces], what: str) -> None:
    """Copy checkpointed tensors into place.

    Raises:
        ValueError: if their number, shapes or dtypes do not fit the present model.
    """
    require_fit([(target.shape, target.dtype) for target in targets], sources, what)
    with torch.no_grad():
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source.whole() if isinstance(source, Pieces) else source)


def require_fit(
    kinds: Sequence[tuple[Sequence[int], torch.dtype]], sources: Sequence[Tensor | Pieces], what: str
) -> None:
    """Raise ValueError unless checkpointed tensors have these shapes and dtypes."""
    found = [(tuple(source.shape), source.dtype) for source in sources]
    if found != [(tuple(shape), dtype) for shape, dtype in kinds]:
        raise ValueError(f"The checkpoint's {what} does not fit the parameters of the optimizer; is it the same model?")
