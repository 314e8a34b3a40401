"""Compressed means against arithmetic by hand; what goes between processes is compared in ``test_contract.py``."""

import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_slowmo.communication.compressed import chunks, mean_bytes, ring, two_shot
from lightning_slowmo.communication.in_process import in_process, together
from lightning_slowmo.communication.pipeline import complete, pipeline
from lightning_slowmo.compression import QSGD, Cast, Identity, RandomK, Sign, SignTopK, TopK, seeded_generator
from tests.on_workers import TIMEOUT, taking_turns

EXCHANGES = {"ring": ring, "two_shot": two_shot}
TRANSPORTS = {
    name: lambda *arguments, exchange=exchange, **options: pipeline([exchange(*arguments, **options)])[0]
    for name, exchange in EXCHANGES.items()
}
SEGMENTS = [(0,), (1,), (7,), (8,), (9,), (3, 0, 5, 1), (100, 33)]
COMPRESSORS = [Identity(), Sign("l2"), QSGD(3, norm="max", bucket=16), TopK(0.3), SignTopK(0.2), RandomK(0.5), Cast()]


def vector(rank, length, seed=0):
    return torch.tensor(np.random.default_rng((seed, rank)).normal(size=length))


def everyones(workers, flat):
    return np.array(workers.gather(flat.double().tolist())) if flat.numel() else np.zeros((workers.size, 0))


@taking_turns(1, 2, 3, 8, each=list(TRANSPORTS))
def test_without_compression_it_is_the_weighted_mean(workers, case):
    for segments in SEGMENTS:
        flat = vector(workers.rank, sum(segments))
        for weights in (None, [1.0 + rank for rank in range(workers.size)]):
            before = flat.clone()
            mean = TRANSPORTS[case](workers, flat, segments, Identity(), weights=weights)
            shares = np.array(weights or [1.0] * workers.size)
            expected = shares @ everyones(workers, flat) / shares.sum()
            np.testing.assert_allclose(mean.numpy(), expected, rtol=0, atol=1e-14)
            assert torch.equal(flat, before)


@taking_turns(1, 2, 3, each=list(TRANSPORTS))
def test_many_vectors_in_a_pipeline_get_what_each_gets_alone(workers, case):
    vectors = [vector(workers.rank, 20 + 7 * index, seed=index) for index in range(5)]
    alone = [TRANSPORTS[case](workers, flat, flat.shape, Sign("l1")) for flat in vectors]
    together = pipeline(EXCHANGES[case](workers, flat, flat.shape, Sign("l1")) for flat in vectors)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


@taking_turns(2, 3, each=list(TRANSPORTS))
def test_a_worker_of_no_weight_takes_no_part_even_with_nan(workers, case):
    flat = vector(workers.rank, 9)
    others = everyones(workers, flat)[1:]
    if workers.rank == 0:
        flat.fill_(float("nan"))
    weights = [0.0] + [1.0] * (workers.size - 1)
    mean = TRANSPORTS[case](workers, flat, (9,), Identity(), weights=weights)
    np.testing.assert_allclose(mean.numpy(), others.mean(0), rtol=0, atol=1e-14)


@taking_turns(1, 2, 3, 8, each=list(TRANSPORTS))
def test_all_workers_get_the_same_bits_of_predicted_size(workers, case):
    for compressor in COMPRESSORS:
        for segments in SEGMENTS:
            for dtype in (torch.float32, torch.float64):
                flat = vector(workers.rank, sum(segments)).to(dtype)
                generator = seeded_generator(1, workers.rank)
                before = workers.traffic.copy()
                mean = TRANSPORTS[case](workers, flat, segments, compressor, generator)
                sent = (workers.traffic - before).sent
                rows = everyones(workers, mean)
                assert (rows == rows[0]).all(), (compressor, segments)
                expected = [mean_bytes(compressor, segments, dtype, workers.size, rank) for rank in range(workers.size)]
                everywhere = [row[0] for row in workers.gather([sent])]
                if case == "two_shot":
                    assert sent == expected[workers.rank]
                assert sum(everywhere) == sum(expected)


