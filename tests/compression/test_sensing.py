import pytest
import torch

from lightning_slowmo.compression import Sensing, seeded_generator


def vectors(count, length, seed=0, dtype=torch.float64):
    return torch.randn(count, length, generator=seeded_generator(seed), dtype=dtype)


def sparse(length, places, seed=0):
    out = torch.zeros(length, dtype=torch.float64)
    chosen = torch.randperm(length, generator=seeded_generator(seed))[:places]
    out[chosen] = vectors(1, places, seed)[0]
    return out


def dealt(sensing, recovery, length):
    """The recovered vector."""
    height, blocks = sensing.height(length), sensing.shape(length)[1]
    values = recovery.values.new_zeros(height, blocks).scatter(0, recovery.positions, recovery.values).view(-1)
    assert not values[length:].any()
    return values[:length]


SENSINGS = [Sensing(0.3, 64, 1), Sensing(1.0, 64, 2), Sensing(0.1)]
LENGTHS = [0, 1, 2, 63, 64, 65, 5000]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("sensing", SENSINGS, ids=str)
def test_measurements_add_up(sensing, length):
    parts = vectors(4, length)
    total = sum(sensing.measure(part) for part in parts)
    assert total.shape == sensing.shape(length)
    torch.testing.assert_close(sensing.measure(parts.sum(0)), total, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("sensing", SENSINGS, ids=str)
def test_the_adjoint_is_one(sensing, length):
    x, table = vectors(1, length)[0], torch.randn(sensing.shape(length), generator=seeded_generator(5)).double()
    measured = (sensing.measure(x) * table).sum()
    torch.testing.assert_close(measured, (x * sensing.adjoint(table, length)).sum(), rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("sensing", SENSINGS, ids=str)
def test_the_matrix_is_signs_hadamard_and_chosen_rows(sensing):
    """Written out for one block: rows are orthonormal, of elements of one magnitude."""
    length = min(sensing.block, 256)
    matrix = torch.stack([sensing.measure(unit)[:, 0] for unit in torch.eye(length, dtype=torch.float64)], dim=1)
    assert matrix.shape[0] < length or sensing.measurements == 1
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(matrix)).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, length**-0.5), rtol=1e-12, atol=0)


def test_every_block_has_a_share_of_every_stretch_of_the_vector():
    sensing, x = Sensing(1.0, 64), torch.zeros(6400, dtype=torch.float64)
    x[1000:1200] = 1
    assert sensing.measure(x).square().sum(0).tolist() == pytest.approx([2.0] * 100)


@pytest.mark.parametrize(("length", "places", "share"), [(4096, 40, 0.1), (500, 5, 0.3), (1000, 1, 0.02), (64, 6, 0.6)])
def test_a_sparse_vector_is_recovered_exactly(length, places, share):
    sensing, x = Sensing(share, seed=3), sparse(length, places)
    recovery = sensing.recover(sensing.measure(x), length, places, iterations=60)
    torch.testing.assert_close(dealt(sensing, recovery, length), x, rtol=1e-10, atol=1e-12)
    assert recovery.rest.abs().max() < 1e-12


def test_a_sum_of_sparse_vectors_in_many_blocks_is_recovered_from_the_sum_of_measurements():
    sensing, length = Sensing(0.4, 512), 20_000
    parts = [sparse(length, 100, seed) for seed in range(4)]
    recovery = sensing.recover(sum(map(sensing.measure, parts)), length, 24, iterations=100)
    torch.testing.assert_close(dealt(sensing, recovery, length), sum(parts), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("length", LENGTHS)
def test_an_orthogonal_matrix_and_all_elements_give_the_vector(length):
    sensing, x = Sensing(1.0, 64), vectors(1, length)[0]
    recovery = sensing.recover(sensing.measure(x), length, sensing.height(length))
    torch.testing.assert_close(dealt(sensing, recovery, length), x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("iterations", [0, 1, 5])
@pytest.mark.parametrize("kept", [1, 8, 30])
def test_the_rest_is_what_is_not_explained_and_never_more_than_there_was(kept, iterations):
    sensing, length = Sensing(0.4, 64, 7), 1000
    for seed, scale in enumerate((1.0, 1e-30, 1e30)):
        x = scale * vectors(1, length, seed, torch.float32)[0]
        table = sensing.measure(x)
        recovery = sensing.recover(table, length, kept, iterations)
        explained = sensing.measure(dealt(sensing, recovery, length))
        torch.testing.assert_close(table - recovery.rest, explained, rtol=1e-4, atol=1e-5 * scale)
        before, after = ((t / scale).norm(dim=0) for t in (table, recovery.rest))
        assert (after < before).all()
        assert (recovery.positions.sort(0).values.diff(dim=0) > 0).all()


def test_more_iterations_come_nearer():
    sensing, x = Sensing(0.1), sparse(4096, 40)
    rests = [sensing.recover(sensing.measure(x), 4096, 40, n).rest.norm() for n in (0, 2, 5, 12)]
    assert rests == sorted(rests, reverse=True)
    assert rests[-1] < 1e-5 * rests[0]


def test_only_candidates_are_found():
    sensing, x = Sensing(0.5, 64), vectors(1, 300)[0]
    candidates = torch.arange(300) % 7 == 0
    found = dealt(sensing, sensing.recover(sensing.measure(x * candidates), 300, 20, 50, candidates=candidates), 300)
    torch.testing.assert_close(found, x * candidates, rtol=1e-9, atol=1e-9)
    nothing = sensing.recover(sensing.measure(x), 300, 5, candidates=torch.zeros(300, dtype=torch.bool))
    assert not nothing.values.any()


def test_a_part_of_the_blocks_is_recovered_as_in_the_whole_and_beyond_the_last_is_nothing():
    sensing, length = Sensing(0.5, 64), 1000  # 16 blocks, the last elements of some of which are missing
    x = vectors(1, length)[0]
    table = torch.nn.functional.pad(sensing.measure(x), (0, 2))
    whole, part = sensing.recover(table, length, 6), sensing.recover(table[:, 12:], length, 6, first=12)
    torch.testing.assert_close(part.values, whole.values[:, 12:])
    torch.testing.assert_close(part.rest, whole.rest[:, 12:])
    assert not whole.values[:, 16:].any()


def test_zeros_give_zeros():
    sensing = Sensing(0.5, 64)
    recovery = sensing.recover(torch.zeros(sensing.shape(1000)), 1000, 4)
    assert not recovery.values.any()
    assert not recovery.rest.any()


def test_all_workers_measure_alike():
    x = vectors(1, 300)[0]
    assert torch.equal(Sensing(0.5, 64, 5).measure(x), Sensing(0.5, 64, 5).measure(x))
    assert not torch.equal(Sensing(0.5, 64, 5).measure(x), Sensing(0.5, 64, 6).measure(x))
    # Signs and rows are part of checkpoints' meaning: these must never change.
    assert (Sensing(0.5, 8, 5).measure(torch.arange(8.0).double())[:, 0] * 8**0.5).round().tolist() == [4, 12, 12, -12]


def test_wrong_arguments_are_refused():
    for arguments, name in (((0.0,), "measurements"), ((1.5,), "measurements"), ((0.5, 100), "block")):
        with pytest.raises(ValueError, match=name):
            Sensing(*arguments)
    with pytest.raises(ValueError, match="0 to 64"):
        Sensing(0.5, 64).recover(torch.zeros(32, 2), 128, 65)
