import pytest
import torch

from lightning_slowmo.compression import CountSketch, seeded_generator


def vectors(count, length, dtype=torch.float64):
    return torch.randn(count, length, generator=seeded_generator(0), dtype=dtype)


@pytest.mark.parametrize("length", [0, 1, 99, 100, 101, 5000])
def test_sketches_add_up(length):
    sketch, parts = CountSketch(rows=5, columns=100, seed=3), vectors(4, length)
    total = sum(sketch.sketch(part) for part in parts)
    torch.testing.assert_close(sketch.sketch(parts.sum(0)), total, rtol=1e-10, atol=1e-10)


def test_a_wide_sketch_is_exact():
    sketch, x = CountSketch(rows=3, columns=500), vectors(1, 500)[0]
    assert torch.equal(sketch.estimate(sketch.sketch(x), 500), x)


@pytest.mark.parametrize("rows", [1, 3, 5, 7, 9])
def test_estimate_is_the_median_of_the_rows(rows):
    sketch, x = CountSketch(rows=rows, columns=16, seed=1), vectors(1, 200)[0]
    table = sketch.sketch(x)
    impulses = torch.stack([sketch.sketch(impulse) for impulse in torch.eye(200, dtype=torch.float64)])
    cells = (impulses * table).sum(2)  # an impulse shows the cell of its element in each row
    assert torch.equal(sketch.estimate(table, 200), cells.median(1).values)


def test_heavy_hitters_are_found_in_a_sum_of_sketches():
    sketch, parts = CountSketch(rows=5, columns=2000, seed=7), vectors(8, 100_000, torch.float32)
    heavy = torch.tensor([5, 77_777, 99_999])
    parts[:, heavy] += 100
    indices, values = sketch.heavy_hitters(sum(map(sketch.sketch, parts)), 100_000, k=3)
    assert torch.equal(indices, heavy)
    torch.testing.assert_close(values, parts.sum(0)[heavy], rtol=0.2, atol=0)


def test_cells_are_unbiased_with_the_predicted_variance():
    x, columns, seeds = vectors(1, 60)[0], 10, 3000
    cells = torch.stack([(s := CountSketch(1, columns, seed)).estimate(s.sketch(x), 60) for seed in range(seeds)])
    assert ((cells.mean(0) - x).abs() <= 4.5 * cells.std(0) / seeds**0.5).all()
    # Elements of the same block never collide, all others do with probability 1 / columns.
    blocks = x.square().view(6, 10).sum(1, keepdim=True)
    variance = ((blocks.sum() - blocks) / columns).expand(6, 10).reshape(-1)
    errors = (cells - x).square()
    assert ((errors.mean(0) - variance).abs() <= 4.5 * errors.std(0) / seeds**0.5).all()


def test_all_workers_hash_alike():
    table = CountSketch(rows=1, columns=4, seed=5).sketch(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]))
    assert table.abs().sum() >= 1
    assert torch.equal(table, CountSketch(rows=1, columns=4, seed=5).sketch(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])))
    assert table.tolist() != CountSketch(rows=1, columns=4, seed=6).sketch(torch.arange(5.0)).tolist()


def test_too_many_heavy_hitters_are_refused():
    sketch = CountSketch(rows=1, columns=4)
    with pytest.raises(ValueError, match="0 to 3"):
        sketch.heavy_hitters(sketch.sketch(torch.ones(3)), 3, k=4)
