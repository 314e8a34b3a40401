"""What configurations are said to send and keep is what their running states send and keep."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks.sync_round import bytes_of
from lightning_slowmo import (
    DESLOC,
    PRESETS,
    QPRSGD,
    QSR,
    AllReduce,
    APMSqueeze,
    DiLoCo,
    Engine,
    Gossip,
    LocalSGD,
    PostLocal,
    Ramp,
    SensedSGD,
    SketchedSGD,
    SlowMo,
    Stages,
    Workers,
)
from lightning_slowmo.algorithms import Algorithm
from lightning_slowmo.communication.probe import Link
from lightning_slowmo.compression import QSGD, Sign, TopK
from lightning_slowmo.plan import Costs, at_period, predict
from lightning_slowmo.traffic import (
    Sync,
    all_reduce,
    bytes_per_step,
    header,
    layout_of,
    split_by_size,
    state_numel,
    syncs,
    together,
)
from tests.on_workers import taking_turns

SHAPES = [(200, 61), (61,), (0, 4), (61, 100), (100,), ()]
BIG = [(1200, 1000), (3,), (700, 1000)]
"""One parameter that is sent in place, one smaller than a message, one almost as large as a bucket."""

PERIOD, FIRST, STEPS = 6, 12, 30
"""Thirty steps are whole periods of everything here; the first syncs also look for changing buffers."""

OTHERS = {
    "two periods": SlowMo(LocalSGD(2), sync_every=PERIOD),
    "slowmo over allreduce": SlowMo(AllReduce(), sync_every=PERIOD),
    "slowmo over qprsgd": SlowMo(QPRSGD(sync_every=2), sync_every=PERIOD),
    "slowmo, compressed": SlowMo(sync_every=PERIOD, compressor=Sign()),
    "diloco, compressed": DiLoCo(sync_every=PERIOD, compressor=QSGD(4, norm="max", bucket=512)),
    "no average": SlowMo(Gossip(), sync_every=PERIOD, average=False),
    "two shots": QPRSGD(PERIOD, transport="two_shot"),
    "two shots of the largest": QPRSGD(PERIOD, TopK(0.05), transport="two_shot", error_feedback=True),
    "models to neighbours": QPRSGD(PERIOD, transport="gossip", topology="one_peer_exponential", message="model"),
    "star": Gossip("star"),
    "matching": Gossip("random_matching"),
    "overlap": SlowMo(sync_every=PERIOD, overlap=2),
    "post-local": SlowMo(sync_every=PostLocal(4, 6), slow_momentum=0.3),
    "post-local gossip": QPRSGD(PostLocal(3, 6), transport="gossip"),
    "ramp": SlowMo(sync_every=PERIOD, slow_momentum=Ramp({0: 0.1, 20: 0.5})),
    "stages": DiLoCo(Stages({0: 1, 6: PERIOD})),
    "QSR, gossip inside": SlowMo(Gossip(), sync_every=QSR(PERIOD, 0.0)),
    "fragments": LocalSGD(PERIOD, fragments=2),
    "apmsqueeze, small tensors in full": APMSqueeze(3, uncompressed_below=200),
    "sketched, all exact": SketchedSGD(k=0.5, candidates=2, uncompressed_below=0),
    "sensed, one transform": SensedSGD(iterations=0, block=256, uncompressed_below=200),
}


def configured(name: str) -> Algorithm:
    """A preset with a short period, or one of the others."""
    if name in OTHERS:
        return OTHERS[name]
    algorithm = at_period(PRESETS[name], PERIOD)
    if isinstance(algorithm, DESLOC):
        return dataclasses.replace(algorithm, first_every=PERIOD, second_every=STEPS // 2)
    return dataclasses.replace(algorithm, warmup_steps=3) if isinstance(algorithm, APMSqueeze) else algorithm


def trained(workers: Workers, algorithm: Algorithm, shapes: list) -> tuple[Engine, float]:
    """An engine after some steps, and the bytes that a worker sent in each of the later ones, on average."""
    start = torch.Generator().manual_seed(0)
    model = [torch.nn.Parameter(torch.randn(shape, generator=start)) for shape in shapes]
    sparse = isinstance(algorithm, (SketchedSGD, SensedSGD))  # which keep momentum themselves
    optimizer = torch.optim.SGD(model, lr=0.01) if sparse else torch.optim.Adam(model, lr=0.01)
    engine = Engine(algorithm, [optimizer], workers)
    generator = torch.Generator().manual_seed(workers.rank)
    for step in range(FIRST + STEPS):
        if step == FIRST:
            before = workers.traffic.sent
        for parameter in model:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        engine.after_backward()
        optimizer.step()
        engine.after_step()
    sent = workers.traffic.sent - before
    return engine, sum(row[0] for row in workers.gather([sent])) / workers.size / STEPS


@taking_turns(3, each=[*PRESETS, *OTHERS])
def test_predicted_bytes_and_memory_are_those_that_workers_count(workers: Workers, name: str) -> None:
    algorithm = configured(name)
    engine, counted = trained(workers, algorithm, SHAPES)
    layout = layout_of(SHAPES)
    assert bytes_per_step(syncs(algorithm, layout, workers.size)) == pytest.approx(counted, rel=0.02)
    for unit in engine.units:
        unit.averager.drain()
    if "osgp" in name or "overlap" in name:  # what is in flight lies in no buffer of its own
        return
    model = [span.parameter for run in engine.units[0].layout.runs for span in run.spans]
    kept = bytes_of(engine.units) - bytes_of(model) - bytes_of(engine.units[0].averager.scratch)
    assert 4 * state_numel(algorithm, layout, workers.size) == pytest.approx(kept, rel=0.02)


@taking_turns(2, each=["slowmo", "qprsgd", "squarm_sgd", "sgp"])
def test_predicted_bytes_hold_for_large_parameters(workers: Workers, name: str) -> None:
    algorithm = at_period(PRESETS[name], 15)
    _, counted = trained(workers, algorithm, BIG)
    assert bytes_per_step(syncs(algorithm, layout_of(BIG), workers.size)) == pytest.approx(counted, rel=0.02)


def test_an_all_reduce_costs_what_is_in_every_textbook():
    layout = layout_of([(1000, 1000)])
    assert all_reduce(layout, 4) == Sync(1, 6e6, 6e6, 6, handled=10**6)


def test_thousands_of_workers_are_no_trouble():
    layout = layout_of([(1000, 1000)] * 25)
    for name, preset in PRESETS.items():
        assert bytes_per_step(syncs(preset, layout, 4096)) > 0, name


@dataclasses.dataclass(frozen=True)
class Newcomer(Algorithm):
    """An algorithm of somebody else's: it describes itself, and averages half of each model under an outer loop."""

    def bind(self, optimizer, workers):
        raise NotImplementedError

    def syncs(self, layout, workers):
        return [together(5, header(workers), Sync(1, 800, 1000, 2, handled=7, compressor=Sign()))]

    def average_sync(self, layout, workers):
        return all_reduce(split_by_size(layout, 100)[1], workers)

    def state_numel(self, layout, workers):
        return 3 * layout.numel


