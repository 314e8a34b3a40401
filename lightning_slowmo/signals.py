"""What arrives between two meetings: a SIGTERM, and checkpoints that a signal handler asks for.

A handler interrupts anything: a collective, a forward pass whose values autograd remembers, another save. So it only
leaves word, the header of the next meeting carries it to all workers, and they act together between two batches.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from typing import Any

from lightning_slowmo.communication import Workers
from lightning_slowmo.engine import Engine


class Signals:
    """Takes a Trainer's signals for the length of a fit.

    Args:
        trainer: whose SIGTERM and ``save_checkpoint`` are taken over.
        engine: takes the word to the other workers.
        everyone: all processes.
        launcher: passes SIGTERM on to child processes; None if there are none.
        training: whether the workers meet at present.

    Attributes:
        wanted: path, and whether only weights are wanted, of the checkpoints that are to be written.
    """

    def __init__(
        self, trainer: Any, engine: Engine, everyone: Workers, launcher: Any, training: Callable[[], bool]
    ) -> None:
        self.trainer = trainer
        self.engine = engine
        self.everyone = everyone
        self.launcher = launcher
        self.training = training
        self.wanted: list[tuple[str, bool]] = []
        self._undo: list[Callable[[], None]] = []
        self._quiet_sigterm()
        self._postpone_saves()

    def give_back(self) -> None:
        """Leave the Trainer as it was."""
        while self._undo:
            self._undo.pop()()

    def save_wanted(self) -> None:
        """Write the checkpoints that were postponed; all workers write the same ones, whoever was asked."""
        self.engine.save = False  # before looking what is wanted: a signal may come meanwhile
        wanted, self.wanted = self.wanted, []
        everyone = [json.loads(text) for text in self.everyone.gather_text(json.dumps(wanted))]
        for filepath, weights_only in next(filter(None, everyone), []):
            self.trainer.save_checkpoint(filepath, weights_only)

    def _quiet_sigterm(self) -> None:
        """Keep Lightning from broadcasting its SIGTERM flag before every batch: the header carries the flag."""
        loop = self.trainer.fit_loop.epoch_loop
        if hasattr(type(loop), "_broadcast_sigterm_tensor"):  # Lightning >= 2.5.2
            loop._broadcast_sigterm_tensor = lambda: None
            self._undo.append(lambda: delattr(loop, "_broadcast_sigterm_tensor"))
        connector = self.trainer._signal_connector
        if hasattr(type(connector), "_sigterm_notifier_fn"):
            connector._sigterm_notifier_fn = self._on_sigterm
            self._undo.append(lambda: delattr(connector, "_sigterm_notifier_fn"))

    def _postpone_saves(self) -> None:
        """Let a checkpoint that a handler asks for wait until all workers are between two batches."""
        save = self.trainer.save_checkpoint

        def save_or_postpone(filepath: Any, weights_only: bool | None = None, storage_options: Any = None) -> None:
            if self.training() and in_signal_handler():
                self.wanted.append((str(filepath), bool(weights_only)))
                self.engine.save = True
            else:
                save(filepath, weights_only, storage_options)

        self.trainer.save_checkpoint = save_or_postpone
        self._undo.append(lambda: delattr(self.trainer, "save_checkpoint"))

    def _on_sigterm(self, signum: int, frame: Any) -> None:
        """Remember the signal for the next meeting, where all learn of it, and pass it on to child processes."""
        first = not self.engine.terminate
        self.engine.terminate = True
        if first and self.launcher is not None:
            self.launcher.kill(signal.Signals(signum))
        if self.everyone.alone:
            self.trainer._signal_connector.received_sigterm = True


def in_signal_handler() -> bool:
    """Whether a Python signal handler is being run."""
    codes = set()
    for handler in filter(callable, map(signal.getsignal, signal.valid_signals())):
        function = getattr(handler, "func", handler)  # of a functools.partial
        codes.add(getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None))
    frame = sys._getframe()
    while frame is not None and frame.f_code not in codes:
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None
