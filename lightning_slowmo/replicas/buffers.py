"""Buffers of a module that workers share: each worker's take the place of those of the one before."""

from __future__ import annotations

from operator import is_

import torch
from torch import Tensor
from torch.nn import Module

from lightning_slowmo.private import is_persistent
from lightning_slowmo.private.twins import buffers_of
from lightning_slowmo.replicas.crossing import Crossing, Landing
from lightning_slowmo.replicas.rows import Copying


class BuffersOnStage:
    """The buffers of the stage's module and of a worker's twin of it.

    Args:
        stage: the module on which training steps run.
        own: the worker's.
        static: whether values are copied, so that the stage's buffers keep their addresses; otherwise the stage's
            module gets the worker's tensors.
        landing: of the stage's buffers, if the worker's lie in the host's memory.
        devices: where the stage's buffers belong, and the worker's.
    """

    def __init__(
        self,
        stage: Module,
        own: Module,
        static: bool,
        landing: Landing | None = None,
        devices: tuple[torch.device | None, torch.device | None] = (None, None),
    ) -> None:
        self._static, self._landing = static, landing
        self._stages_device, self._own_device = devices
        self._pairs = [
            (other, mine, buffers_of(other), buffers_of(mine))
            for other, mine in zip(stage.modules(), own.modules(), strict=True)
        ]
        self._look()

    def put(self) -> None:
        """Let the stage have the worker's buffers."""
        if not self._static:
            for stage, own, theirs, mine in self._pairs:
                if len(mine) != len(theirs):
                    _register(own, stage)
                if mine:
                    theirs.update(mine)
        elif self._copying is not None and self._is_as_before():
            self._copying.back()
        else:
            for stage, own, _, _ in self._pairs:
                _copy(own, stage, self._stages_device)
            self._look()

    def take(self) -> None:
        """Let the worker have what has become of them."""
        if not self._static:
            for stage, own, theirs, mine in self._pairs:
                if len(mine) != len(theirs):
                    _register(stage, own)
                if theirs:
                    mine.update(theirs)
        elif self._copying is not None and self._is_as_before():
            self._copying.forth()
        else:
            for stage, own, _, _ in self._pairs:
                _copy(stage, own, self._own_device)
            self._look()

    def _present(self) -> tuple[list[Tensor | None], list[Tensor | None]]:
        theirs = [buffer for _, _, buffers, _ in self._pairs for buffer in buffers.values()]
        return theirs, [buffer for _, _, _, buffers in self._pairs for buffer in buffers.values()]

    def _look(self) -> None:
        """Note which tensors both have now, and whether they can be copied one to one."""
        self._known = theirs, mine = self._present()
        alike = all(list(others) == list(own) for _, _, others, own in self._pairs) and all(
            _shape(a) == _shape(b) for a, b in zip(theirs, mine, strict=True)
        )
        self._copying: Copying | Crossing | None = None
        if alike:
            places, kept = ([buffer for buffer in each if buffer is not None] for each in (theirs, mine))
            self._copying = Crossing(places, kept, self._landing) if self._landing else Copying(places, kept)

    def _is_as_before(self) -> bool:
        """Whether both have the tensors that they had: nothing was registered or bound anew."""
        return all(
            len(now) == len(known) and all(map(is_, now, known))
            for now, known in zip(self._present(), self._known, strict=True)
        )


def _shape(buffer: Tensor | None) -> torch.Size | None:
    return None if buffer is None else buffer.shape  # a loss without class weights, say, has a buffer that is None


def _register(source: Module, target: Module) -> None:
    """Register the buffers of one module that another does not have yet."""
    for key, buffer in buffers_of(source).items():
        if key not in buffers_of(target):
            target.register_buffer(key, buffer, is_persistent(source, key))


def _copy(source: Module, target: Module, device: torch.device | None) -> None:
    """Give a module the buffers of another, in its own memory where they fit into it, else on a device."""
    _register(source, target)
    theirs = buffers_of(target)
    for key, buffer in buffers_of(source).items():
        other = theirs[key]
        if buffer is not other and buffer is not None and other is not None and other.shape == buffer.shape:
            other.copy_(buffer)
        else:  # registered just now, or of another shape
            theirs[key] = None if buffer is None else buffer.to(device, copy=True)
