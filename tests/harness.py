"""Worker processes for tests: those that the benchmarks start, see :mod:`benchmarks.processes`."""

from benchmarks.processes import LIMIT, WorkerFailed, free_port, run, run_trainers

__all__ = ["LIMIT", "WorkerFailed", "free_port", "run", "run_trainers"]
