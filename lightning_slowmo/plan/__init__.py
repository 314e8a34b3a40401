"""How long a step would take on your links, before you train: every preset beside DDP, from a simple model.

    python -m lightning_slowmo.plan --params 25.6e6 --step-ms 170 --workers 32 --bandwidth 1gbit --latency 0.2ms
    torchrun --nproc-per-node 4 -m lightning_slowmo.plan --measure --params 25.6e6

The model is the usual one of a latency and a bandwidth. With T the step of one worker alone, alpha the latency of a
message and beta the bandwidth, a communication of m messages, one after the other, and B bytes takes ::

    t = m alpha + B / beta + compression + handling

where m and B are what the algorithm's configuration says, see :mod:`lightning_slowmo.traffic`; a ring all-reduce of P
bytes over n workers, for example, has m = 2 (n - 1) and B = 2 (n - 1) / n P. An algorithm that communicates every k
steps takes T + t / k; if the messages may travel behind d steps of computation, d T of their time is hidden. DDP sends
a bucket of gradients as soon as the backward pass has filled it, and waits for the last one. Computation is assumed not
to slow down while messages travel.
"""

from lightning_slowmo.plan.advice import GOOD_ENOUGH, LONG, Advice, at_period, plan, recommend
from lightning_slowmo.plan.command import load, main, parser, table
from lightning_slowmo.plan.inside import GATHERS, Inside, inside
from lightning_slowmo.plan.measure import measure_costs, measure_handling, measure_step, synthetic
from lightning_slowmo.plan.model import (
    BACKWARD_SHARE,
    COSTS,
    DDP,
    DDP_BUCKETS,
    SECONDS_HANDLED,
    Costs,
    Prediction,
    predict,
    transfer_seconds,
    work_seconds,
)
from lightning_slowmo.plan.units import TENSORS, parse_bandwidth, parse_bits, parse_count, parse_seconds, shapes_of

__all__ = [
    "BACKWARD_SHARE",
    "COSTS",
    "DDP",
    "DDP_BUCKETS",
    "GATHERS",
    "GOOD_ENOUGH",
    "LONG",
    "SECONDS_HANDLED",
    "TENSORS",
    "Advice",
    "Costs",
    "Inside",
    "Prediction",
    "at_period",
    "inside",
    "load",
    "main",
    "measure_costs",
    "measure_handling",
    "measure_step",
    "parse_bandwidth",
    "parse_bits",
    "parse_count",
    "parse_seconds",
    "parser",
    "plan",
    "predict",
    "recommend",
    "shapes_of",
    "synthetic",
    "table",
    "transfer_seconds",
    "work_seconds",
]
