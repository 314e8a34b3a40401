"""Runs functions on real worker processes that talk over gloo, and never waits for ever: for benchmarks and tests.

``run(4, check, argument)`` calls ``check(rank, argument)`` in four fresh processes with ``torch.distributed``
initialised, and returns their results by rank. The processes are forked from a server that has torch loaded already,
so starting them takes a fraction of a second. A process that is still alive after the limit is an error, and every
rank's stack is printed.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

LIMIT = 180.0
"""Seconds after which the processes of one call must have ended: many, as a busy machine is not a hang."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["benchmarks.preload"])


class WorkerFailed(AssertionError):
    """Some worker raised, died or did not end; the message has what every rank had to say."""


def free_port() -> int:
    """A TCP port on loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(
    size: int, function: Callable, *arguments: Any, limit: float = LIMIT, expect_failure: bool = False
) -> list[Any]:
    """Call ``function(rank, *arguments)`` on ``size`` gloo workers.

    Args:
        size: number of processes.
        function: a module-level function.
        arguments: picklable.
        limit: seconds.
        expect_failure: return the text of exceptions instead of raising.

    Returns:
        The results by rank; with ``expect_failure``, ``"Type: message"`` for ranks that raised.
    """
    return _run(size, _with_gloo, function, arguments, {}, limit, expect_failure)


def run_trainers(
    size: int,
    function: Callable,
    *arguments: Any,
    environment: Mapping[str, str] | None = None,
    limit: float = LIMIT,
    expect_failure: bool = False,
    meanwhile: Callable[[list], None] | None = None,
) -> list[Any]:
    """Call ``function(rank, *arguments)`` on ``size`` processes as torchrun would start them, for Trainers.

    Use ``Trainer(accelerator="cpu", devices=size)``: Lightning finds ranks and rendezvous in the environment.
    ``meanwhile(processes)`` is called while they run; it may kill some.
    """
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    variables |= {"LOCAL_WORLD_SIZE": str(size), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    variables |= dict(environment or {})
    return _run(size, _plain, function, arguments, variables, limit, expect_failure, meanwhile)


def _run(
    size: int,
    call: Callable,
    function: Callable,
    arguments: tuple,
    environment: Mapping[str, str],
    limit: float,
    expect_failure: bool,
    meanwhile: Callable[[list], None] | None = None,
) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        pipes = [_context.Pipe(duplex=False) for _ in range(size)]
        processes = [
            _context.Process(
                target=_worker,
                args=(call, function, rank, size, arguments, dict(environment), folder, limit, pipes[rank][1]),
                daemon=True,
            )
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        for _, sender in pipes:
            sender.close()
        if meanwhile is not None:
            meanwhile(processes)
        outcomes = _collect(processes, [receiver for receiver, _ in pipes], limit, folder)
    if not expect_failure and any(failed for failed, _ in outcomes):
        texts = [f"--- rank {rank}\n{text}" for rank, (failed, text) in enumerate(outcomes) if failed]
        raise WorkerFailed("\n".join(texts))
    return [value for _, value in outcomes]


def _collect(processes: list, receivers: list, limit: float, folder: str) -> list[tuple[bool, Any]]:
    deadline = time.monotonic() + limit
    outcomes: list[tuple[bool, Any]] = []
    late = False
    for process, receiver in zip(processes, receivers, strict=True):
        if receiver.poll(max(0.0, deadline - time.monotonic())):
            try:
                outcomes.append(pickle.loads(receiver.recv_bytes()))
            except EOFError:
                process.join(5)
                outcomes.append((True, f"died with exit code {process.exitcode}"))
        else:
            late = True
            outcomes.append((True, "no result"))
        process.join(max(0.1, min(10.0, deadline - time.monotonic())))
        late |= process.is_alive()
    if late:
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGUSR2)  # faulthandler writes the stacks
        time.sleep(0.5)
        for process in processes:
            process.kill()
        stacks = [f"--- rank {i}: {outcomes[i]}\n{Path(folder, str(i)).read_text()}" for i in range(len(processes))]
        raise WorkerFailed(f"Still alive after {limit} s:\n" + "\n".join(stacks))
    return outcomes


def _worker(
    call: Callable,
    function: Callable,
    rank: int,
    size: int,
    arguments: tuple,
    environment: dict[str, str],
    folder: str,
    limit: float,
    sender: Any,
) -> None:
    with open(Path(folder, str(rank)), "w") as stacks:
        faulthandler.register(signal.SIGUSR2, stacks, all_threads=True)
        signal.alarm(int(limit) + 30)  # the last resort, should the parent die
        if environment:
            os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
        import torch

        torch.set_num_threads(1)
        try:
            outcome = (False, call(function, rank, size, arguments, folder))
        except BaseException as error:
            outcome = (True, f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
        sender.send_bytes(pickle.dumps(outcome))  # by value: tensors are not shared with a process that ends
        sender.close()


def _with_gloo(function: Callable, rank: int, size: int, arguments: tuple, folder: str) -> Any:
    import torch.distributed as dist

    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=20))
    try:
        dist.barrier()  # a function that ends at once must not close connections that others are still making
        return function(rank, *arguments)
    finally:
        dist.destroy_process_group()


def _plain(function: Callable, rank: int, size: int, arguments: tuple, folder: str) -> Any:
    import torch.distributed as dist

    try:
        return function(rank, *arguments)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
