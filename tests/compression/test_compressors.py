"""What holds for every compressor."""

import pickle
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_slowmo.compression import (
    QSGD,
    Cast,
    Compressor,
    CountSketch,
    Identity,
    RandomK,
    Sign,
    SignTopK,
    TopK,
    seeded_generator,
    slice_segments,
)

COMPRESSORS = [
    Identity(),
    Cast("bf16"),
    Cast("fp16"),
    Cast("int8", bucket=100),
    Sign("l1"),
    Sign("l2"),
    QSGD(bits=2),
    QSGD(bits=3, bucket=100, norm="max"),
    QSGD(bits=4, contractive=True),
    QSGD(levels=5),
    QSGD(bits=12),
    TopK(fraction=0.1),
    TopK(k=3, values=QSGD(bits=8, norm="max")),
    TopK(fraction=0.6, values=Cast("bf16")),
    RandomK(fraction=0.2),
    RandomK(k=5, rescale=True),
    RandomK(fraction=0.1, values=QSGD(bits=4)),
    SignTopK(fraction=0.1),
    CountSketch(rows=3, columns=64),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SEGMENTS = [(0,), (1,), (7,), (8,), (9,), (1000,), (), (0, 0), (1, 0, 3, 1), (300, 0, 1, 64, 7, 512, 0)]

every_compressor = pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)


def vector(segments, dtype=torch.float32, seed=0):
    return torch.randn(sum(segments), generator=seeded_generator(seed), dtype=torch.float64).to(dtype)


def round_trip(compressor, flat, segments, seed=1):
    payload = compressor.compress(flat, segments, seeded_generator(seed))
    return payload, compressor.decompress(payload, segments, flat.dtype)


@every_compressor
@settings(max_examples=20, deadline=None)
@given(
    segments=st.one_of(
        st.sampled_from(SEGMENTS), st.lists(st.sampled_from([0, 1, 2, 7, 8, 9, 130]), max_size=6).map(tuple)
    ),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_size_type_and_determinism(compressor, segments, dtype, seed):
    flat = vector(segments, dtype, seed)
    untouched = flat.clone()
    payload, decoded = round_trip(compressor, flat, segments)
    assert payload.dtype == torch.uint8
    assert payload.shape == (compressor.payload_bytes(segments, dtype),)
    assert decoded.dtype == dtype
    assert decoded.shape == flat.shape
    assert torch.isfinite(decoded).all()
    assert torch.equal(flat, untouched)
    # The same seed makes the same payload, and the same payload the same vector, wherever the payload lies.
    assert torch.equal(payload, round_trip(compressor, flat, segments)[0])
    elsewhere = torch.empty(len(payload) + 3, dtype=torch.uint8)[3:].copy_(payload)
    assert torch.equal(compressor.decompress(elsewhere, segments, dtype), decoded)
    out = torch.full_like(decoded, float("nan"))
    assert compressor.decompress(payload, segments, dtype, out=out) is out
    assert torch.equal(out, decoded)
    # What it says can be added without making a vector of it.
    compressor.decode(elsewhere, segments, dtype).add_to(out, 0.5)
    assert torch.equal(out, decoded.add(decoded, alpha=0.5))


@every_compressor
def test_a_large_vector(compressor):
    segments = (1_000_003,)
    flat = vector(segments)
    payload, decoded = round_trip(compressor, flat, segments)
    assert len(payload) == compressor.payload_bytes(segments)
    assert torch.isfinite(decoded).all()
    omega = compressor.contraction(1_000_003)
    if omega is not None:
        assert (flat - decoded).norm() ** 2 <= (1 - omega) * flat.norm() ** 2 * 1.01


@every_compressor
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_decode_to_exact_zeros(compressor, dtype):
    segments = (3, 0, 200, 1)
    decoded = round_trip(compressor, torch.zeros(204, dtype=dtype), segments)[1]
    assert torch.equal(decoded, torch.zeros(204, dtype=dtype))
    if not isinstance(compressor, CountSketch):  # a zero tensor beside another; a sketch has no segments
        flat = torch.cat([torch.ones(50), torch.zeros(150)]).to(dtype)
        assert not round_trip(compressor, flat, (50, 150))[1][50:].any()


@every_compressor
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 150, 203])
def test_values_that_are_not_finite_are_refused(compressor, bad, place):
    flat = vector((204,))
    flat[place] = bad
    with pytest.raises(ValueError, match="not finite"):
        compressor.compress(flat, (3, 0, 200, 1), seeded_generator(0))


@every_compressor
def test_extreme_magnitudes_give_no_silent_nan(compressor):
    for scale in (1e-44, 1e-38, 1e-30, 1e-19, 1e18, 3e38):
        flat = torch.linspace(-1, 1, 101) * scale
        try:
            decoded = round_trip(compressor, flat, (101,))[1]
        except ValueError as error:
            assert scale > 1, error  # noqa: PT017
        else:
            assert not decoded.isnan().any()


@every_compressor
def test_global_randomness_is_untouched(compressor):
    before = torch.random.get_rng_state()
    round_trip(compressor, vector((300,)), (300,))
    assert torch.equal(torch.random.get_rng_state(), before)


