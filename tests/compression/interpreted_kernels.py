"""The GPU kernels against the torch code, on the CPU, in Triton's interpreter.

``tests/test_interpreter.py`` runs this file in a process of its own, with ``TRITON_INTERPRET=1``.
"""

import pytest
import torch

from lightning_slowmo.compression import (
    QSGD,
    Cast,
    CountSketch,
    Identity,
    RandomK,
    Sign,
    SignTopK,
    TopK,
    kernels,
    seeded_generator,
)
from lightning_slowmo.compression.indices import decode_indices, encode_indices, index_bytes
from lightning_slowmo.compression.packing import pack, packed_bytes, unpack
from lightning_slowmo.compression.sparsify import top_indices

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")  # infinities that are then selected away

EXACT = [
    Identity(),
    Cast("bf16"),
    Cast("fp16"),
    Cast("int8", bucket=100),
    QSGD(bits=3, bucket=100, norm="max"),
    QSGD(bits=4, bucket=512, norm="max", contractive=True),
    QSGD(levels=5, bucket=3, norm="max"),
    QSGD(bits=16, bucket=4999, norm="max"),
    TopK(k=3, values=QSGD(bits=8, norm="max")),
    TopK(fraction=0.6, values=Cast("bf16")),
    RandomK(k=5, rescale=True),
    RandomK(fraction=0.1, values=QSGD(bits=4, norm="max")),
    CountSketch(rows=3, columns=600),
]
"""Compressors without sums of many elements: their payloads are the same to the bit."""

SUMMED = [
    Sign("l1"),
    Sign("l2"),
    QSGD(bits=4),
    QSGD(bits=12, bucket=5000),
    SignTopK(fraction=0.1),
]
"""Compressors with norms, whose last digits depend on the order of summation."""

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
SEGMENTS = [(1,), (300, 0, 1, 4097, 7), (1, 0, 101, 9)]

SHORT = (150, 0, 1, 7)
"""For other dtypes: where a tile ends does not depend on them, and the interpreter is slow."""

every_case = pytest.mark.parametrize(
    ("dtype", "segments"),
    [(torch.float32, segments) for segments in SEGMENTS] + [(dtype, SHORT) for dtype in DTYPES[1:]],
    ids=lambda value: str(value) if isinstance(value, torch.dtype) else f"{len(value)} of {sum(value)}",
)


