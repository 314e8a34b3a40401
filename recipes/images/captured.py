"""Loss and gradients of a batch as one CUDA graph: one launch in place of Python, autograd and hundreds of kernels.

A small network's step takes a GPU less time than it takes the host to ask for it. What a step launches is the same each
time, so it is captured once and replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Objective = Callable[[Tensor, Tensor], Tensor]
"""Images and labels to a loss."""

WARM_UP = 3
"""Steps before the capture, in which libraries choose their kernels and compilers compile."""


class CapturedObjective:
    """An objective of which loss and gradients come from a replay, where it can be differentiated once per call.

    It is captured anew when shapes, or the places of parameters and buffers, have changed.

    Args:
        objective: what to capture; its operations must be the same each time, and wait for nothing on the host.
        module: whose parameters get gradients, and whose buffers the objective changes.
    """

    def __init__(self, objective: Objective, module: nn.Module) -> None:
        self._objective, self._module = objective, module
        self._capture: Capture | None = None
        self._made_for: Any = None

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch.

        Raises:
            ValueError: if the batch is not on a GPU, or the objective is computed in float16, whose gradients vanish
                unless the loss is scaled before they are computed.
        """
        if not images.is_cuda:
            raise ValueError(f"capture=True needs a GPU, and the batch is on {images.device}. Leave it out there.")
        if torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") is torch.float16:
            raise ValueError("capture=True does not scale losses. Use precision='bf16-mixed' in place of '16-mixed'.")
        parameters = [parameter for parameter in self._module.parameters() if parameter.requires_grad]
        places = [tensor.data_ptr() for tensor in (*parameters, *self._module.buffers())]
        made_for = images.shape, images.dtype, labels.shape, places, torch.is_autocast_enabled("cuda")
        if self._capture is None or made_for != self._made_for:
            self._capture = None  # its memory goes first
            self._capture = Capture(self._objective, images, labels, parameters, list(self._module.buffers()))
            self._made_for = made_for
        self._capture.replay(images, labels)
        return _Replayed.apply(self._capture, *parameters)


class Capture:
    """One captured graph, with the memory that it reads and writes.

    Args:
        objective: images and labels to a loss.
        images: of a first batch.
        labels: of a first batch.
        parameters: that get gradients.
        buffers: that the objective changes; warming up leaves them as they are.
    """

    def __init__(
        self,
        objective: Objective,
        images: Tensor,
        labels: Tensor,
        parameters: Sequence[Tensor],
        buffers: Sequence[Tensor],
    ) -> None:
        self._images, self._labels = images.clone(), labels.clone()
        self.replays = 0

        def gradients() -> tuple[Tensor, tuple[Tensor, ...]]:
            dtype, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
            # Casts of weights that autocast keeps would outlive the graph, in whose memory they lie.
            with torch.enable_grad(), torch.autocast("cuda", dtype=dtype, enabled=enabled, cache_enabled=False):
                loss = objective(self._images, self._labels)
            return loss.detach(), torch.autograd.grad(loss, parameters)

        before = [buffer.clone() for buffer in buffers]
        beside, present = torch.cuda.Stream(images.device), torch.cuda.current_stream(images.device)
        beside.wait_stream(present)
        with torch.cuda.stream(beside):
            for _ in range(WARM_UP):
                gradients()
        present.wait_stream(beside)
        for buffer, values in zip(buffers, before, strict=True):
            buffer.copy_(values)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.loss, self.gradients = gradients()

    def replay(self, images: Tensor, labels: Tensor) -> None:
        """Compute loss and gradients of a batch, in the place of the last one's."""
        self._images.copy_(images)
        self._labels.copy_(labels)
        self._graph.replay()
        self.replays += 1


class _Replayed(torch.autograd.Function):
    """Hands a replay's results to autograd."""

    @staticmethod
    def forward(ctx: Any, capture: Capture, *parameters: Tensor) -> Tensor:
        ctx.capture, ctx.replays = capture, capture.replays
        return capture.loss.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        capture = ctx.capture
        if capture.replays != ctx.replays:
            raise RuntimeError("With capture=True call backward on a batch's loss before the next batch is computed.")
        # Copies: what lies in the graph's memory is overwritten by the next replay.
        return None, *torch._foreach_mul(capture.gradients, outer[0])
