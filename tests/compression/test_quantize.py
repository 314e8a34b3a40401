import pytest
import torch

from lightning_slowmo.compression import QSGD, Cast, Sign, seeded_generator
from lightning_slowmo.compression.hashing import QuantizerNoise, draw_key, mix


def draws(compressor, x, copies):
    """Round ``x``, which must be one bucket long, ``copies`` times independently."""
    payload = compressor.compress(x.repeat(copies), None, seeded_generator(3))
    return compressor.decompress(payload, (len(x) * copies,), x.dtype).view(copies, -1).double()


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 9, 16])
@pytest.mark.parametrize("norm", ["l2", "max"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_qsgd_is_unbiased_with_exactly_the_predicted_variance(bits, norm, dtype):
    x, copies, levels = torch.randn(64, generator=seeded_generator(bits)).to(dtype), 3000, 2 ** (bits - 1) - 1
    x[5] = 0
    decoded = draws(QSGD(bits=bits, bucket=64, norm=norm), x.float() if dtype == torch.bfloat16 else x, copies)
    exact = x.double()
    scale = exact.norm() if norm == "l2" else exact.abs().max()
    rest = (exact.abs() * levels / scale).frac()
    variance = (scale / levels) ** 2 * rest * (1 - rest)
    # A float32 element is known to half a unit in the last place, which is a visible part of a step at 16 bits.
    precision = 0 if dtype == torch.float64 else 2.0**-23 * exact.abs().max()
    assert ((decoded.mean(0) - exact).abs() <= 4.5 * (variance / copies).sqrt() + precision + 1e-12).all()
    errors = (decoded - exact).square().sum(1)
    assert abs(errors.mean() - variance.sum()) <= 4.5 * errors.std() / copies**0.5 + 64 * precision**2
    assert (decoded[:, 5] == 0).all()


def test_qsgd_error_obeys_the_bound():
    x = torch.randn(256, generator=seeded_generator(0), dtype=torch.float64)
    for levels in (1, 4, 16, 100):
        qsgd = QSGD(levels=levels, bucket=256)
        assert qsgd.variance(256) == min(256 / levels**2, 16 / levels)
        assert (draws(qsgd, x, 200) - x).square().sum(1).mean() <= qsgd.variance(256) * x.square().sum()


def test_qsgd_decodes_to_levels_of_its_bucket():
    x = torch.randn(1000, generator=seeded_generator(0), dtype=torch.float64)
    qsgd = QSGD(bits=4, bucket=64)
    decoded = qsgd.decompress(qsgd.compress(x, (1000,), seeded_generator(1)), (1000,), x.dtype)
    for bucket, original in zip(decoded.split(64), x.split(64), strict=True):
        level = bucket / original.norm() * 7
        torch.testing.assert_close(level, level.round(), rtol=0, atol=1e-12)
        assert (level.abs() <= 7).all()
        assert ((level - original / original.norm() * 7).abs() < 1).all()


def test_contractive_qsgd_is_the_unbiased_one_scaled_down():
    x = torch.randn(100, generator=seeded_generator(0), dtype=torch.float64)
    plain, scaled = draws(QSGD(bits=3, bucket=64), x, 1), draws(QSGD(bits=3, bucket=64, contractive=True), x, 1)
    torch.testing.assert_close(scaled[:, :64] * (1 + 8 / 3), plain[:, :64], rtol=1e-12, atol=0)
    torch.testing.assert_close(scaled[:, 64:] * (1 + 2), plain[:, 64:], rtol=1e-12, atol=0)  # 36 elements: 6 / 3


def test_qsgd_buckets_stop_at_tensors():
    """A tensor of large values must not drown its small neighbour."""
    flat = torch.cat([torch.full((10,), 1e6), torch.full((10,), 1e-6)])
    qsgd = QSGD(bits=4, bucket=64, norm="max")
    torch.testing.assert_close(qsgd.decompress(qsgd.compress(flat, (10, 10), seeded_generator(0)), (10, 10)), flat)


def test_qsgd_noise_is_independent_between_seeds():
    x = torch.full((1024,), 0.3)
    qsgd = QSGD(bits=4, bucket=64)
    one, other = (qsgd.decompress(qsgd.compress(x, None, seeded_generator(0, rank)), (1024,)) - x for rank in (0, 1))
    correlation = torch.corrcoef(torch.stack([one, other]))[0, 1]
    assert correlation.abs() < 4.5 / 32


@pytest.mark.parametrize("bucket", [3, 64, 4096])
def test_noise_is_a_function_of_key_bucket_and_place(bucket):
    """However it is asked for: in panels of any height, in order or not."""
    key, words, buckets = draw_key(seeded_generator(5), torch.device("cpu")), -(-bucket // 8), 600
    noise = QuantizerNoise(key, bucket, buckets, longest=100)
    start, golden = int(key), 0x9E3779B97F4A7C15
    for first, rows, width in [(0, 100, bucket), (100, 1, 2), (101, 50, bucket), (590, 10, bucket), (7, 1, 1)]:
        bits = noise.fine(first, rows, width)
        assert bits.shape == (rows, width)
        for row, place in [(0, 0), (rows - 1, width - 1), (rows // 2, width // 2)]:
            word = mix(start + ((first + row) * words + place // 8 - 1) * golden)  # mix adds a golden ratio first
            assert bits[row, place] == word >> 8 * (place % 8) & 0xFF
    coarse = [mix(start + (-2 - number // 4) * golden) >> 16 * (number % 4) & 0xFFFF for number in range(buckets)]
    assert (noise.coarse.int() & 0xFFFF).tolist() == coarse


def test_a_generator_is_asked_for_one_number():
    one, other = seeded_generator(5), seeded_generator(5)
    QSGD(bits=4).compress(torch.randn(5000, generator=seeded_generator(0)), None, one)
    draw_key(other, torch.device("cpu"))
    assert torch.equal(one.get_state(), other.get_state())


def test_qsgd_bits_on_the_wire():
    assert QSGD(bits=4, bucket=512).payload_bytes([1024]) == 512 + 8
    assert QSGD(bits=4, bucket=512).payload_bytes([1024], torch.float64) == 512 + 16
    assert QSGD(levels=7).payload_bytes([1024]) == QSGD(bits=4).payload_bytes([1024])
    assert QSGD(bits=3, bucket=512, norm="max").payload_bytes([25_600_000]) < 0.1 * 4 * 25_600_000


def test_cast_rounds_to_nearest():
    x = torch.randn(1000, generator=seeded_generator(0))
    for to, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        cast = Cast(to)
        assert torch.equal(cast.decompress(cast.compress(x), (1000,)), x.to(dtype).float())
    int8 = Cast("int8", bucket=100)
    error = (int8.decompress(int8.compress(x), (1000,)) - x).view(10, 100)
    assert (error.abs() <= x.view(10, 100).abs().amax(1, keepdim=True) / 254 * 1.0001).all()


def test_cast_takes_vectors_not_matrices_only():
    """Any length, scalars included: some libraries cast only two-dimensional tensors, and send others uncast."""
    for to, width in (("bf16", 2), ("fp16", 2)):
        assert [Cast(to).payload_bytes([length]) for length in (0, 1, 7)] == [0, width, 7 * width]
    assert [Cast("int8").payload_bytes([length]) for length in (0, 1, 7, 1024)] == [0, 5, 11, 1032]


def test_cast_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="fp16, is not finite"):
        Cast("fp16").compress(torch.tensor([1e6]))


@pytest.mark.parametrize("seed", range(3))
def test_sign_error_formulas(seed):
    x = torch.randn(501, generator=seeded_generator(seed), dtype=torch.float64)
    x[::3] = 0
    first, second = x.abs().sum(), x.norm()
    predicted = {"l1": 1 - first**2 / (501 * second**2), "l2": 2 - 2 * first / (501**0.5 * second)}
    for scale, error in predicted.items():
        sign = Sign(scale)
        decoded = sign.decompress(sign.compress(x), (501,), x.dtype)
        torch.testing.assert_close((x - decoded).square().sum() / second**2, error, rtol=1e-12, atol=0)
        assert torch.equal(decoded > 0, x >= 0)  # the sign of zero is +1
    sign = Sign("l2")
    torch.testing.assert_close(sign.decompress(sign.compress(x), (501,), x.dtype).norm(), second, rtol=1e-12, atol=0)


def test_sign_has_a_scale_for_each_tensor():
    sign, flat = Sign("l1"), torch.tensor([1.0, -3.0, 100.0, 5.0, -5.0, 8.0])
    decoded = sign.decompress(sign.compress(flat, (2, 1, 0, 3)), (2, 1, 0, 3))
    assert decoded.tolist() == [2, -2, 100, 6, -6, 6]
    assert sign.payload_bytes((2, 1, 0, 3)) == 4 * 4 + 1


def test_sign_l2_expands_sparse_vectors():
    assert Sign("l2").contraction(100) is None
    x = torch.zeros(100)
    x[0] = 1
    sign = Sign("l2")
    assert (x - sign.decompress(sign.compress(x), (100,))).norm() > x.norm()