def vector(segments, dtype=torch.float32):
    """Normally distributed elements, with zeros, equal elements and very small ones among them."""
    length = sum(segments)
    x = torch.randn(length, generator=seeded_generator(length), dtype=torch.float64)
    x[::7] = 0
    x[1::11] = 1.5
    x[2::13] *= 1e-30 if dtype == torch.bfloat16 else 1e-39  # the interpreter cannot read denormal bfloat16
    x[length // 2 : length // 2 + 70] = -0.0
    return x.to(dtype)


def on_both(compressor, flat, segments):
    """The payload of the torch code and that of the kernels, from the same random numbers."""
    expected = compressor.compress(flat, segments, seeded_generator(1))
    with kernels.interpreted():
        return expected, compressor.compress(flat, segments, seeded_generator(1))


def assert_decoded_alike(compressor, payload, segments, dtype):
    expected = compressor.decompress(payload, segments, dtype)
    with kernels.interpreted():
        decoded = compressor.decompress(payload, segments, dtype)
        told = torch.zeros_like(decoded)
        compressor.decode(payload, segments, dtype).add_to(told)
    assert torch.equal(decoded.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(told, expected)


@every_case
@pytest.mark.parametrize("compressor", EXACT, ids=str)
def test_payloads_have_the_same_bits(compressor, dtype, segments):
    expected, payload = on_both(compressor, vector(segments, dtype), segments)
    assert torch.equal(payload, expected)
    assert_decoded_alike(compressor, payload, segments, dtype)


def test_a_sketch_of_more_rows_than_three():
    sketch, segments = CountSketch(rows=5, columns=250), (1, 0, 101, 9)
    expected, payload = on_both(sketch, vector(segments), segments)
    assert torch.equal(payload, expected)
    assert_decoded_alike(sketch, payload, segments, torch.float32)


@every_case
@pytest.mark.parametrize("compressor", SUMMED, ids=str)
def test_payloads_with_norms_differ_by_rounding_only(compressor, dtype, segments):
    flat = vector(segments, dtype)
    expected, payload = on_both(compressor, flat, segments)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    _, norms = compressor.layout(segments, dtype)[0]
    if isinstance(compressor, (Sign, QSGD)):
        norms *= kind.itemsize
        tolerance = 64 * torch.finfo(kind).eps
        mine, theirs = payload[:norms].view(kind), expected[:norms].view(kind)
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=torch.finfo(kind).tiny)
    if isinstance(compressor, Sign):
        assert torch.equal(payload[norms:], expected[norms:])
    if isinstance(compressor, QSGD):  # a norm that differs in its last digit moves few elements to another level
        assert (payload[norms:] != expected[norms:]).sum() <= 1 + len(payload[norms:]) // 500
    assert_decoded_alike(compressor, payload, segments, dtype)


@pytest.mark.parametrize("compressor", [*EXACT, *SUMMED], ids=str)
def test_zeros_and_equal_elements(compressor):
    segments = (200, 0, 70, 1)
    flat = torch.cat([torch.zeros(200), torch.full((70,), -3.0), torch.zeros(1)])
    expected, payload = on_both(compressor, flat, segments)
    assert_decoded_alike(compressor, payload, segments, torch.float32)
    if compressor in EXACT:
        assert torch.equal(payload, expected)


@pytest.mark.parametrize("compressor", [*EXACT, *SUMMED], ids=str)
def test_values_that_are_not_finite_are_refused(compressor):
    for bad in (float("nan"), -float("inf")):
        flat = vector((204,))
        flat[150] = bad
        with kernels.interpreted(), pytest.raises(ValueError, match="not finite"):
            compressor.compress(flat, (3, 201), seeded_generator(0))


def test_a_chain_is_asked_once_and_names_what_failed():
    flat = torch.full((64,), 1e30)  # finite, but its square is not
    with kernels.interpreted(), pytest.raises(ValueError, match=r"^QSGD"):
        TopK(k=32, values=QSGD()).compress(flat, None, seeded_generator(0))


@pytest.mark.parametrize("shape", ["normal", "heavy", "integers", "sparse", "constant", "zero", "block"])
def test_the_largest_elements_of_tensors_larger_than_a_sample(shape):
    x = torch.randn(17_003, generator=seeded_generator(0))
    x = {
        "normal": lambda: x,
        "heavy": lambda: x / x.roll(1),
        "integers": lambda: (x * 2).round(),
        "sparse": lambda: x * (torch.arange(len(x)) % 1000 == 7),
        "constant": lambda: torch.ones_like(x),
        "zero": lambda: torch.zeros_like(x),
        "block": lambda: x * (1 + 1e6 * (torch.arange(len(x)) < 100)),
    }[shape]()
    order = torch.sort(x.abs(), descending=True, stable=True).indices
    for k in (170, 9_000):
        with kernels.interpreted():
            found = top_indices(x, k)
        assert torch.equal(found, order[:k].sort().values)


def test_a_sample_that_misleads_is_noticed():
    """Only sampled elements are large, so the bound is reached by fewer elements than are wanted."""
    length, k = 40_000, 1000
    x = torch.rand(length, generator=seeded_generator(0)) * 0.1
    places = torch.arange(1 << 14) * int(0.6180339887 * length) % length
    x[places[: k - 1]] += 1
    flat = torch.cat([torch.randn(50), x, torch.randn(20_000)])  # and its neighbours do not mind
    segments, counts = (50, length, 20_000), (5, k, 200)
    from lightning_slowmo.compression.kernels import select

    plan = select._plan(segments, counts, flat.device)
    plan[1, 4] = k - 1  # a rank that is too small, as an unlucky sample makes it
    with kernels.interpreted():
        found = select.top_indices(flat, segments, counts)
    expected = [top_indices(part, count) for part, count in zip(flat.split(segments), counts, strict=True)]
    expected[1] += 50
    expected[2] += 50 + length
    assert torch.equal(found, torch.cat(expected))


@pytest.mark.parametrize("bits", [1, 3, 7, 8, 12, 16, 31, 40])
@pytest.mark.parametrize("count", [0, 9, 1025])
def test_codes_are_packed_alike(bits, count):
    codes = torch.randint(-(2**62), 2**62, (count,), generator=torch.Generator().manual_seed(bits))
    expected, packed = torch.empty(2, packed_bytes(count, bits), dtype=torch.uint8)
    pack(codes, bits, expected)
    with kernels.interpreted():
        pack(codes, bits, packed)
        unpacked = unpack(packed, count, bits)
    assert torch.equal(packed, expected)
    assert torch.equal(unpacked, unpack(expected, count, bits))


@pytest.mark.parametrize(("length", "count"), [(1, 1), (10, 0), (10, 10), (100, 60), (5000, 50), (30_001, 299)])
def test_index_sets_are_coded_alike(length, count):
    indices = torch.randperm(length, generator=torch.Generator().manual_seed(count))[:count].sort().values
    for chosen in (indices, torch.arange(length - count, length)):
        expected, code = torch.empty(2, index_bytes(length, count), dtype=torch.uint8)
        encode_indices(chosen, length, expected)
        with kernels.interpreted():
            encode_indices(chosen, length, code)
            decoded = decode_indices(code, length, count)
        assert torch.equal(code, expected)
        assert torch.equal(decoded, chosen)


def test_heavy_hitters():
    sketch, x = CountSketch(rows=3, columns=500, seed=7), torch.randn(2500, generator=seeded_generator(0))
    table = sketch.sketch(x)
    indices, values = sketch.heavy_hitters(table, 2500, k=30)
    with kernels.interpreted():
        found = sketch.heavy_hitters(table, 2500, k=30)
    assert torch.equal(found[0], indices)
    assert torch.equal(found[1], values)
