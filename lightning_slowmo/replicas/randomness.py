"""Random numbers of a worker among others in one process."""

from __future__ import annotations

import random
from copy import deepcopy
from ctypes import c_char
from typing import Any

import numpy
import torch


class Randomness:
    """The states of the random number generators, of one worker.

    Args:
        device: whose generator counts besides the CPU's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._numpy = NumpyRandomness()
        self._note_others()

    def note(self) -> None:
        """Take the present states."""
        self._numpy.note()
        self._note_others()

    def _note_others(self) -> None:
        self._python, self._cpu = random.getstate(), torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None

    def restore(self) -> None:
        """Let the generators go on from these states."""
        random.setstate(self._python)
        self._numpy.restore()
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)


MT19937_WORDS, PLACE_BYTES = 624, 4
TAIL_BYTES = 4 * 8 + PLACE_BYTES
"""The last words of NumPy's source of bits, which it makes anew all at once, and the place among them, which every draw
moves."""


class NumpyRandomness:
    """NumPy's global generator, of one worker: a source of bits of its own, which takes the place of another's.

    To read or to write the whole state takes longer than all else that workers exchange. Beside the bits there is only
    the second of two normal numbers that are drawn at a time; it is read where bits were drawn, and written if there
    is one.
    """

    def __init__(self) -> None:
        self._bits = deepcopy(numpy.random.get_bit_generator())  # type: ignore[attr-defined]  # the stubs lack it
        self._tail: Any = None  # with a source of bits of another kind than NumPy's own, it is always read
        if type(self._bits) is numpy.random.MT19937:
            start = self._bits.ctypes.state_address + 4 * MT19937_WORDS + PLACE_BYTES - TAIL_BYTES
            self._tail = (c_char * TAIL_BYTES).from_address(start)
        self._noted = self._drawn()
        self._second = self._present_second()

    def note(self) -> None:
        """Take the second normal number; the bits are this worker's own already."""
        drawn = self._drawn()
        if drawn is None or self._second[0] or drawn != self._noted:
            self._noted, self._second = drawn, self._present_second()

    def restore(self) -> None:
        """Let the global generator go on from here."""
        numpy.random.set_bit_generator(self._bits)  # type: ignore[attr-defined]
        if self._second[0]:
            state = numpy.random.get_state(legacy=False)  # noqa: NPY002  # what users' code and seed_everything use
            state["has_gauss"], state["gauss"] = self._second
            numpy.random.set_state(state)  # noqa: NPY002

    def _drawn(self) -> bytes | None:
        """What differs whenever bits were drawn; None if that cannot be seen."""
        return None if self._tail is None else self._tail.raw

    @staticmethod
    def _present_second() -> tuple[int, float]:
        state = numpy.random.get_state(legacy=False)  # noqa: NPY002
        return state["has_gauss"], state["gauss"]
