"""Collectives on whole parameter sets: every tensor of every kind, bucket by bucket."""

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from lightning_slowmo.averaging.drift import Drift
from lightning_slowmo.averaging.mean import average, average_tensors
from lightning_slowmo.bucket_sizes import BucketSizes
from lightning_slowmo.communication.broadcast import broadcast_tensors
from lightning_slowmo.parameters import Layout
from lightning_slowmo.scratch import Scratch
from tests.on_workers import on_workers


@on_workers(2, 3, each=[(24, 10**6), (24, 1), (8, 1), (10**6, 16)])
def test_every_tensor_is_averaged_where_torchft_leaves_some_out(workers, case):
    """Sizes 4, 4, 2 in buckets of six elements, and tensors larger than a bucket."""
    sizes = (4, 4, 2, 20, 1)
    parameters = [Parameter(torch.arange(float(size)) + workers.rank) for size in sizes]
    average(Layout([parameters], BucketSizes(*case)).buckets, workers, Scratch())
    offset = (workers.size - 1) / 2
    for parameter, size in zip(parameters, sizes, strict=True):
        torch.testing.assert_close(parameter.detach(), torch.arange(float(size)) + offset)


@on_workers(2)
def test_strided_and_channels_last_parameters_are_averaged_in_their_places(workers):
    whole = torch.zeros(3, 8) + workers.rank
    strided = Parameter(whole[:, ::2])
    image = Parameter((torch.arange(24.0).view(1, 2, 3, 4) * workers.rank).to(memory_format=torch.channels_last))
    half = Parameter(torch.full((5,), 1.0 + workers.rank, dtype=torch.bfloat16))
    average(Layout([[strided, image, half]], BucketSizes(16, 16)).buckets, workers, Scratch())
    assert (strided == 0.5).all()
    assert (whole[:, 1::2] == workers.rank).all()
    assert torch.equal(image.detach(), torch.arange(24.0).view(1, 2, 3, 4) / 2)
    assert (half == 1.5).all()


@on_workers(2)
def test_what_is_done_then_sees_each_element_once(workers):
    parameters = [Parameter(torch.full((size,), 1.0 + workers.rank)) for size in (7, 50, 3)]
    layout = Layout([parameters], BucketSizes(64, 100))
    seen = layout.zeros()

    def on_sum(block, total, weight):
        block.of(seen).add_(1)
        assert weight == 2
        total.mul_(10)

    average(layout.buckets, workers, Scratch(), on_sum=on_sum)
    assert all((parameter == 30).all() for parameter in parameters)
    assert all((run == 1).all() for run in seen)


@on_workers(2, 3)
def test_floats_are_averaged_and_others_come_from_rank_0(workers):
    rank = workers.rank
    tensors = [
        torch.full((2, 2), float(rank)),
        torch.tensor(float(rank), dtype=torch.float64),
        torch.full((3,), float(rank), dtype=torch.bfloat16),
        torch.tensor(100 + rank),
        torch.tensor([rank == 0, rank == 1]),
        torch.zeros(0),
    ]
    average_tensors(tensors, workers)
    mean = (workers.size - 1) / 2
    assert [tensor.tolist() for tensor in tensors] == [[[mean] * 2] * 2, mean, [mean] * 3, 100, [True, False], []]


@on_workers(2)
def test_weights_apply_to_buffers_too(workers):
    tensor = torch.full((2,), 2.0 if workers.rank else float("nan"))
    average_tensors([tensor], workers, [0.0, 1.0])
    assert tensor.tolist() == [2.0, 2.0]


@on_workers(2, 3)
def test_tensors_of_all_kinds_are_broadcast_from_any_rank(workers):
    torch.manual_seed(workers.rank)
    source = workers.size - 1
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3)).to(memory_format=torch.channels_last)
    model[1].num_batches_tracked.fill_(workers.rank)
    tensors = list(model.state_dict().values())
    broadcast_tensors(tensors, workers, source)
    rows = workers.gather(torch.cat([tensor.double().flatten() for tensor in tensors]).tolist())
    assert all(row == rows[0] for row in rows)
    assert model[1].num_batches_tracked == source
    torch.manual_seed(source)
    assert torch.equal(model[0].weight, nn.Conv2d(2, 3, 2).weight)


def test_drift_is_the_distance_from_the_mean_relative_to_its_norm():
    drift = Drift(4)
    local = drift.sample(torch.tensor([3.0, 4.0, 0.0, 0.0]))
    drift.compare(local, 2 * torch.tensor([0.0, 4.0, 0.0, 0.0]), 2.0)
    assert drift.value() == pytest.approx(3 / 4)
    assert Drift(0).value() == 0


def test_drift_of_a_large_model_is_estimated_from_a_sample():
    torch.manual_seed(0)
    size = 2**21
    mean, noise = torch.randn(size), 0.1 * torch.randn(size)
    drift = Drift(size)
    for piece in range(0, size, 2**19):  # buckets
        own = (mean + noise)[piece : piece + 2**19]
        sample = drift.sample(own)
        assert sample.numel() == 2**16
        drift.compare(sample, mean[piece : piece + 2**19], 1.0)
    assert drift.value() == pytest.approx(0.1, rel=0.01)
