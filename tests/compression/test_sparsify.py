import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_slowmo.compression import QSGD, Cast, RandomK, SignTopK, TopK, seeded_generator
from lightning_slowmo.compression.sparsify import top_indices


def decode(compressor, x, segments=None):
    segments = segments or (len(x),)
    return compressor.decompress(compressor.compress(x, segments, seeded_generator(1)), segments, x.dtype)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=50), st.data())
def test_top_indices_with_ties(values, data):
    k = data.draw(st.integers(1, len(values)))
    expected = sorted(sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))[:k])
    assert top_indices(torch.tensor(values, dtype=torch.float32), k).tolist() == expected


@settings(max_examples=15, deadline=None)
@given(
    shape=st.sampled_from(["normal", "heavy", "integers", "sparse", "constant", "zero", "periodic", "sorted", "block"]),
    k=st.sampled_from([1, 10, 500, 5000, 20_000, 60_000, 99_999]),
)
def test_the_sampled_threshold_changes_nothing(shape, k):
    x = torch.randn(100_003, generator=seeded_generator(0))
    x = {
        "normal": lambda: x,
        "heavy": lambda: x / x.roll(1),
        "integers": lambda: (x * 2).round(),
        "sparse": lambda: x * (torch.arange(len(x)) % 1000 == 7),
        "constant": lambda: torch.ones_like(x),
        "zero": lambda: torch.zeros_like(x),
        "periodic": lambda: x * (1 + 99 * (torch.arange(len(x)) % 9 == 4)),
        "sorted": lambda: x.sort().values,
        "block": lambda: x * (1 + 1e6 * (torch.arange(len(x)) < 100)),
    }[shape]()
    expected = torch.sort(x.abs(), descending=True, stable=True).indices[:k].sort().values
    assert torch.equal(top_indices(x, k), expected)


def test_top_k_keeps_a_share_of_each_tensor():
    x = torch.cat([torch.arange(1.0, 102.0), torch.tensor([0.001]), torch.arange(1.0, 11.0)])
    decoded = decode(TopK(fraction=0.1), x, (101, 1, 0, 10))
    assert [part.count_nonzero().item() for part in decoded.split([101, 1, 0, 10])] == [11, 1, 0, 1]
    assert torch.equal(decoded[decoded != 0], x[decoded != 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_kept_values_are_exact_in_their_own_type(dtype):
    x = torch.randn(200, generator=seeded_generator(0)).to(dtype)
    decoded = decode(TopK(k=50), x)
    kept = decoded != 0
    assert torch.equal(decoded[kept], x[kept])
    assert x[kept].abs().min() >= x[~kept].abs().max()
    bits = TopK(k=50, values=Cast("bf16")).payload_bytes([200], dtype)
    assert TopK(k=50).payload_bytes([200], dtype) - bits == 50 * (dtype.itemsize - 2)


def test_values_can_be_compressed_further():
    x = torch.randn(1000, generator=seeded_generator(0))
    exact, rounded = decode(TopK(k=64), x), decode(TopK(k=64, values=QSGD(bits=8, norm="max")), x)
    assert (exact - rounded).abs().max() <= x.abs().max() / 127
    assert torch.equal(rounded != 0, exact != 0)


@pytest.mark.parametrize("k", [1, 5, 300])
def test_sign_top_k_error_formula(k):
    x = torch.randn(300, generator=seeded_generator(k), dtype=torch.float64)
    decoded = decode(SignTopK(k=k), x)
    largest = x.abs().topk(k).values.sum()
    torch.testing.assert_close((x - decoded).square().sum(), x.square().sum() - largest**2 / k, rtol=1e-12, atol=1e-12)
    assert decoded.count_nonzero() == k
    assert torch.equal(decoded.sign()[decoded != 0], x.sign()[decoded != 0])


def test_sign_top_k_takes_ten_bits_for_each_element_kept():
    assert SignTopK(fraction=0.01).payload_bytes([1_000_000]) * 8 < 9.7 * 10_000


def test_random_k_keeps_every_element_equally_often():
    length, k, copies = 23, 5, 20_000
    x = torch.arange(1.0, length + 1)
    decoded = decode(RandomK(k=k), x.repeat(copies), (length,) * copies).view(copies, length)
    assert ((decoded == 0) | (decoded == x)).all()
    assert (decoded.count_nonzero(dim=1) == k).all()
    share, error = decoded.ne(0).double().mean(0), (k / length * (1 - k / length) / copies) ** 0.5
    assert ((share - k / length).abs() < 4.5 * error).all()


def test_random_k_needs_only_the_seed():
    assert RandomK(k=10).payload_bytes([1000]) == 8 + 40
    assert torch.equal(decode(RandomK(fraction=1.0), torch.arange(7.0)), torch.arange(7.0))


def test_random_k_rescaled():
    x = torch.ones(100)
    assert decode(RandomK(fraction=0.25, rescale=True), x).unique().tolist() == [0, 4]
    assert RandomK(fraction=0.25, rescale=True).contraction(100) is None
    assert RandomK(fraction=0.75, rescale=True).contraction(100) == pytest.approx(2 - 4 / 3)
    assert not RandomK(rescale=True, values=Cast("bf16")).unbiased
