"""An outer rule, written for tensors, as a list of operations on one element that a kernel can run.

A rule is an ordinary function of tensors and numbers, made of ``torch.add``, ``torch.sub`` and ``torch.mul``. Here it
is called with :class:`Value` in place of tensors. Through ``__torch_function__``, torch hands each operation over to be
written down instead of computed, while branches on numbers are taken by Python as always. So the text of the rule that
runs on a CPU is also what the kernel runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

INPUTS = ("anchor", "start", "total", "momentum")
"""The tensors that a rule is given, in order; their values are numbers 0 to 3."""

Operation = tuple[bool, int, int]
"""Whether to add, and the two values that it takes: ``a + scale * b``, or without adding ``scale * a``."""


class Trace(NamedTuple):
    """What a rule does to each element.

    Attributes:
        operations: in order; number i makes value ``4 + i``.
        scales: the factor of each operation.
        results: which values are the new anchor and momentum.
    """

    operations: tuple[Operation, ...]
    scales: tuple[float, ...]
    results: tuple[int, int]


class Value:
    """Stands for a tensor while a rule is traced.

    Args:
        number: of the value.
        operations: where operations and their scales are written down.
    """

    def __init__(self, number: int, operations: list[tuple[Operation, float]]) -> None:
        self.number = number
        self.operations = operations

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Value:
        """Write one of torch's operations down."""
        name, (a, b) = func.__name__, (*args, None, None)[:2]
        alpha = (kwargs or {}).get("alpha", 1.0)
        if name in ("add", "sub") and isinstance(a, Value) and isinstance(b, Value):
            return a.then(True, b.number, alpha if name == "add" else -alpha)
        if name == "mul" and isinstance(a, Value) and isinstance(b, (int, float)):
            return a.then(False, a.number, b)
        raise TypeError(f"an outer rule is made of the operations in arithmetic.py, and {name} is none of them")

    def then(self, adds: bool, other: int, scale: float) -> Value:
        """The value that an operation on this one makes."""
        self.operations.append(((adds, self.number, other), float(scale)))
        return Value(len(INPUTS) + len(self.operations) - 1, self.operations)


def trace(rule: Callable[..., tuple[Any, Any]], scalars: Mapping[str, Any]) -> Trace:
    """Write down what a rule does.

    Args:
        rule: see :mod:`lightning_slowmo.algorithms.outer_loop`.
        scalars: its numbers, by name.

    Example:
        >>> import torch
        >>> def step(anchor, start, total, momentum, *, share):
        ...     return torch.sub(anchor, torch.sub(start, total, alpha=share)), momentum
        >>> trace(step, {"share": 0.5})
        Trace(operations=((True, 1, 2), (True, 0, 4)), scales=(-0.5, -1.0), results=(5, 3))
    """
    operations: list[tuple[Operation, float]] = []
    anchor, momentum = rule(*(Value(number, operations) for number in range(len(INPUTS))), **scalars)
    kinds, scales = zip(*operations, strict=True) if operations else ((), ())
    return Trace(kinds, scales, (anchor.number, momentum.number))
