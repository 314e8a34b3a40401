"""Slow state in host memory, moved by a GPU: it comes up in pieces, is changed there, and goes down again.

Copies up, arithmetic, and copies down each have a stream, and two pieces are on the GPU at a time, so that one comes
while another goes. A sync then takes as long as the bus needs for anchor and momentum in one direction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PIECE_BYTES = 16 * 2**20
"""Bytes of one tensor's piece: 0.6 ms on a bus of 25 GB/s, long beside the 10 microseconds in which a copy begins."""


@dataclass
class _Slot:
    """Room for one piece of each tensor, and what marks that it has gone down."""

    room: list[Tensor]
    free: torch.cuda.Event | None = None


class Lift:
    """Brings pieces of tensors from host memory to a device and back.

    Args:
        device: where they are changed; a CPU is served with plain copies.
        piece_bytes: of one tensor's piece.
    """

    def __init__(self, device: torch.device, piece_bytes: int = PIECE_BYTES) -> None:
        self.device = device
        self.piece_bytes = piece_bytes
        on_gpu = device.type == "cuda"
        self._up = torch.cuda.Stream(device) if on_gpu else None
        self._down = torch.cuda.Stream(device) if on_gpu else None
        self._slots = [_Slot([]), _Slot([])]

    def change(self, tensors: Sequence[Tensor], change: Callable[[int, int, list[Tensor]], None]) -> None:
        """Change tensors in host memory on the device. The host goes on; :meth:`settle` waits for the new values.

        Args:
            tensors: flat, of equal lengths and dtypes; pinned, for a GPU.
            change: is called with the first and the last element but one of each piece, and with the pieces on the
                device, which it overwrites.
        """
        length = max(1, self.piece_bytes // tensors[0].element_size())
        for start in range(0, tensors[0].numel(), length):
            stop = min(start + length, tensors[0].numel())
            pieces = [tensor[start:stop] for tensor in tensors]
            slot = self._next_slot(pieces)
            here = [room[: stop - start] for room in slot.room]
            if self._up is None or self._down is None:
                self._copy(here, pieces)
                change(start, stop, here)
                self._copy(pieces, here)
                continue
            with torch.cuda.stream(self._up):
                if slot.free is not None:
                    self._up.wait_event(slot.free)
                self._copy(here, pieces)
            present = torch.cuda.current_stream(self.device)
            present.wait_stream(self._up)
            change(start, stop, here)
            self._down.wait_stream(present)
            with torch.cuda.stream(self._down):
                self._copy(pieces, here)
                slot.free = self._down.record_event()

    def begin(self) -> None:
        """Let what comes up from now on be what has gone down before."""
        if self._up is not None and self._down is not None:
            self._up.wait_stream(self._down)

    def settle(self) -> None:
        """Wait until host memory holds the new values."""
        if self._down is not None:
            self._down.synchronize()

    def _next_slot(self, pieces: Sequence[Tensor]) -> _Slot:
        slot = self._slots[0]
        self._slots.reverse()
        kinds = [(tensor.dtype, tensor.numel()) for tensor in pieces]
        fits = [
            (room.dtype, numel) for room, (_, numel) in zip(slot.room, kinds, strict=False) if room.numel() >= numel
        ]
        if fits != kinds:
            self.settle()
            slot.room = [torch.empty_like(tensor, device=self.device, pin_memory=False) for tensor in pieces]
            if self._up is not None:  # which must not write before the present stream has done with that memory
                self._up.wait_stream(torch.cuda.current_stream(self.device))
        return slot

    @staticmethod
    def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source, non_blocking=True)
