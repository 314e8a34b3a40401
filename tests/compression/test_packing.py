import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_slowmo.compression.indices import decode_indices, encode_indices, index_bytes, nonzero
from lightning_slowmo.compression.packing import pack, packed_bytes, unpack

SIZES = [0, 1, 7, 8, 9, 1000]


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("count", [*SIZES, 300_001])
def test_packing_returns_what_it_was_given(bits, count):
    codes = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(bits), dtype=torch.int32)
    out = torch.empty(packed_bytes(count, bits), dtype=torch.uint8)
    for given_codes in [codes] + [codes.to(torch.uint8)] * (bits <= 8):
        pack(given_codes, bits, out)
        assert torch.equal(unpack(out, count, bits).to(torch.int32), codes)


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("count", [1, 8, 1000, 1_000_003])
def test_no_bit_is_wasted(bits, count):
    exact = -(-count * bits // 8)
    assert exact <= packed_bytes(count, bits) <= exact + 2
    if count % 8 == 0:
        assert packed_bytes(count, bits) == exact


@pytest.mark.parametrize("bits", [25, 31, 40])
def test_wide_integers(bits):
    codes = torch.randint(0, 2**bits, (77,), generator=torch.Generator().manual_seed(0))
    out = torch.empty(packed_bytes(77, bits), dtype=torch.uint8)
    pack(codes, bits, out)
    assert torch.equal(unpack(out, 77, bits).to(torch.int64), codes)


def test_pack_takes_the_low_bits_only():
    out = torch.empty(packed_bytes(3, 3), dtype=torch.uint8)
    pack(torch.tensor([-1, 8, 13]), 3, out)
    assert unpack(out, 3, 3).tolist() == [7, 0, 5]


@st.composite
def index_sets(draw):
    length = draw(st.integers(0, 3000))
    count = draw(st.integers(0, length))
    seed = draw(st.integers(0, 1000))
    chosen = torch.randperm(length, generator=torch.Generator().manual_seed(seed))[:count]
    return length, chosen.sort().values


@given(index_sets())
def test_index_sets_return(index_set):
    length, indices = index_set
    out = torch.empty(index_bytes(length, len(indices)), dtype=torch.uint8)
    encode_indices(indices, length, out)
    assert torch.equal(decode_indices(out, length, len(indices)), indices)
    bitmap = -(-length // 8)
    assert len(out) <= bitmap  # never worse than a bitmap
    if len(indices):
        width = (length - 1).bit_length()
        assert len(out) <= -(-len(indices) * (width + 2) // 8) + 4  # nor, but for a few bytes, than a list


def test_extreme_index_sets_fit_the_same_bytes():
    for indices in (torch.arange(100), torch.arange(99_900, 100_000), torch.arange(0, 100_000, 1000)):
        out = torch.empty(index_bytes(100_000, 100), dtype=torch.uint8)
        encode_indices(indices, 100_000, out)
        assert torch.equal(decode_indices(out, 100_000, 100), indices)


def test_one_percent_takes_less_than_nine_bits_an_index():
    assert index_bytes(25_600_000, 256_000) * 8 < 8.6 * 256_000


@given(st.lists(st.booleans(), max_size=100), st.integers(0, 9))
def test_nonzero_agrees_with_torch(flags, offset):
    mask = torch.tensor([False] * offset + flags, dtype=torch.int8)[offset:]
    assert torch.equal(nonzero(mask), torch.nonzero(mask).view(-1))
