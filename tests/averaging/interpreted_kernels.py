"""The kernels of averages and outer steps in Triton's interpreter, against the torch code.

``tests/test_interpreter.py`` runs this file in a process of its own, with ``TRITON_INTERPRET=1``.
"""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_slowmo.algorithms.block_momentum import block_update
from lightning_slowmo.algorithms.diloco import nesterov_step, outer_gradient
from lightning_slowmo.algorithms.slow_momentum import slow_update
from lightning_slowmo.averaging.averager import OnSum
from lightning_slowmo.averaging.delayed import Flight
from lightning_slowmo.averaging.finite import is_finite
from lightning_slowmo.averaging.kernels import table
from lightning_slowmo.averaging.mean import average
from lightning_slowmo.averaging.outer_step import OuterStep
from lightning_slowmo.bucket_sizes import BucketSizes
from lightning_slowmo.communication import Workers
from lightning_slowmo.parameters import Layout
from lightning_slowmo.scratch import Scratch
from lightning_slowmo.triton_support import interpreted

SHAPES = [(3, 5), (), (7,), (0,), (2 * 4096 + 17,), (64, 33), (4096,), (129, 3)]
"""Odd sizes, a scalar, an empty tensor, one of exactly a tile and one that ends within a tile."""

EVEN_SHAPES = [(64, 3), (4096 + 8,), (16,)]
"""All places are multiples of four elements, for which memory is read 16 bytes at a time."""

RULES = {
    "slow_update": (slow_update, {"slow_momentum": 0.6, "slow_lr": 0.7, "rate_ratio": 0.3}),
    "slow_update at a learning rate of 0": (slow_update, {"slow_momentum": 0.6, "slow_lr": 1.0, "rate_ratio": None}),
    "block_update": (
        block_update,
        {"block_momentum": 0.6, "block_lr": 0.9, "nesterov": True, "warming_up": False},
    ),
    "block_update while warming up": (
        block_update,
        {"block_momentum": 0.6, "block_lr": 0.9, "nesterov": False, "warming_up": True},
    ),
    "nesterov_step": (nesterov_step, {"outer_lr": 0.7, "outer_momentum": 0.9}),
    "outer_gradient": (outer_gradient, {}),
    "mean": None,
}

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-5}
"""Relative. The interpreter cuts bfloat16 off where hardware rounds, at the anchor and at the end of both syncs."""


class AnotherWorker:
    """A transport to one other worker, whose parameters are functions of their place alone."""

    rank, size, group = 0, 2, None

    def all_reduce(self, flat: Tensor, purpose: str):
        yield
        flat.add_(torch.linspace(-1, 1, flat.numel(), dtype=flat.dtype))


def parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def outcome(shapes, dtype, rule, fused, weights=None, strided=False, sizes=(20_000, 2**60)):
    """Parameters, drift, anchor and momentum after two averages."""
    tensors = parameters(shapes, dtype)
    if strided:
        tensors.append(Parameter(torch.arange(40.0, dtype=torch.float64).to(dtype).view(8, 5)[:, ::2]))
    layout = Layout([tensors[:3], tensors[3:]], BucketSizes(*sizes, block_numel=1000, in_flight=2))
    anchor = [flat.mul_(0.9) for flat in layout.snapshot()]
    momentum = [flat.mul_(0.1) for flat in layout.snapshot()]
    on_sum: OnSum | None = None
    if rule is not None:
        on_sum = OuterStep(rule[0], [rule[1]] * 2, anchor, momentum)
    with interpreted() if fused else nullcontext():
        workers, scratch = Workers(AnotherWorker()), Scratch(2)
        drifts = [average(layout.buckets, workers, scratch, weights, on_sum) for _ in range(2)]
    return [*tensors, *anchor, *momentum], drifts