def test_a_new_algorithm_describes_itself_and_is_known_everywhere():
    layout, link = layout_of([(100,), (50,), (50,)]), Link(bandwidth=8e3, latency=0.5)
    (sync,) = syncs(Newcomer(), layout, 4)
    assert sync == Sync(5, 800 + header(4).sent, 1000 + header(4).busiest, 2 + 3, handled=7, compressor=Sign())
    predicted = predict(Newcomer(), [(100,), (50,), (50,)], 4, 1.0, link, {repr(Sign()): Costs(0, 0)}, handling=0.0)
    assert predicted.step == pytest.approx(1.0 + (5 * 0.5 + sync.busiest / 1e3) / 5)
    assert predicted.sent == pytest.approx(sync.sent / 5)


def test_an_outer_loop_takes_its_average_and_memory_from_the_base():
    layout = layout_of([(100,), (50,), (50,)])
    inside, outer = syncs(SlowMo(Newcomer(), sync_every=12), layout, 4)
    assert inside == dataclasses.replace(syncs(Newcomer(), layout, 4)[0], every=12 / 2)  # at 5 and at 10, not at 12
    assert outer == together(12, header(4), all_reduce(layout_of([(100,)]), 4))
    assert state_numel(SlowMo(Newcomer(), sync_every=12), layout, 4) == (2 + 3) * 200
    assert syncs(SlowMo(Newcomer(), average=False), layout, 4) == syncs(Newcomer(), layout, 4)


def test_an_algorithm_that_does_not_describe_itself_is_named():
    class Unheard(Algorithm):
        def bind(self, optimizer, workers):
            raise NotImplementedError

    for ask in (syncs, state_numel):
        with pytest.raises(ValueError, match=r"Unheard .* is not known"):
            ask(Unheard(), layout_of(SHAPES), 4)
