"""Where the processor's time in a sync goes, on the model of :mod:`benchmarks.slow_links`.

    python -m benchmarks.profile_syncs                                   # milliseconds per sync, by preset
    python -m benchmarks.profile_syncs --strategies squarm_sgd --top 15  # and the functions that take them

Times are those of the processor, so waiting for messages does not count, and other load disturbs little. "main thread"
is the thread that trains; the rest of "process" is gloo's threads and torch's.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import pstats
import time

import torch

from benchmarks.contenders import Setting, adapted
from benchmarks.processes import run
from benchmarks.slow_links import model_shapes
from lightning_slowmo import PRESETS, Engine, Workers

DEFAULT = ("slowmo", "sgp", "qprsgd", "squarm_sgd", "apmsqueeze")


def worker(rank: int, name: str, syncs: int, top: int) -> tuple[float, float, float, str]:
    """CPU milliseconds per sync of the main thread and of the process, collectives per sync, and a profile."""
    torch.manual_seed(0)
    model = [torch.nn.Parameter(torch.randn(shape)) for shape in model_shapes()]
    optimizer = torch.optim.Adam(model, lr=1e-3)
    workers = Workers.from_world()
    engine = Engine(adapted(PRESETS[name], Setting(warmup_steps=2)), [optimizer], workers)
    for parameter in model:
        parameter.grad = torch.randn(parameter.shape)
    profile = cProfile.Profile(time.thread_time)
    main = process = 0.0
    seen = messages = 0
    while seen < syncs + 3:
        engine.after_backward()
        optimizer.step()
        before, thread, whole = workers.traffic.copy(), time.thread_time(), time.process_time()
        counts = seen >= 3  # the first ones allocate, and warm up
        if counts and top:
            profile.enable()
        report = engine.after_step()
        profile.disable()
        if report is None:
            continue
        seen += 1
        if counts:
            main, process = main + time.thread_time() - thread, process + time.process_time() - whole
            used = workers.traffic - before
            messages += used.collectives + used.headers
    text = io.StringIO()
    if top:
        pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(top)
    return 1e3 * main / syncs, 1e3 * process / syncs, messages / syncs, text.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", choices=list(PRESETS), default=list(DEFAULT), metavar="PRESET")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--syncs", type=int, default=10)
    parser.add_argument("--top", type=int, default=0, help="functions to list")
    arguments = parser.parse_args()
    print("| | main thread, ms | process, ms | collectives |\n|---|---|---|---|")
    profiles = {}
    for name in arguments.strategies:
        main, process, messages, profiles[name] = run(
            arguments.workers, worker, name, arguments.syncs, arguments.top, limit=300
        )[0]
        print(f"| `{name}` | {main:.1f} | {process:.1f} | {messages:.0f} |", flush=True)
    for name, text in profiles.items():
        if text:
            print(f"\n{name}\n{text}")


if __name__ == "__main__":
    main()