def same(first, second, dtype):
    (tensors, drifts), (others, other_drifts) = first, second
    for one, other in zip(tensors, others, strict=True):
        torch.testing.assert_close(one, other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert drifts == pytest.approx(other_drifts, rel=max(1e-6, TOLERANCE[dtype]))
    assert all(drift > 0.1 for drift in drifts)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_one_pass_does_what_the_torch_code_does(rule, dtype):
    run = partial(outcome, SHAPES, dtype, RULES[rule])
    same(run(fused=True), run(fused=False), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_one_pass_over_even_sizes(dtype):
    run = partial(outcome, EVEN_SHAPES, dtype, RULES["slow_update"])
    same(run(fused=True), run(fused=False), dtype)


@pytest.mark.parametrize("weights", [[1.0, 3.0], [0.0, 2.0]])
def test_workers_of_other_weights(weights):
    run = partial(outcome, SHAPES, torch.float64, RULES["slow_update"], weights=weights)
    same(run(fused=True), run(fused=False), torch.float64)


def test_strided_parameters_and_those_that_are_sent_in_place_take_the_torch_code():
    run = partial(outcome, SHAPES, torch.float64, RULES["slow_update"], strided=True, sizes=(20_000, 30_000))
    same(run(fused=True), run(fused=False), torch.float64)


def test_a_large_model_is_sampled_at_the_same_coordinates(monkeypatch):
    monkeypatch.setattr("lightning_slowmo.averaging.drift.DRIFT_SAMPLE", 2000)
    run = partial(outcome, SHAPES, torch.float64, None)
    same(run(fused=True), run(fused=False), torch.float64)
    assert run(fused=True)[1] != outcome([*SHAPES, (5,)], torch.float64, None, fused=True)[1]


def test_kernels_follow_parameters_that_are_moved_to_other_memory():
    tensors = parameters(SHAPES, torch.float64)
    layout = Layout([tensors])
    with interpreted():
        for _ in range(2):
            for tensor in tensors:
                tensor.data = tensor.data.clone()
            average(layout.buckets, Workers(AnotherWorker()), Scratch())
    others = parameters(SHAPES, torch.float64)
    for _ in range(2):
        average(Layout([others]).buckets, Workers(AnotherWorker()), Scratch())
    for tensor, other in zip(tensors, others, strict=True):
        torch.testing.assert_close(tensor, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_found_wherever_it_is(dtype, bad):
    tensors = parameters(SHAPES, dtype)
    layout = Layout([tensors], BucketSizes(20_000, 2**60))
    with interpreted():
        assert is_finite(layout)
        for tensor in tensors:
            if tensor.numel():
                good = tensor.detach().flatten()[-1].item()
                tensor.data.view(-1)[-1] = bad
                assert not is_finite(layout)
                tensor.data.view(-1)[-1] = good
        assert is_finite(layout)


def test_a_sum_of_squares_that_overflows_is_finite():
    with interpreted():
        assert is_finite(Layout([[Parameter(torch.full((10,), 3e38))]]))


def test_two_launches_a_bucket_and_one_for_the_look_before(monkeypatch):
    names = []
    launch = table._launch
    monkeypatch.setattr(
        table, "_launch", lambda kernel, *a, **k: (names.append(kernel.__name__), launch(kernel, *a, **k))
    )
    tensors = parameters([(100,)] * 30, torch.float32)
    layout = Layout([tensors], BucketSizes(4000, 2**60))
    anchor, momentum = layout.snapshot(), layout.zeros()
    rule, scalars = RULES["slow_update"]
    with interpreted():
        assert is_finite(layout)
        step = OuterStep(rule, [scalars], anchor, momentum)
        average(layout.buckets, Workers(AnotherWorker()), Scratch(2), on_sum=step)
    assert len(layout.buckets) == 3
    assert names[:3] == ["find_nonfinite"] * 3
    assert sorted(names[3:]) == ["gather"] * 3 + ["move"] * 3


def test_nothing_is_allotted_after_the_first_sync():
    tensors = parameters(SHAPES, torch.float32)
    layout, scratch = Layout([tensors], BucketSizes(20_000, 2**60, in_flight=2)), Scratch(2)
    with interpreted():
        average(layout.buckets, Workers(AnotherWorker()), scratch)
        places = {key: buffer.data_ptr() for key, buffer in scratch._buffers.items()}
        tables = [bucket.notes["table"].tiles.data_ptr() for bucket in layout.buckets]
        average(layout.buckets, Workers(AnotherWorker()), scratch)
    assert {key: buffer.data_ptr() for key, buffer in scratch._buffers.items()} == places
    assert [bucket.notes["table"].tiles.data_ptr() for bucket in layout.buckets] == tables
    assert len(places) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("rule", ["slow_update", "mean"])
def test_a_mean_that_travels_while_training_goes_on(rule, dtype):
    def outcome(fused: bool) -> tuple[list[Tensor], list[float]]:
        tensors = parameters(SHAPES, dtype)
        layout = Layout([tensors], BucketSizes(20_000, 2**60, block_numel=1000))
        anchor, momentum = [flat.mul_(0.9) for flat in layout.snapshot()], layout.zeros()
        step = OuterStep(RULES[rule][0], [RULES[rule][1]], anchor, momentum) if RULES[rule] else None
        with interpreted() if fused else nullcontext():
            flight = Flight.send(layout.buckets, Workers(AnotherWorker()), Scratch(2 * len(layout.buckets)), None, step)
            for tensor in tensors:
                tensor.data.add_(0.25)
            flight.arrive()
            flight.correct(Scratch())
        return [*tensors, *anchor, *momentum], [flight.drift]

    same(outcome(True), outcome(False), dtype)
