"""Layouts: every element in exactly one bucket, whatever the shapes, strides, dtypes and bucket sizes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import Parameter

from lightning_slowmo import LocalSGD, Workers
from lightning_slowmo.bucket_sizes import DEFAULT_SIZES, BucketSizes, check_bucket_cap, sizes_for
from lightning_slowmo.parameters import Layout
from lightning_slowmo.scratch import Scratch
from lightning_slowmo.storage import accumulation_dtype, flat_view, is_dense

SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple) | st.integers(0, 60).map(lambda size: (size,))
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
SIZES = st.integers(1, 200)


@st.composite
def tensors(draw):
    """A parameter with whole numbers that all its dtypes can hold, dense in some order, or strided with gaps."""
    shape, dtype = draw(SHAPES), draw(DTYPES)
    kind = draw(st.sampled_from(["contiguous", "permuted", "gaps"]))
    if kind == "gaps" and shape:
        whole = torch.zeros(*shape[:-1], 2 * shape[-1], dtype=dtype)
        tensor = whole[..., ::2]
    elif kind == "permuted":
        order = draw(st.permutations(range(len(shape))))
        tensor = torch.zeros([shape[i] for i in order], dtype=dtype).permute(
            [order.index(i) for i in range(len(shape))]
        )
    else:
        tensor = torch.zeros(shape, dtype=dtype)
    assert tensor.shape == shape
    return Parameter(tensor)


GROUPS = st.lists(st.lists(tensors(), max_size=6), max_size=3)


def fill(layout: Layout) -> None:
    """Give every element a number of its own (modulo what bfloat16 can hold)."""
    count = 0
    with torch.no_grad():
        for parameter in layout.parameters:
            numbers = torch.arange(count, count + parameter.numel()) % 251
            parameter.copy_(numbers.view(parameter.shape))
            count += parameter.numel()


def copies(layout: Layout) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in layout.parameters]


def same(layout: Layout, values: list[torch.Tensor]) -> bool:
    return all(torch.equal(p, value) for p, value in zip(layout.parameters, values, strict=True))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(GROUPS, SIZES, SIZES)
def test_every_element_is_in_exactly_one_bucket(groups, bucket_bytes, in_place_bytes):
    layout = Layout(groups, BucketSizes(bucket_bytes, in_place_bytes))
    assert layout.numel == sum(p.numel() for group in groups for p in group)
    assert sum(bucket.numel for bucket in layout.buckets) == layout.numel
    seen = {id(p): torch.zeros(p.numel(), dtype=torch.int) for p in layout.parameters}
    covered = [torch.zeros(run.numel, dtype=torch.int) for run in layout.runs]
    for bucket in layout.buckets:
        assert bucket.numel == sum(bucket.segments) == bucket.stop - bucket.start > 0
        covered[bucket.run][bucket.start : bucket.stop] += 1
        for parameter, start, stop in bucket.spans:
            seen[id(parameter)][start:stop] += 1
    assert all((counts == 1).all() for counts in [*seen.values(), *covered])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(GROUPS, SIZES, SIZES)
def test_what_is_packed_comes_back_and_every_element_is_seen(groups, bucket_bytes, in_place_bytes):
    layout, scratch = Layout(groups, BucketSizes(bucket_bytes, in_place_bytes)), Scratch()
    fill(layout)
    values = copies(layout)
    for bucket in layout.buckets:
        flat = bucket.pack(scratch.take(bucket))
        assert flat.dtype == bucket.dtype == accumulation_dtype(bucket.spans[0][0].dtype)
        assert flat.shape == (bucket.numel,)
        bucket.unpack(flat)
    assert same(layout, values)
    for bucket in layout.buckets:
        bucket.unpack(bucket.pack(scratch.take(bucket)).add_(1))
    assert same(layout, [value + 1 for value in values])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(GROUPS, SIZES, SIZES)
def test_a_snapshot_holds_the_values_by_parameter_and_restores_them(groups, bucket_bytes, in_place_bytes):
    layout = Layout(groups, BucketSizes(bucket_bytes, in_place_bytes))
    fill(layout)
    values, snapshot = copies(layout), layout.snapshot()
    views = layout.per_parameter(snapshot)
    assert all(torch.equal(view, value) for view, value in zip(views, values, strict=True))
    assert all(view.shape == p.shape for view, p in zip(views, layout.parameters, strict=True))
    with torch.no_grad():
        for parameter in layout.parameters:
            parameter.zero_()
    layout.restore(snapshot)
    assert same(layout, values)
    for view in views:
        view.fill_(7)  # they are views: this is how a checkpoint is loaded
    assert all((buffer == 7).all() for buffer in snapshot)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(GROUPS, st.randoms(use_true_random=False), SIZES)
def test_state_is_carried_to_another_layout(groups, random, bucket_bytes):
    old = Layout(groups)
    fill(old)
    kept = [[p for p in group if random.random() < 0.7] for group in groups]
    random.shuffle(kept)
    joined = Parameter(torch.zeros(3))
    new = Layout([*kept, [joined]], BucketSizes(bucket_bytes, 32))
    state = new.zeros()
    new.carry(old, old.snapshot(), state)
    for parameter, view in zip(new.parameters, new.per_parameter(state), strict=True):
        assert torch.equal(view.to(parameter.dtype), parameter.detach())
    assert any(parameter is joined for parameter in new.parameters)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(GROUPS, SIZES, SIZES)
def test_buckets_are_no_larger_than_they_may_be(groups, bucket_bytes, in_place_bytes):
    for bucket in Layout(groups, BucketSizes(bucket_bytes, in_place_bytes)).buckets:
        fits = bucket.numel * bucket.dtype.itemsize <= bucket_bytes
        assert fits or bucket.numel == 1 or not is_dense(bucket.spans[0][0])  # what cannot be cut is alone
        if not fits:
            assert len(bucket.spans) == 1


@pytest.mark.parametrize("in_place_bytes", [1, 10**6])
def test_no_tensor_is_left_out_where_torchft_leaves_some_out(in_place_bytes):
    """Sizes 4, 4, 2 in buckets of 6 elements, and a tensor larger than a bucket."""
    parameters = [Parameter(torch.zeros(size)) for size in (4, 4, 2, 20)]
    layout = Layout([parameters], BucketSizes(6 * 4, in_place_bytes))
    for bucket in layout.buckets:
        bucket.unpack(bucket.pack().add_(1))
    assert all((parameter == 1).all() for parameter in parameters)
    if in_place_bytes > 1:
        assert [bucket.segments for bucket in layout.buckets] == [(4,), (4, 2), (6,), (6,), (6,), (2,)]


def test_large_parameters_travel_in_place_and_small_ones_together():
    small, large = [Parameter(torch.zeros(3)) for _ in range(4)], Parameter(torch.zeros(10, 10))
    layout = Layout([[*small[:2], large, *small[2:]]], BucketSizes(10**6, 400))
    assert [(bucket.in_place, bucket.segments) for bucket in layout.buckets] == [
        (False, (3, 3)),
        (True, (100,)),
        (False, (3, 3)),
    ]
    assert layout.buckets[1].pack().data_ptr() == large.data_ptr()


def test_half_precision_never_travels_in_place():
    layout = Layout([[Parameter(torch.zeros(100, dtype=torch.bfloat16))]], BucketSizes(100, 1))
    assert all(not bucket.in_place and bucket.dtype == torch.float32 for bucket in layout.buckets)
    assert len(layout.buckets) == 4


def test_channels_last_is_sent_without_a_copy_and_keeps_its_format():
    parameter = Parameter(torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last))
    layout = Layout([[parameter]], BucketSizes(in_place_bytes=1))
    (bucket,) = layout.buckets
    address, value = parameter.data_ptr(), parameter.detach().clone()
    assert bucket.in_place
    assert bucket.pack().data_ptr() == address
    bucket.unpack(bucket.pack().mul_(2))
    assert torch.equal(parameter, value * 2)
    assert parameter.data_ptr() == address
    assert parameter.is_contiguous(memory_format=torch.channels_last)


def test_tied_weights_are_taken_once():
    tied, other = Parameter(torch.zeros(4)), Parameter(torch.zeros(2))
    layout = Layout([[tied, other, tied], [tied]])
    assert layout.numel == 6
    assert [id(parameter) for parameter in layout.parameters] == [id(tied), id(other)]


def test_groups_dtypes_and_their_order_make_runs():
    a, b, c = (Parameter(torch.zeros(2, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float32))
    layout = Layout([[a, b], [c]])
    assert [(run.group, run.dtype, run.numel) for run in layout.runs] == [
        (0, torch.float32, 2),
        (0, torch.bfloat16, 2),
        (1, torch.float32, 2),
    ]
    assert [buffer.dtype for buffer in layout.zeros()] == [torch.float32] * 3


def test_frozen_parameters_are_left_out_and_unfreezing_is_noticed():
    frozen, trained = Parameter(torch.zeros(3), requires_grad=False), Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([frozen, trained], lr=0.1)
    running = LocalSGD().bind(optimizer, Workers())
    assert [parameter.shape for parameter in running.layout.parameters] == [(2,)]
    assert running.layout.covers(running.groups())
    frozen.requires_grad_(True)
    assert not running.layout.covers(running.groups())
    running.join()
    assert [parameter.shape for parameter in running.layout.parameters] == [(3,), (2,)]


def test_nothing_is_a_layout_too():
    layout = Layout([[], [Parameter(torch.zeros(0))]])
    assert (layout.numel, layout.runs, layout.buckets, layout.snapshot()) == (0, [], [], [])
    layout.restore([])


def test_scratch_memory_is_three_buckets_however_many_there_are():
    layout = Layout([[Parameter(torch.zeros(5)) for _ in range(20)]], BucketSizes(40))
    scratch = Scratch(3)
    addresses = [scratch.take(bucket).data_ptr() for bucket in layout.buckets]
    assert len(layout.buckets) == 10
    assert len(set(addresses)) == 3
    assert addresses[:3] * 3 == addresses[:9]  # in turn: a buffer in flight is not handed out again


@pytest.mark.parametrize(
    ("tensor", "dense"),
    [
        (torch.zeros(()), True),
        (torch.zeros(3, 4), True),
        (torch.zeros(3, 4).t(), True),
        (torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last), True),
        (torch.zeros(6)[::2], False),
        (torch.zeros(3, 4)[:, :2], False),
        (torch.zeros(3, 4)[1:], True),
        (torch.zeros(1).expand(4), False),
        (torch.zeros(5, 1).expand(5, 3), False),
    ],
)
def test_dense_is_what_fills_its_memory(tensor, dense):
    assert is_dense(tensor) is dense


def test_a_flat_view_of_a_slice_starts_where_the_slice_starts():
    whole = Parameter(torch.arange(12.0).view(3, 4))
    assert flat_view(whole[1:]).tolist() == list(range(4, 12))


# Sizes ----------------------------------------------------------------------------------------------------------------


def buckets_of(total_mib: int, workers: int, cap: float | None = None, tensors: int = 16) -> list[int]:
    """Sizes of the buckets of a model that takes no memory, in MiB."""
    each = total_mib * 2**18 // tensors
    parameters = [torch.empty(each, device="meta") for _ in range(tensors)]
    layout = Layout([parameters], sizes_for("cpu", workers, cap))
    return [bucket.numel // 2**18 for bucket in layout.buckets]


def test_buckets_grow_with_the_workers_and_the_model_and_no_further():
    assert sizes_for("cpu", workers=2) is DEFAULT_SIZES
    assert max(buckets_of(4096, workers=2)) == 8
    assert max(buckets_of(4096, workers=8)) == 32
    assert max(buckets_of(4096, workers=64)) == 256
    assert max(buckets_of(2**16, workers=1000)) == 256
    assert max(buckets_of(64, workers=64, tensors=32)) == 8  # a small model keeps buckets to overlap


def test_a_cap_is_the_size_of_buckets_whatever_else():
    assert max(buckets_of(4096, workers=64, cap=25)) == 25
    assert buckets_of(64, workers=2, cap=100) == [64]
    assert buckets_of(64, workers=2, cap=32, tensors=64) == [32, 32]  # small tensors are packed until a bucket is full


@pytest.mark.parametrize("value", [0, -1, True, float("nan"), float("inf"), "25"])
def test_caps_that_are_none_are_refused(value):
    with pytest.raises(ValueError, match="bucket_cap_mb must be None or a number of MiB from 1/1024 to 1048576, got"):
        check_bucket_cap(value)
