"""Copies of the parameters that an optimizer keeps and moves by itself: they must meet as the parameters do.

Schedule-free optimizers keep the iterate z, Lookahead its slow weights, mixed-precision optimizers float32 master
weights, ASGD an average. If only the parameters were averaged, each worker would go on from its own z, or even from
its own master weights, which undoes the sync.

An iterate is its parameter plus an offset. In a sync, it follows the parameter at that offset; and where the sync makes
the workers' parameters equal, the offsets are averaged too, so that the iterates become equal. (Without a slow update,
the result is the mean of the iterates.) Where parameters are merely mixed, as in gossip, or averaged later or in parts,
each worker keeps its own offset, as it keeps its own momentum.

Which entries are iterates follows from :mod:`~lightning_slowmo.algorithms.optimizer_state`, alike on all workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_slowmo.algorithms.optimizer_state import Key, holders_of_state, roles, states
from lightning_slowmo.averaging.mean import average_tensors
from lightning_slowmo.communication.workers import Workers


class Iterates:
    """The iterates in the state of one optimizer.

    Args:
        optimizer: the user's own.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def __bool__(self) -> bool:
        """Whether there are any, or will be once the optimizer has stepped."""
        return roles(self.optimizer).any("iterate")

    def __str__(self) -> str:
        """Which entries they are, to be compared between workers."""
        names = [name for *_, (_, name), _ in self._expected()]
        return ", ".join(f"{names.count(name)} of {name!r}" for name in dict.fromkeys(names)) or "none"

    def tensors(self) -> list[Tensor]:
        """The iterates that are there now."""
        return [iterate for iterate, _, present in self._pairs() if present]

    @contextmanager
    def following(self, workers: Workers) -> Iterator[Callable[[Sequence[float]], None]]:
        """Let the iterates follow their parameters, whatever becomes of these inside this context.

        Args:
            workers: who takes part.

        Yields:
            A function that averages the offsets over the workers, to be called on all of them with the weight of each,
            by rank. Without it, each worker keeps its own.
        """
        pairs = self._pairs()
        if not pairs:
            yield lambda weights: None
            return
        offsets, parameters = [offset for offset, *_ in pairs], [parameter for _, parameter, _ in pairs]
        own = [index for index, (*_, present) in enumerate(pairs) if present]
        here, there = [offsets[index] for index in own], [parameters[index] for index in own]
        with torch.no_grad():
            _add(here, there, -1)
            try:
                yield lambda weights: average_tensors(offsets, workers, weights)
            finally:
                _add(here, there, 1)

    def _expected(self) -> Iterator[tuple[Tensor, Key, torch.dtype]]:
        known = roles(self.optimizer)
        if not known.any("iterate"):
            return
        for index, group in enumerate(self.optimizer.param_groups):
            for parameter in group["params"]:
                for key, entry in (known.of(index, parameter) or {}).items():
                    if entry.role == "iterate" and entry.dtype is not None and parameter.requires_grad:
                        yield parameter, key, entry.dtype

    def _pairs(self) -> list[tuple[Tensor, Tensor, bool]]:
        """Each iterate with its parameter, and whether it is there already.

        An optimizer that has not stepped a parameter yet begins with a copy of it: an offset of zero.
        """
        pairs, holders = [], holders_of_state(self.optimizer)
        for parameter, (place, name), dtype in self._expected():
            state = dict(states(holders, parameter)).get(place, {})
            present = name in state
            iterate = state[name].detach() if present else torch.zeros_like(parameter, dtype=dtype)
            pairs.append((iterate, parameter.detach(), present))
        return pairs


def _add(tensors: list[Tensor], others: list[Tensor], alpha: int) -> None:
    for tensor, other in zip(tensors, others, strict=True):
        tensor.add_(other, alpha=alpha)
