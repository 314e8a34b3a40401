"""Loss and gradients of a batch as one CUDA graph: one launch in place of Python, autograd and hundreds of kernels.

A small network's step takes a GPU less time than it takes the host to ask for it. What a step launches is the same each
time, so it is captured once and replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Objective = Callable[[Tensor, Tensor], Tensor]
"""Images and labels to a loss."""

DEVICE = "cuda"

WARM_UP = 3
"""Steps before the capture, in which libraries choose their kernels and compilers compile."""


class CapturedObjective:
    """An objective of which loss and gradients come from a replay.

    It is captured anew when shapes, or the places of parameters and buffers, have changed. Gradients go to the
    parameters past autograd, whose thread takes the host longer than the replay; so hooks on them, such as DDP's, are
    not called.

    Args:
        objective: what to capture; its operations must be the same each time, and wait for nothing on the host.
        module: whose parameters get gradients, and whose buffers the objective changes. It keeps both.
    """

    def __init__(self, objective: Objective, module: nn.Module) -> None:
        self._objective, self._module = objective, module
        self._tensors: list[Tensor] = []
        self._capture: Capture | None = None
        self._made_for: Any = None

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch, for which :meth:`backward` takes the place of autograd.

        Raises:
            ValueError: if the batch is not on a GPU, or the objective is computed in float16, whose gradients vanish
                unless the loss is scaled before they are computed.
        """
        if images.device.type != DEVICE:
            raise ValueError(f"capture=True needs a GPU, and the batch is on {images.device}. Leave it out there.")
        if torch.is_autocast_enabled(DEVICE) and torch.get_autocast_dtype(DEVICE) is torch.float16:
            raise ValueError("capture=True does not scale losses. Use precision='bf16-mixed' in place of '16-mixed'.")
        self._tensors = self._tensors or [*self._module.parameters(), *self._module.buffers()]
        places = [(tensor.data_ptr(), tensor.requires_grad) for tensor in self._tensors]
        made_for = images.shape, images.dtype, labels.shape, places, torch.is_autocast_enabled(DEVICE)
        if self._capture is None or made_for != self._made_for:
            self._capture = None  # its memory goes first
            self._capture = Capture(self._objective, images, labels, self._module)
            self._made_for = made_for
        return self._capture.replay(images, labels)

    def backward(self, share: float = 1.0) -> None:
        """Give the parameters the gradients of the last batch's loss, or add them to those that they have.

        Args:
            share: of the loss in what is minimized: less than one where steps are accumulated.
        """
        assert self._capture is not None
        self._capture.hand_over(share)


class Capture:
    """One captured graph, with the memory that it reads and writes.

    Args:
        objective: images and labels to a loss.
        images: of a first batch.
        labels: of a first batch.
        module: whose parameters get gradients, and whose buffers warming up leaves as they are.
    """

    def __init__(self, objective: Objective, images: Tensor, labels: Tensor, module: nn.Module) -> None:
        self._images, self._labels = images.clone(), labels.clone()
        self._parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]

        def gradients() -> tuple[Tensor, tuple[Tensor, ...]]:
            dtype, enabled = torch.get_autocast_dtype(DEVICE), torch.is_autocast_enabled(DEVICE)
            # Casts of weights that autocast keeps would outlive the graph, in whose memory they lie.
            with torch.enable_grad(), torch.autocast(DEVICE, dtype=dtype, enabled=enabled, cache_enabled=False):
                loss = objective(self._images, self._labels)
            found = torch.autograd.grad(loss, self._parameters)
            return loss.detach(), tuple(map(_laid_out, found, self._parameters))

        before = [buffer.clone() for buffer in module.buffers()]
        beside, present = torch.cuda.Stream(images.device), torch.cuda.current_stream(images.device)
        beside.wait_stream(present)
        with torch.cuda.stream(beside):
            for _ in range(WARM_UP):
                gradients()
        present.wait_stream(beside)
        for buffer, values in zip(module.buffers(), before, strict=True):
            buffer.copy_(values)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._loss, self._gradients = gradients()

    def replay(self, images: Tensor, labels: Tensor) -> Tensor:
        """Compute loss and gradients of a batch, the gradients in the place of the last one's; returns the loss."""
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            if parameter.grad is gradient:  # still wanted, and about to be overwritten
                parameter.grad = gradient.clone()
        self._images.copy_(images)
        self._labels.copy_(labels)
        self._graph.replay()
        return self._loss.clone()

    def hand_over(self, share: float) -> None:
        """Give the parameters a share of their gradients, or add it to those that they have."""
        if share != 1:
            torch._foreach_mul_(self._gradients, share)
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad.add_(gradient)


def _laid_out(gradient: Tensor, parameter: Tensor) -> Tensor:
    """A gradient in the order of its parameter's memory, as autograd leaves it: fused optimizers rely on that."""
    return gradient if gradient.stride() == parameter.stride() else torch.empty_like(parameter).copy_(gradient)
