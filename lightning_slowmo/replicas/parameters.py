"""Parameters that workers share: each worker's values and gradients take the place of those of the one before."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_slowmo.replicas.crossing import Crossing, sent
from lightning_slowmo.replicas.rows import Copying


class ParametersOnStage:
    """The stage's parameters, and a worker's twins of them.

    Args:
        stage: on which training steps run.
        own: the worker's.
        copying: copies the stage's values to the worker's, and back; None: the stage's are let point to the worker's.
            With a crossing, gradients cross too.
    """

    def __init__(self, stage: Sequence[Tensor], own: Sequence[Tensor], copying: Copying | Crossing | None) -> None:
        self._stage, self._own, self._copying = stage, own, copying
        self._crosses = isinstance(copying, Crossing)
        self._places = [parameter.data for parameter in (own if copying is None else stage)]
        self._addresses = [place.data_ptr() for place in self._places]

    def put(self) -> None:
        """Let the stage have the worker's values and gradients."""
        if self._copying is None:
            for parameter, place in zip(self._stage, self._places, strict=True):
                parameter.data = place
        else:
            self._copying.back()
        for parameter, twin in zip(self._stage, self._own, strict=True):
            gradient = twin.grad
            if gradient is not None:
                parameter.grad, twin.grad = sent(gradient, parameter.device) if self._crosses else gradient, None

    def take(self, drop_gradients: bool) -> None:
        """Let the worker have what has become of them.

        Args:
            drop_gradients: whether gradients have been used, and are not needed any more.
        """
        if [parameter.data_ptr() for parameter in self._stage] != self._addresses:  # an optimizer has bound some anew
            for parameter, place in zip(self._stage, self._places, strict=True):
                if parameter.data_ptr() != place.data_ptr():
                    place.copy_(parameter.data)
                    parameter.data = place
        if self._copying is not None:
            self._copying.forth()
        if not drop_gradients:
            for parameter, twin in zip(self._stage, self._own, strict=True):
                gradient = parameter.grad
                if gradient is not None and self._crosses:
                    twin.grad = sent(gradient, twin.device)
                elif gradient is not None:
                    # It may lie in the memory of a captured graph, which the next worker's replay needs.
                    twin.grad = gradient if self._copying is None else gradient.clone()
        for parameter in self._stage:
            parameter.grad = None