@settings(derandomize=True, database=None, deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    size=st.integers(1, 8),
    segments=st.lists(st.sampled_from([0, 1, 7, 8, 9, 130]), max_size=5).map(tuple),
    compressor=st.sampled_from(COMPRESSORS),
    transport=st.sampled_from(list(TRANSPORTS)),
    seed=st.integers(0, 99),
)
def test_any_lengths_between_any_number_of_workers(size, segments, compressor, transport, seed):
    """Equal bits of the predicted size, and zeros stay zeros."""

    def check(workers):
        flat = vector(workers.rank, sum(segments), seed)
        before = workers.traffic.copy()
        mean = TRANSPORTS[transport](workers, flat, segments, compressor, seeded_generator(seed, workers.rank))
        sent = sum(row[0] for row in workers.gather([(workers.traffic - before).sent]))
        assert sent == sum(mean_bytes(compressor, segments, flat.dtype, size, rank) for rank in range(size))
        rows = everyones(workers, mean)
        assert np.isfinite(rows).all()
        assert (rows == rows[0]).all()
        zeros = torch.zeros_like(flat)
        assert not TRANSPORTS[transport](workers, zeros, segments, compressor, seeded_generator(seed)).any()

    together(in_process(size, TIMEOUT), check)


@taking_turns(1, 2, 3, 5, 8)
def test_a_long_vector_between_any_number_of_workers(workers):
    flat = vector(workers.rank, 200_003).float()
    exact = flat.clone()
    exact.div_(complete(workers.sum(exact)))
    for transport, compressor in (("ring", QSGD(4, norm="max", bucket=512)), ("two_shot", Sign("l2"))):
        mean = TRANSPORTS[transport](workers, flat, (200_003,), compressor, seeded_generator(1, workers.rank))
        assert len({row[0] for row in workers.gather([zlib.crc32(mean.numpy().tobytes())])}) == 1
        error = float((mean - exact).norm() / exact.norm())
        assert 0.01 < error < (0.8 if transport == "ring" else 1.5)


@taking_turns(1, 3, each=list(TRANSPORTS))
def test_what_is_not_finite_is_refused_and_not_sent(workers, case):
    for bad in (float("nan"), float("inf"), -float("inf")):
        for compressor in COMPRESSORS:
            flat = vector(workers.rank, 40)
            flat[::13] = bad  # in the chunks of all workers
            with pytest.raises(ValueError, match="not finite"):
                TRANSPORTS[case](workers, flat, (40,), compressor, seeded_generator(1, workers.rank))


@taking_turns(2, 3, 4, each=[Sign("l1"), Sign("l2"), TopK(0.3), QSGD(3, norm="max", contractive=True)])
def test_what_is_left_out_is_sent_later_on_both_sides(workers, case):
    """Sum of means sent = sum of true means - the residual of the mean, whatever the compressor."""
    segments, steps = (20, 13), 30
    own = chunks(segments, workers.size)[workers.rank]
    residual, owner = torch.zeros(33, dtype=torch.float64), torch.zeros(own.stop - own.start, dtype=torch.float64)
    sent, wanted = torch.zeros(33, dtype=torch.float64), torch.zeros(33, dtype=torch.float64)
    generator = seeded_generator(2, workers.rank)
    for step in range(steps):
        flat = vector(workers.rank, 33, step)
        sent += TRANSPORTS["two_shot"](workers, flat, segments, case, generator, None, residual, owner)
        wanted += flat
    whole = residual / workers.size
    whole[own.start : own.stop] += owner
    missing = everyones(workers, whole).sum(0)
    np.testing.assert_allclose(sent.numpy() + missing, everyones(workers, wanted).mean(0), rtol=0, atol=1e-12)
    assert np.abs(missing).max() > 1e-3


@taking_turns(3, each=list(TRANSPORTS))
def test_an_unbiased_compressor_makes_an_unbiased_mean(workers, case):
    flat, draws = vector(workers.rank, 64), 300
    exact = everyones(workers, flat).mean(0)
    generator = seeded_generator(3, workers.rank)
    means = np.stack([TRANSPORTS[case](workers, flat, (64,), QSGD(3), generator).numpy() for _ in range(draws)])
    errors = means.mean(0) - exact
    z = errors / (means.std(0, ddof=1) / np.sqrt(draws))
    assert np.abs(z).max() < 4.5
    assert means.std(0).min() > 0
