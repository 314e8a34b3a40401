"""Slow state in pieces, or in the CPU's memory: less of it on each worker, the same numbers."""

from functools import partial

import pytest
import torch

from lightning_slowmo import BMUF, DiLoCo, Engine, LocalSGD, SlowMo, Workers
from lightning_slowmo.algorithms import Gossip
from lightning_slowmo.averaging.sharded import Shards
from lightning_slowmo.bucket_sizes import BucketSizes
from lightning_slowmo.parameters import Layout
from lightning_slowmo.pieces import Pieces
from lightning_slowmo.storage import flat_view
from tests.harness import run

SHAPES = [(7, 3), (), (0,), (11,), (2, 2, 2)]
ALGORITHMS = [SlowMo(sync_every=2, slow_momentum=0.6), BMUF(2, 0.5, nesterov=True), DiLoCo(3)]


def train(rank: int, algorithm: object, placement: dict, steps: int, state: tuple | None = None) -> tuple:
    """Parameters, slow state and elements of slow state kept here, after some steps on random gradients."""
    common = torch.Generator().manual_seed(1)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=common, dtype=torch.float64)) for shape in SHAPES]
    optimizer = torch.optim.SGD(
        [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.02}], lr=0.1, momentum=0.9, nesterov=True
    )
    engine = Engine(algorithm, [optimizer], Workers.from_world(), **placement)
    own = torch.Generator().manual_seed(100 + rank)
    if state is not None:
        engine.load_shared_state(state[0])
        engine.load_local_state(state[1])
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=own, dtype=torch.float64)
        optimizer.step()
        engine.after_step()
    kept = sum(flat.numel() for flat in (*engine.units[0].anchor, *engine.units[0].momentum))
    return [p.detach() for p in parameters], (engine.shared_state(), engine.local_state()), kept


def compare(rank: int) -> None:
    for algorithm in ALGORITHMS:
        whole, saved, kept = train(rank, algorithm, {}, 7)
        for placement in ({"shard_slow_state": True}, {"offload_slow_state": "cpu"}):
            other, saved_other, kept_other = train(rank, algorithm, placement, 7)
            torch.testing.assert_close(other, whole, rtol=0, atol=1e-14)
            assert saved_other[0]["algorithm"] == saved[0]["algorithm"]
            torch.testing.assert_close(saved_other[0]["units"], saved[0]["units"], rtol=0, atol=1e-14)
            if "shard_slow_state" in placement and torch.distributed.get_world_size() > 1:
                assert kept_other < 0.75 * kept
        # A checkpoint is the same whichever way the state was kept.
        resumed_whole, *_ = train(rank, algorithm, {}, 5, saved_other)
        resumed_shard, *_ = train(rank, algorithm, {"shard_slow_state": True}, 5, saved)
        torch.testing.assert_close(resumed_shard, resumed_whole, rtol=0, atol=1e-14)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_sharded_and_offloaded_slow_state_give_the_same_numbers_and_checkpoints(size: int) -> None:
    run(size, compare)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_pieces_of_all_workers_make_up_the_whole(size: int) -> None:
    layout = Layout([[torch.randn(shape) for shape in SHAPES]], BucketSizes(64, 40))
    whole = layout.snapshot()
    shares = [Shards(layout, rank, size).cut(whole) for rank in range(size)]
    assert sum(flat.numel() for share in shares for flat in share) == layout.numel
    torch.testing.assert_close(
        torch.cat([flat for share in shares for flat in share]).sort().values, torch.cat(whole).sort().values
    )


def refuse(rank: int) -> None:
    adam = partial(torch.optim.Adam, lr=0.1)
    for algorithm in (LocalSGD(), SlowMo(base=Gossip()), DiLoCo(outer_optimizer=adam), SlowMo(average=False)):
        with pytest.raises(ValueError, match="shard"):
            train(rank, algorithm, {"shard_slow_state": True}, 1)
    with pytest.raises(ValueError, match="offload_slow_state must be 'cpu' or None, got 'disk'"):
        train(rank, SlowMo(), {"offload_slow_state": "disk"}, 1)


def test_what_cannot_be_sharded_says_so_before_training() -> None:
    run(2, refuse)


def save_pieces(rank: int) -> None:
    for algorithm in ALGORITHMS:
        common = torch.Generator().manual_seed(1)
        image = torch.randn(2, 3, 4, 5, generator=common, dtype=torch.float64).to(memory_format=torch.channels_last)
        parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in SHAPES]
        parameters.append(torch.nn.Parameter(image))
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        workers = Workers.from_world()
        workers.sizes = BucketSizes(64, 40)
        engine = Engine(algorithm, [optimizer], workers, shard_slow_state=True)
        slow = engine.shared_state(whole=False)["units"][0]["slow"]
        held = sum(piece.numel() for tensor in (*slow["anchor"], *slow["momentum"]) for _, piece in tensor.pieces)
        kept = sum(flat.numel() for flat in (*engine.units[0].anchor, *engine.units[0].momentum))
        assert held == kept  # what is saved is what is kept: nobody holds the whole
        collected = engine.shared_state()["units"][0]["slow"]["anchor"]
        named = dict(zip(map(id, engine.units[0].layout.parameters), collected, strict=True))
        for parameter in (p for p in parameters if p.numel()):
            assert torch.equal(named[id(parameter)], parameter.detach())
            assert named[id(parameter)].stride() == parameter.stride()
        # Whole tensors, in whatever order of memory, and pieces that lie in many files are taken in likewise.
        doubled = [2 * tensor.contiguous() for tensor in collected]
        averager = engine.units[0].averager
        averager.load(engine.units[0].anchor, doubled, "anchor")
        again = engine.shared_state()["units"][0]["slow"]["anchor"]
        assert all(torch.equal(a, b) for a, b in zip(again, doubled, strict=True))
        cut = [
            Pieces.of(
                t,
                t.dtype,
                [(0, 3 * flat_view(t)[: t.numel() // 2]), (t.numel() // 2, 3 * flat_view(t)[t.numel() // 2 :])],
            )
            for t in collected
        ]
        averager.load(engine.units[0].anchor, cut, "anchor")
        again = engine.shared_state()["units"][0]["slow"]["anchor"]
        assert all(torch.equal(a, 3 * b) for a, b in zip(again, collected, strict=True))
        with pytest.raises(ValueError, match="anchor does not fit"):
            averager.load(engine.units[0].anchor, doubled[1:], "anchor")


@pytest.mark.parametrize("size", [1, 2, 3])
def test_sharded_slow_state_is_saved_in_pieces_that_nobody_has_to_put_together(size: int) -> None:
    run(size, save_pieces)
