"""Tensors that travel through host memory: the logic of it, with a CPU in the place of the GPU."""

import pytest
import torch

from lightning_slowmo import Engine, SlowMo, Workers
from lightning_slowmo.bucket_sizes import DEFAULT_SIZES
from lightning_slowmo.communication.pipeline import complete, start
from lightning_slowmo.communication.staging import Stage, Staged
from lightning_slowmo.communication.torch_transport import backend_for
from tests.on_workers import taking_turns

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def staged(workers: Workers, piece_bytes: int = 40) -> Staged:
    return Staged(workers.transport, Stage(CPU), piece_bytes)


@taking_turns(2, 3)
def test_a_sum_in_pieces_is_the_sum(workers):
    transport = staged(workers)
    for numel in (0, 1, 5, 23):
        flat = torch.arange(numel, dtype=torch.float64) * (workers.rank + 1)
        complete(transport.all_reduce(flat, "a test"))
        total = workers.size * (workers.size + 1) / 2
        assert torch.equal(flat, torch.arange(numel, dtype=torch.float64) * total)


@taking_turns(3)
def test_a_tensor_is_overwritten_when_the_transfer_has_ended_and_not_before(workers):
    transport = staged(workers)
    flat = torch.full((23,), float(workers.rank))
    under_way = start(transport.all_reduce(flat, "a test"))
    assert torch.equal(flat, torch.full((23,), float(workers.rank)))
    under_way.wait()
    assert torch.equal(flat, torch.full((23,), 3.0))


@taking_turns(3)
def test_every_operation_does_what_the_transport_underneath_does(workers):
    size, rank, transport = workers.size, workers.rank, staged(workers)
    own = torch.empty(4)
    complete(transport.reduce_scatter(own, torch.arange(4.0 * size) + rank, "a test"))
    assert torch.equal(own, size * torch.arange(4.0 * rank, 4.0 * rank + 4) + sum(range(size)))
    everyone = torch.empty(4 * size)
    complete(transport.all_gather(everyone, torch.full((4,), float(rank)), "a test"))
    assert torch.equal(everyone, torch.arange(size).repeat_interleave(4).float())
    table = torch.full((5, 4), float(rank)).T  # not contiguous
    complete(transport.broadcast(table, 1, "a test"))
    assert torch.equal(table, torch.ones(4, 5))
    leaving = torch.full((2 * size,), float(rank))
    arriving = torch.empty(2 * size)
    complete(transport.all_to_all(arriving, [2] * size, leaving, [2] * size, "a test"))
    assert torch.equal(arriving, torch.arange(size).repeat_interleave(2).float())
    came = [torch.empty(3)]
    message = torch.full((3,), float(rank))
    complete(transport.send_and_receive(message, [(rank + 1) % size], came, [(rank - 1) % size], "a test"))
    assert torch.equal(came[0], torch.full((3,), float((rank - 1) % size)))


@taking_turns(2)
def test_host_memory_is_used_again(workers):
    transport = staged(workers)
    places = []
    for _ in range(3):
        complete(transport.all_reduce(torch.ones(23), "a test"))
        places.append(sorted(flat.data_ptr() for flat, _ in transport.stage._free[torch.float32]))
    assert places[0] == places[1] == places[2]
    assert len(places[0]) == 3  # two of 10 elements and one of 3
    assert not transport.stage._lent


@taking_turns(2)
def test_training_over_staged_messages_is_training(workers):
    def train(workers: Workers) -> torch.Tensor:
        weight = torch.nn.Parameter(torch.ones(50, dtype=torch.float64))
        optimizer = torch.optim.SGD([weight], 0.1)
        engine = Engine(SlowMo(sync_every=2), [optimizer], workers)
        for step in range(6):
            weight.grad = torch.sin(weight.detach() * (step + 1) + workers.rank)
            optimizer.step()
            engine.after_step()
        return weight.detach()

    plain = train(workers)
    assert torch.equal(train(Workers(staged(workers), workers.timeout)), plain)


@pytest.mark.parametrize(
    ("device", "backend", "chosen"),
    [
        (CPU, None, "gloo"),
        (CUDA, None, "nccl"),
        (CUDA, "gloo", "gloo"),
        (CUDA, "cpu:gloo,cuda:nccl", "nccl"),
        (CPU, "cpu:gloo,cuda:nccl", "gloo"),
        (CUDA, "cpu:gloo,cuda:gloo", "gloo"),
    ],
)
def test_the_backend_that_was_asked_for(device, backend, chosen):
    assert backend_for(device, backend) == chosen


def test_a_backend_that_says_nothing_about_the_device():
    with pytest.raises(ValueError, match="says nothing about cuda"):
        backend_for(CUDA, "cpu:gloo")


def test_a_worker_alone_has_the_sizes_of_its_device():
    assert Workers.from_world(device="cpu").sizes is DEFAULT_SIZES
