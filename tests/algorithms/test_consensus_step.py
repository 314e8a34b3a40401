"""The largest and the suggested consensus step against the recursion of compressed gossip itself, in one process."""

import math
import warnings

import numpy as np
import pytest
import torch

from lightning_slowmo import SQuARM, Workers, suggest_consensus_step
from lightning_slowmo.algorithms.consensus_step import largest_consensus_step
from lightning_slowmo.communication.in_process import in_process, together
from lightning_slowmo.compression import QSGD, Identity, RandomK, Sign, SignTopK, TopK, seeded_generator
from lightning_slowmo.topology import make
from tests.algorithms.training import CONSTANT, PLAIN, Problem, Training
from tests.on_workers import TIMEOUT

LENGTH = 200
GRAPHS = [("ring", 2), ("ring", 7), ("complete", 8), ("star", 4)]
COMPRESSORS = [
    Identity(),
    Sign("l1"),
    Sign("l2"),
    SignTopK(0.05),
    TopK(0.1),
    TopK(0.1, values=QSGD(4, norm="max")),
    RandomK(0.3),
    QSGD(4, norm="max", bucket=512),
    QSGD(3, contractive=True),
]


def settings(graph, workers, compressor):
    return {
        "topology": graph,
        "compressor": compressor,
        "workers": workers,
        "mixing": "metropolis" if graph == "star" else "uniform",
        "segments": (LENGTH,),
    }


def distance_after(step, syncs, topology, compressor, workers, mixing, segments, enough=0.0):
    """How far apart workers are after pure gossip, relative to the start; infinity if ever a thousand times as far.

    It ends early when they are nearer than ``enough``.

    Every worker knows nothing of the others at first, and follows the listing with a copy of every estimate.
    """
    weights = torch.tensor(make(topology, mixing).on(workers).weights())
    generator, lengths = seeded_generator(3), segments * workers
    x = torch.randn(workers, *segments, generator=generator, dtype=torch.float64)
    h = torch.zeros_like(x)
    start = (x - x.mean(0)).norm()
    for _ in range(syncs):
        payload = compressor.compress((x - h).flatten(), lengths, generator)
        h = h + compressor.decompress(payload, lengths, x.dtype).view_as(x)
        x = x + step * (weights @ h - h)
        far = float((x - x.mean(0)).norm() / start)
        if not far < 1000:
            return math.inf
        if far < enough:
            break
    return far


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
@pytest.mark.parametrize(("graph", "workers"), GRAPHS)
def test_the_suggested_step_brings_all_workers_together(graph, workers, compressor):
    given = settings(graph, workers, compressor)
    step = suggest_consensus_step(**given)
    gap = make(graph, given["mixing"]).on(workers).spectral_gap
    assert 0 < step <= 1
    assert distance_after(step, 200 + math.ceil(8 / (step * gap)), **given, enough=0.01) < 0.1


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
@pytest.mark.parametrize(("graph", "workers", "far"), [("complete", 8, 10), ("ring", 7, 0.3), ("star", 4, 0.3)])
def test_far_beyond_the_largest_step_they_never_come_together(graph, workers, far, compressor):
    """Where all modes of the graph are the steepest, three times the step drives them apart.

    On sparse graphs the largest elements bear more: there, four times the step may just leave them where they are.
    """
    given = settings(graph, workers, compressor)
    step = (3 if graph == "complete" else 4) * largest_consensus_step(**given)
    assert distance_after(step, 100 + math.ceil(50 / compressor.share(LENGTH)), **given) > far


@pytest.mark.parametrize(
    ("compressor", "low", "high"), [(Identity(), 1, 1), (Sign("l1"), 0.4, 0.6), (SignTopK(0.01), 0.008, 0.05)]
)
def test_suggested_steps_are_those_that_were_found_by_tuning(compressor, low, high):
    """CHOCO-SGD's authors: 0.45 to 0.5 for signs, up to 0.04 for one percent, on rings of 8 and 9."""
    assert low <= suggest_consensus_step("ring", compressor, workers=8) <= high


