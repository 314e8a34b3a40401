"""What arrives between two meetings: a SIGTERM, Ctrl-C, and checkpoints that a signal handler asks for.

A handler can interrupt anything: a collective, a forward pass whose values autograd needs later, another save. So it
only sets a flag; the header of the next meeting carries the flag to all workers, and they act together between two
batches.
"""

from __future__ import annotations

import inspect
import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning_slowmo import private
from lightning_slowmo.core import StrategyCore


class Signals:
    """Takes over a Trainer's SIGTERM and ``save_checkpoint`` for the length of a fit.

    Args:
        trainer: whose signals are taken over.
        core: takes the flags to the other workers.
        launcher: passes SIGTERM on to child processes; None if there are none.

    Attributes:
        wanted: path, and whether only weights are wanted, of the checkpoints that are to be written.
        interrupted: whether Ctrl-C came while this worker communicated, so that it has to be raised afterwards.
    """

    def __init__(self, trainer: Any, core: StrategyCore, launcher: Any) -> None:
        self.trainer = trainer
        self.core = core
        self.launcher = launcher
        self.wanted: list[tuple[str, bool]] = []
        self.interrupted = False
        self._busy = 0
        self._undo = [
            self._postpone_interrupts(),
            private.disable_sigterm_broadcast(trainer),  # the header carries the flag, once per meeting
            private.replace_sigterm_handler(trainer, self._on_sigterm),
            self._postpone_saves(),
        ]

    def give_back(self) -> None:
        """Leave the Trainer as it was."""
        while self._undo:
            self._undo.pop()()

    def save_wanted(self) -> None:
        """Write the checkpoints that were postponed; all workers write the same ones, whichever was asked."""
        self.core.running.save = False  # before looking what is wanted: a signal may come meanwhile
        wanted, self.wanted = self.wanted, []
        everyone = [json.loads(text) for text in self.core.everyone.gather_text(json.dumps(wanted))]
        for filepath, weights_only in next(filter(None, everyone), []):
            self.trainer.save_checkpoint(filepath, weights_only)

    @contextmanager
    def uninterrupted(self) -> Iterator[None]:
        """Let Ctrl-C wait until this worker has communicated, since others are in the middle of the same operation."""
        self._busy += 1
        try:
            yield
        finally:
            self._busy -= 1
        if self.interrupted and not self._busy:
            self.interrupted = False
            raise KeyboardInterrupt

    def _postpone_interrupts(self) -> Callable[[], None]:
        """Take Python's own handler of SIGINT over; a user's is left alone."""
        main = threading.current_thread() is threading.main_thread()
        if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            return lambda: None

        def handle(number: int, frame: Any) -> None:
            if self._busy and not self.interrupted:  # the second Ctrl-C does not wait
                self.interrupted = True
            else:
                signal.default_int_handler(number, frame)

        signal.signal(signal.SIGINT, handle)

        def give_back() -> None:
            if signal.getsignal(signal.SIGINT) is handle:  # Lightning ignores SIGINT while it shuts down
                signal.signal(signal.SIGINT, signal.default_int_handler)

        return give_back

    def _postpone_saves(self) -> Callable[[], None]:
        """Let a checkpoint that a handler asks for wait until all workers are between two batches."""
        save = self.trainer.save_checkpoint

        def save_or_postpone(filepath: Any, weights_only: bool | None = None, storage_options: Any = None) -> None:
            if self.core.training and in_signal_handler():
                self.wanted.append((str(filepath), bool(weights_only)))
                self.core.running.save = True
            else:
                save(filepath, weights_only, storage_options)

        self.trainer.save_checkpoint = save_or_postpone
        return lambda: delattr(self.trainer, "save_checkpoint")

    def _on_sigterm(self, signum: int, frame: Any) -> None:
        """Set the flag for the next meeting, and pass the signal on to child processes."""
        engine = self.core.running
        first = not engine.terminate
        engine.terminate = True
        if first and self.launcher is not None:
            self.launcher.kill(signal.Signals(signum))
        if self.core.everyone.alone:
            private.mark_sigterm_received(self.trainer)


def in_signal_handler() -> bool:
    """Whether a Python signal handler is being run."""
    codes = set()
    for handler in filter(callable, map(signal.getsignal, signal.valid_signals())):
        function = getattr(handler, "func", handler)  # of a functools.partial
        codes.add(getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None))
    frame = inspect.currentframe()
    while frame is not None and frame.f_code not in codes:
        frame = frame.f_back
    return frame is not None
