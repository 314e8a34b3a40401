"""The grid with a random shift, against the formula of the QSDP paper."""

import numpy as np
import pytest
import torch

from lightning_slowmo.compression import ShiftedGrid, seeded_generator


def rounded(grid, x, seed=0, segments=None):
    segments = segments or [x.numel()]
    return grid.decompress(grid.compress(x, segments, seeded_generator(seed)), segments, x.dtype)


def reference(x, bits, bucket, shift, segments):
    """d round(x / d - r) + d r, where x is counted from the smallest of its bucket."""
    out, begin = [], 0
    for length in segments:
        tensor = x[begin : begin + length]
        for start in range(0, length, bucket):
            part = tensor[start : start + bucket]
            low, d = part.min(), (part.max() - part.min()) / (2**bits - 1)
            out.append(part if d == 0 else low + d * np.round((part - low) / d - shift) + d * shift)
        begin += length
    return np.concatenate(out)


@pytest.mark.parametrize("bits", [1, 3, 8, 11])
def test_it_is_the_papers_formula(bits):
    segments = [7, 0, 64, 130]
    x = torch.randn(sum(segments), dtype=torch.float64, generator=seeded_generator(3))
    x[71:] *= 100  # another scale, which the buckets of the others must not see
    shift = torch.rand((), generator=seeded_generator(5)).item() - 0.5
    expected = reference(x.numpy(), bits, 64, shift, segments)
    assert np.allclose(rounded(ShiftedGrid(bits, 64), x, 5, segments).numpy(), expected, rtol=0, atol=1e-12)


def test_over_the_shifts_every_element_is_unbiased_and_never_farther_than_half_a_step():
    grid, draws = ShiftedGrid(bits=3, bucket=32), 4000
    x = torch.randn(32, dtype=torch.float64, generator=seeded_generator(1))
    step = (x.max() - x.min()) / 7
    errors = torch.stack([rounded(grid, x, seed) - x for seed in range(draws)])
    assert errors.abs().max() <= step / 2 + 1e-12
    assert errors.mean(0).abs().max() < 4.5 * step / (12 * draws) ** 0.5
    assert errors.std(0).mean().item() == pytest.approx(step.item() / 12**0.5, rel=0.02)


def test_one_shift_serves_all_elements():
    x = torch.tensor([0.0, 0.3, 0.3, 1.0, 0.0, 0.3, 0.3, 1.0])
    out = rounded(ShiftedGrid(bits=2, bucket=4), x)
    assert out[:4].equal(out[4:])
    assert out[1] == out[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_constants_and_extremes(dtype):
    x = torch.tensor([2.5] * 5 + [0.0] * 5 + [-1e30, 1e30, 0, 0, 0], dtype=dtype)
    out = rounded(ShiftedGrid(bits=8, bucket=5), x)
    assert out[:10].equal(x[:10])
    assert out.isfinite().all()


def test_the_size_is_known_beforehand():
    grid = ShiftedGrid(bits=8, bucket=1024)
    assert grid.payload_bytes([1024 * 1024]) == 1024 * 1024 * (1 + 8 / 1024)
    assert ShiftedGrid(bits=4, bucket=100).payload_bytes([150, 50]) == 3 * 8 + 100
    assert grid.unbiased
    assert grid.contraction(1024) == pytest.approx(1 - 1024 / (6 * 255**2))


@pytest.mark.parametrize(
    ("options", "message"), [({"bits": 0}, "1 to 16"), ({"bits": 17}, "1 to 16"), ({"bucket": 0}, "1 element")]
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ShiftedGrid(**options)


def test_a_payload_cannot_carry_nan():
    with pytest.raises(ValueError, match="not finite"):
        rounded(ShiftedGrid(), torch.tensor([1.0, float("nan")]))