@every_compressor
def test_arguments_that_do_not_fit_are_refused(compressor):
    generator = seeded_generator(0)
    with pytest.raises(ValueError, match=r"cannot compress torch\.int64"):
        compressor.compress(torch.arange(8), None, generator)
    with pytest.raises(ValueError, match="contiguous 1-D"):
        compressor.compress(torch.ones(8)[::2], None, generator)
    with pytest.raises(ValueError, match="contiguous 1-D"):
        compressor.compress(torch.ones(2, 4), None, generator)
    with pytest.raises(ValueError, match="add up to 7"):
        compressor.compress(torch.ones(8), (3, 4), generator)
    payload = compressor.compress(torch.ones(8), None, generator)
    with pytest.raises(ValueError, match="payload is"):
        compressor.decompress(payload[:-1], (8,))
    with pytest.raises(ValueError, match="payload is"):
        compressor.decode(payload[:-1], (8,))
    with pytest.raises(ValueError, match="payload is"):
        compressor.decompress(payload.view(torch.int8), (8,))
    with pytest.raises(ValueError, match="out is"):
        compressor.decompress(payload, (8,), out=torch.empty(8, dtype=torch.float64))
    if compressor.stochastic:
        with pytest.raises(ValueError, match="pass a generator"):
            compressor.compress(torch.ones(8))


@every_compressor
@pytest.mark.parametrize("length", [1, 2, 3, 4, 50, 300])
def test_contraction_factor_holds(compressor, length):
    omega = compressor.contraction(length)
    if omega is None:
        return
    assert 0 < omega <= 1
    normal = vector((length,), torch.float64)
    single = torch.zeros(length, dtype=torch.float64)
    single[length // 2] = 1
    cases = {
        "normal": normal,
        "equal": torch.ones_like(normal),
        "sparse": normal * (torch.arange(length) % 7 == 0),
        "one large element": single,
        "all others half a step of int8": single.clamp(min=0.5 / 127),
    }
    copies = 100 if compressor.stochastic else 1  # each copy is a tensor of its own, hence a draw of its own
    for name, x in cases.items():
        decoded = round_trip(compressor, x.repeat(copies), (length,) * copies)[1].view(copies, length)
        errors = (decoded - x).square().sum(1) / x.square().sum()
        error_of_mean = errors.std() / copies**0.5 if copies > 1 else 0
        assert errors.mean() <= 1 - omega + 4.5 * error_of_mean + 1e-10, name


@pytest.mark.parametrize("compressor", [c for c in COMPRESSORS if c.unbiased], ids=str)
def test_unbiased_compressors_are_unbiased(compressor):
    x, copies = vector((40,), torch.float64), 1000
    decoded = round_trip(compressor, x.repeat(copies), (40,) * copies)[1].view(copies, 40)
    deviation = decoded.std(0).clamp(min=1e-12) / copies**0.5
    assert ((decoded.mean(0) - x).abs() <= 4.5 * deviation).all()


@every_compressor
def test_float64_is_carried_in_float64(compressor):
    """Nothing is silently done in single precision: a vector of one element per tensor shows the precision."""
    if "Cast" in str(compressor):
        return
    flat = torch.tensor([1 / 3], dtype=torch.float64)
    shrunk = 1 + compressor.variance(1) if getattr(compressor, "contractive", False) else 1
    torch.testing.assert_close(round_trip(compressor, flat, (1,))[1], flat / shrunk, rtol=1e-14, atol=0)


@every_compressor
def test_configurations_are_values(compressor):
    copy = pickle.loads(pickle.dumps(compressor))
    assert copy == compressor
    assert hash(copy) == hash(compressor)
    with pytest.raises(AttributeError):
        compressor.anything = 1


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: QSGD(bits=1), "2 to 16"),
        (lambda: QSGD(bits=17), "2 to 16"),
        (lambda: QSGD(levels=0), "1 to 32767"),
        (lambda: QSGD(bucket=0), "at least 1"),
        (lambda: QSGD(norm="l1"), "'l2' and 'max'"),
        (lambda: Cast("fp8"), "'bf16', 'fp16' and 'int8'"),
        (lambda: Cast("int8", bucket=0), "at least 1"),
        (lambda: Sign("l0"), "'l1' and 'l2'"),
        (lambda: TopK(fraction=0), "above 0"),
        (lambda: TopK(fraction=1.5), "at most 1"),
        (lambda: RandomK(k=0), "at least 1"),
        (lambda: TopK(values="qsgd"), "must be a compressor"),
        (lambda: CountSketch(rows=4), "odd"),
        (lambda: CountSketch(columns=0), "at least 1"),
    ],
)
def test_wrong_settings_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_built_from_a_class_path():
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--compressor", type=Compressor)
    package = "lightning_slowmo.compression"
    values = {"class_path": f"{package}.QSGD", "init_args": {"bits": 8, "norm": "max"}}
    config = {"class_path": f"{package}.TopK", "init_args": {"fraction": 0.1, "values": values}}
    built = parser.instantiate_classes(parser.parse_object({"compressor": config})).compressor
    assert built == TopK(fraction=0.1, values=QSGD(bits=8, norm="max"))


def test_built_by_hydra():
    hydra = pytest.importorskip("hydra.utils")
    config = {"_target_": "lightning_slowmo.compression.SignTopK", "fraction": 0.1}
    assert hydra.instantiate(config) == SignTopK(fraction=0.1)


def test_seeded_generators_differ_by_rank_and_round():
    draws = {
        torch.randint(2**62, (), generator=seeded_generator(seed, rank, turn)).item()
        for seed in (0, 1)
        for rank in range(4)
        for turn in range(4)
    }
    assert len(draws) == 32
    again = torch.randint(2**62, (), generator=seeded_generator(1, 3, 3)).item()
    assert again in draws


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 20])
def test_slices_of_segments_cover_the_vector(parts):
    segments = (3, 0, 5, 1, 0, 8)
    borders = [17 * part // parts for part in range(parts + 1)]
    slices = [slice_segments(segments, start, stop) for start, stop in pairwise(borders)]
    assert [sum(lengths) for lengths in slices] == [b - a for a, b in pairwise(borders)]
    assert all(length > 0 for lengths in slices for length in lengths)
