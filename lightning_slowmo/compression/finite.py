"""The promise that no payload carries a NaN or an infinity, kept without making a GPU wait."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_slowmo.compression import kernels

if TYPE_CHECKING:
    from lightning_slowmo.compression.base import Compressor


class FiniteCheck:
    """Asks, for one vector that is compressed, whether it and what was computed from it is finite.

    On a CPU the answer comes at once. A GPU notes it down, and is asked once, when all its work is under way.
    """

    def __init__(self) -> None:
        self._questions: list[str] = []
        self._flags: list[Tensor] = []

    def require(self, values: Tensor, compressor: Compressor, what: str = "input") -> None:
        """Raise ValueError, now or in :meth:`close`, when ``values`` holds a NaN or an infinity; reads them once."""
        if not values.numel():
            return
        question = f"{compressor}: {what} is not finite (NaN, infinity, or overflow); a payload cannot carry that"
        if kernels.available(values):
            from lightning_slowmo.compression.kernels.finite import find_infinite

            self._flags.append(torch.zeros(1, dtype=torch.int32, device=values.device))
            self._questions.append(question)
            find_infinite(values, self._flags[-1])
        elif not torch.isfinite(torch.stack(torch.aminmax(values))).all():
            raise ValueError(question)

    def close(self) -> None:
        """Wait for the answers that are not known yet.

        Raises:
            ValueError: with the first question whose answer is no.
        """
        if not self._flags:
            return
        flags = self._flags[0] if len(self._flags) == 1 else torch.cat(self._flags)
        for question, flag in zip(self._questions, flags.tolist(), strict=True):
            if flag:
                raise ValueError(question)
