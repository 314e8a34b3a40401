"""Where the values of a parameter lie: its own memory, or its gradient's, as flat real numbers.

What a parameter *is* (a key of an optimizer's state, an entry of a list of names) and where its values *lie* are two
things. The parameter object is its identity; whatever reads or writes values asks a :data:`Storage` for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_slowmo.private import held

Storage = Callable[[Tensor], Tensor]
"""Gives the memory of a parameter's values: :func:`local`, or :func:`gradient` for those of its gradient."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which means and slow state of ``dtype`` parameters are computed: float32, or float64 for float64.

    Half-precision slow state would lose small outer steps: 1.0 - 0.001 is 1.0 in bfloat16.
    """
    return torch.promote_types(dtype, torch.float32)


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements of a tensor fill one contiguous piece of memory, in whatever order of dimensions."""
    if tensor.is_contiguous():  # most are, and the rest takes Python ten times as long
        return True
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda pair: pair[1]):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def flat_view(tensor: Tensor) -> Tensor:
    """A 1-D view of a dense tensor in the order of its memory (so ``channels_last`` needs no copy)."""
    values = tensor.detach()
    return values.view(-1) if values.is_contiguous() else values.as_strided((values.numel(),), (1,))


def as_real(tensor: Tensor) -> Tensor:
    """A complex tensor as the pairs of real numbers that it is, in a last dimension of 2; others as they are."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def dense(gradient: Tensor) -> Tensor:
    """A gradient of sparse layout in the dense one; others as they are."""
    return gradient if gradient.layout is torch.strided else gradient.to_dense()


def values_of(gradient: Tensor) -> Tensor:
    """The numbers in a gradient: those that are stored, if its layout is sparse."""
    return gradient if gradient.layout is torch.strided else gradient.coalesce().values()


def local(parameter: Tensor) -> Tensor:
    """The values of a parameter in this process: its own memory, without gradient; of a ``DTensor``, this shard's."""
    return as_real(held(parameter).detach())


def gradient(parameter: Tensor) -> Tensor:
    """The gradient of a parameter, dense and in the order of the parameter's memory; zeros if it has none.

    Workers that hold the same gradient in different orders would add up elements that do not belong together.
    """
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    elif parameter.grad.layout is not torch.strided or not _same_order(parameter, parameter.grad):
        parameter.grad = torch.empty_like(parameter).copy_(dense(parameter.grad))
    return local(parameter.grad)


def _same_order(parameter: Tensor, grad: Tensor) -> bool:
    """Whether a gradient lies in memory as ``zeros_like(parameter)`` would."""
    expected = parameter if is_dense(parameter) else torch.empty_like(parameter, device="meta")
    strides = zip(parameter.shape, expected.stride(), grad.stride(), strict=True)
    return all(size <= 1 or wanted == found for size, wanted, found in strides)


def adjoin(parameters: Sequence[Tensor]) -> bool:
    """Whether parameters lie one behind the other in the same memory, as those of simulated workers do."""
    end = None
    for parameter in parameters:
        values = local(parameter)
        start = values.data_ptr()
        if (end is not None and start != end) or not is_dense(values):
            return False
        end = start + values.numel() * values.element_size()
    return len({local(parameter).untyped_storage().data_ptr() for parameter in parameters}) == 1