def test_the_longest_tensor_and_the_steepest_mode_decide():
    assert largest_consensus_step("ring", Sign(), workers=1) == math.inf
    assert suggest_consensus_step("ring", Sign(), workers=1) == 1
    few = [largest_consensus_step("complete", TopK(k=5), 4, segments=lengths) for lengths in ((50,), (5, 500), (5000,))]
    np.testing.assert_allclose(few, [0.2, 0.02, 0.002], rtol=1e-3)  # 2 k / d
    ring, complete = (largest_consensus_step(graph, TopK(0.1), 4) for graph in ("ring", "complete"))
    np.testing.assert_allclose(ring / complete, 3 / 4)  # the ring's smallest eigenvalue is -1/3
    assert largest_consensus_step("ring", QSGD(2), 4) == largest_consensus_step("ring", QSGD(2), 1) == 0
    for directed in ("exponential", "star", "one_peer_exponential"):
        with pytest.raises(ValueError, match="same symmetric weights"):
            suggest_consensus_step(directed, Sign(), workers=4)


# SQuARM ---------------------------------------------------------------------------------------------------------------

DRIFTING = Problem(CONSTANT.groups, ((0.1, 0.05),) * 4 + ((0.0, 0.0),) * 56, seed=1)
"""Four steps, after which nobody learns any more and only gossip is left."""

DECAYING = [Identity(), Sign("l1"), TopK(0.3), QSGD(4, norm="max", bucket=512)]


def distance(workers, training):
    models = np.array(workers.gather(training.values().tolist()))
    return np.linalg.norm(models - models.mean(0))


def trained(size, squarm, problem=DRIFTING):
    """The distance of the workers from their mean after the last learning step and at the end, and all warnings."""

    def train(workers):
        training = Training(workers, squarm, problem, PLAIN)
        for _ in range(4):
            training.step()
        early = distance(workers, training)
        training.trajectory()
        return early, distance(workers, training)

    with warnings.catch_warnings(record=True) as caught:  # of all workers
        warnings.simplefilter("always")
        (distances, *_) = together(in_process(size, TIMEOUT), train)
    return *distances, [str(warning.message) for warning in caught]


@pytest.mark.parametrize("compressor", DECAYING, ids=str)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_by_default_nobody_is_warned_and_all_come_together(size, compressor):
    graph, mixing = ("ring", "uniform") if compressor == Sign("l1") else ("star", "metropolis")
    early, late, said = trained(size, SQuARM(graph, 1, compressor, mixing=mixing))
    assert not said
    assert late <= 0.1 * early + 1e-12


@pytest.mark.parametrize("compressor", DECAYING, ids=str)
@pytest.mark.parametrize("size", [2, 4])
def test_a_step_in_the_region_that_diverges_is_warned_of_once_and_diverges(size, compressor):
    lengths = [math.prod(shape) for shape in CONSTANT.shapes if math.prod(shape)]
    largest = largest_consensus_step("complete", compressor, size, segments=lengths)
    early, late, said = trained(size, SQuARM("complete", 1, compressor, 4 * largest))
    assert late > 10 * early
    (said_once,) = said
    assert "is in the region that diverges" in said_once
    assert f"on 'complete' between {size} workers" in said_once
    assert f"apart, from about {largest:.3g} on" in said_once
    assert f"Use consensus_step={2 / 3 * largest:.3g}" in said_once or "Use consensus_step=1," in said_once
    assert not trained(size, SQuARM("complete", 1, compressor, 0.9 * largest))[2]


def test_a_compressor_that_loses_more_than_it_tells_is_refused():
    with pytest.raises(ValueError, match="loses more than it tells"):
        SQuARM("ring", compressor=QSGD(2)).bind(PLAIN([torch.nn.Parameter(torch.ones(300))]), Workers())
