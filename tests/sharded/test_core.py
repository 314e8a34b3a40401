"""Shards inside workers: every elementwise algorithm does on them what it does on whole models, to 1e-12 in float64."""

from dataclasses import replace
from datetime import timedelta
from functools import cache

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lightning_slowmo import BMUF, PRESETS, QPRSGD, QSDP, DiLoCo, Engine, LocalSGD, SlowMo
from lightning_slowmo.communication.in_process import in_process, together
from lightning_slowmo.compression import QSGD
from lightning_slowmo.sharded_core import ShardedCore, arrange
from tests.harness import run
from tests.sharded.networks import Network, make_optimizer, shard, train, values

STEPS = 8

SUPPORTED = [name for name, algorithm in PRESETS.items() if algorithm.fits_shards]
REFUSED = [name for name in PRESETS if name not in SUPPORTED]


def short(name):
    """A preset with a period that fits the test."""
    algorithm = PRESETS[name]
    return replace(algorithm, sync_every=3) if hasattr(algorithm, "sync_every") else algorithm


CASES = {
    # name: (workers, data parallel, tensor parallel), algorithm, optimizer, options
    **{name: ((2, 2, 1), short(name), "sgd", {}) for name in SUPPORTED},
    "adam": ((2, 2, 1), SlowMo(sync_every=3), "adam", {}),
    "adam reset": ((2, 2, 1), SlowMo(sync_every=3, inner_buffers="reset"), "adam", {}),
    "adam averaged": ((2, 2, 1), SlowMo(sync_every=3, inner_buffers="average"), "adam", {}),
    "clipping": ((2, 2, 1), SlowMo(sync_every=3), "sgd", {"clip": 0.3}),
    "accumulation": ((2, 2, 1), SlowMo(sync_every=3), "sgd", {"accumulate": 2}),
    "streaming": ((2, 2, 1), DiLoCo(sync_every=6, fragments=3, overlap=1), "adam", {}),
    "overlap": ((2, 2, 1), BMUF(sync_every=4, overlap=2), "sgd", {}),
    "no average": ((2, 2, 1), SlowMo(PRESETS["sgp"], sync_every=3, average=False), "sgd", {}),
    "wrapped": ((2, 2, 1), SlowMo(sync_every=3), "sgd", {}),
    "mixed precision": ((2, 2, 1), SlowMo(sync_every=3), "sgd", {}),
    "quantized": ((2, 2, 1), SlowMo(sync_every=3), "adam", {}),
    "one worker": ((1, 4, 1), SlowMo(sync_every=3), "sgd", {"clip": 0.3}),
    "four workers": ((4, 1, 1), SlowMo(sync_every=3), "sgd", {"clip": 0.3}),
    "tensor parallel": ((2, 1, 2), SlowMo(sync_every=3), "sgd", {}),
    "two dimensions": ((1, 2, 2), DiLoCo(sync_every=3), "adam", {"clip": 0.3}),
    "quantized in two dimensions": ((1, 2, 2), DiLoCo(sync_every=3), "adam", {"clip": 0.3}),
}


SHARDING = {
    "wrapped": {"compiler": "aot_eager"},
    "mixed precision": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float64)},
}
"""Options of :func:`shard`."""

TOLERANCE = {"mixed precision": 1e-5, "quantized": 1e-3, "quantized in two dimensions": 1e-3}

CAP = 2**-10
"""MiB of a bucket: the network needs several."""


def on_shards(rank, cases=CASES):
    results, cores = {}, {}
    for name, (sizes, algorithm, kind, options) in cases.items():
        if sizes not in cores:
            cores[sizes] = ShardedCore("slowmo", *sizes, sync_timeout=timedelta(seconds=20), bucket_cap_mb=CAP)
            cores[sizes].make_groups(0, rank, torch.device("cpu"))
        core = cores[sizes]
        core.algorithm = algorithm
        core.qsdp = QSDP(16, 16, bucket=8) if name.startswith("quantized") else None
        worker, place = divmod(rank, sizes[1] * sizes[2])
        network = shard(Network(), core.mesh, **SHARDING.get(name, {}))
        core.quantize(network)
        optimizer = make_optimizer(kind, network)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(1 + worker)  # the others start from the first worker's
        core.start_equal(network)
        core.engine = None
        engine = core.make_engine([optimizer], network)
        losses = train(engine, network, optimizer, worker, range(STEPS), place // sizes[2], sizes[1], **options)
        own = values(network)
        engine.finish()
        results[name] = losses, own, values(network), engine.total.count
    return results


def on_shards_and_more(rank):
    return {"cases": on_shards(rank), "batch norm": batch_norm(rank), "refused": refused(rank)}


def batch_norm(rank):
    """A sharded model's own statistics after some steps, and those after the end."""
    core = ShardedCore(SlowMo(sync_every=3), 2, 2)
    core.make_groups(0, rank, torch.device("cpu"))
    mesh = core.mesh["data_parallel"]
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1)).double()
    for layer in (*model, model):
        fully_shard(layer, mesh=mesh)
    core.start_equal(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = core.make_engine([optimizer], model)
    for step in range(4):
        x = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4 * step + rank)) + rank
        model(x).square().mean().backward()
        optimizer.step()
        engine.after_step()
        optimizer.zero_grad()
    own = [buffer.clone() for buffer in model.buffers()]
    engine.finish()
    return own, [buffer.clone() for buffer in model.buffers()]


def refused(rank):
    """What there is to say to QSDP where nothing could be quantized, in processes and before."""
    core = ShardedCore("slowmo", 4, "auto", qsdp=QSDP())
    with pytest.raises(ValueError) as nothing_sent:  # noqa: PT011
        core.make_groups(0, rank, torch.device("cpu"))
    core = ShardedCore("slowmo", 1, "auto", qsdp=QSDP())
    core.make_groups(0, rank, torch.device("cpu"))
    with pytest.raises(ValueError) as not_sharded:  # noqa: PT011
        core.quantize(Network())
    return str(nothing_sent.value), str(not_sharded.value)


@cache
def all_of_it():
    return run(4, on_shards_and_more, limit=400)


def trained():
    return [results["cases"] for results in all_of_it()]


def on_whole_models(sizes, algorithm, kind, options):
    def one(workers):
        network = Network()
        optimizer = make_optimizer(kind, network)
        engine = Engine(algorithm, [optimizer], workers, module=network)
        losses = train(engine, network, optimizer, workers.rank, range(STEPS), **options)
        own = values(network)
        engine.finish()
        return losses, own, values(network), engine.total.count

    return together(in_process(sizes[0], timedelta(seconds=20)), one)


def distance(left, right):
    return max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True))


@pytest.mark.processes
@pytest.mark.parametrize("name", CASES)
def test_shards_do_what_whole_models_do(name):
    sizes, *_ = CASES[name]
    expected = on_whole_models(*CASES[name])
    start = values(Network())
    for rank, results in enumerate(trained()):
        losses, own, end, count = results[name]
        reference_losses, reference_own, reference_end, reference_count = expected[rank // (sizes[1] * sizes[2])]
        assert count == reference_count
        assert len(losses) == 2
        limit = TOLERANCE.get(name, 1e-12)
        assert max(abs(a - b) for a, b in zip(losses, reference_losses, strict=True)) < limit
        assert distance(own, reference_own) < limit
        assert distance(end, reference_end) < limit
        assert distance(own, start) > 1e-2


@pytest.mark.processes
def test_copies_that_tensor_parallel_processes_hold_stay_equal_where_messages_are_rounded():
    ends = [results["quantized in two dimensions"][2] for results in trained()]
    assert all(distance(end, ends[0]) < 1e-12 for end in ends)


@pytest.mark.processes
def test_quantized_messages_round_and_every_worker_rounds_by_itself():
    losses, *_ = on_whole_models(*CASES["quantized"])[0]
    for results in trained():
        assert max(abs(a - b) for a, b in zip(results["quantized"][0], losses, strict=True)) > 1e-9


@pytest.mark.processes
def test_statistics_of_batches_are_averaged_over_all_processes():
    found = [results["batch norm"] for results in all_of_it()]
    owns = [own for own, _ in found]
    for _, end in found:
        for index in (0, 1):  # mean and variance
            expected = torch.stack([own[index] for own in owns]).mean(0)
            assert (end[index] - expected).abs().max() < 1e-12
            assert (end[index] - owns[0][index]).abs().max() > 1e-2
        assert end[2] == 4


@pytest.mark.faults
@pytest.mark.processes
def test_a_layer_may_be_compiled_to_machine_code():
    expected = on_whole_models(*CASES["wrapped"])
    for rank, results in enumerate(run(4, compiled, limit=600)):
        assert distance(results["wrapped"][2], expected[rank // 2][2]) < 1e-12


def compiled(rank):
    SHARDING["wrapped"] = {"compiler": "inductor"}
    return on_shards(rank, {"wrapped": CASES["wrapped"]})


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.processes
def test_qsdp_without_messages_to_quantize_is_refused_on_all_processes():
    for results in all_of_it():
        nothing_sent, not_sharded = results["refused"]
        assert "data_parallel_size is 1, so it sends nothing" in nothing_sent
        assert "no fully_shard module in Network" in not_sharded
        assert "in configure_model" in not_sharded


def test_the_presets_that_go_with_shards_are_the_elementwise_ones():
    assert [
        *("allreduce", "local_sgd", "slowmo", "bmuf", "diloco", "muloco", "sgp", "osgp", "dpsgd"),
        *("slowmo_sgp", "slowmo_osgp", "slowmo_dpsgd"),
    ] == SUPPORTED


@pytest.mark.parametrize(
    "algorithm",
    [
        *REFUSED,
        SlowMo(compressor=QSGD()),
        SlowMo(QPRSGD()),
        DiLoCo(compressor=QSGD()),
        DiLoCo(outer_optimizer=torch.optim.Adam),
    ],
    ids=str,
)
def test_algorithms_that_look_at_whole_tensors_are_refused_by_name(algorithm):
    kind = (PRESETS[algorithm] if isinstance(algorithm, str) else algorithm).kind
    with pytest.raises(ValueError, match=rf"^{kind} does not say that it moves every element by itself"):
        ShardedCore(algorithm, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers must be an integer of at least 1 or None, got 0"),
        ({"workers": 1.5}, "workers must be an integer of at least 1 or None, got 1.5"),
        ({"data_parallel_size": "all"}, "data_parallel_size must be an integer of at least 1 or 'auto', got 'all'"),
        ({"tensor_parallel_size": True}, "tensor_parallel_size must be an integer of at least 1, got True"),
        ({"bucket_cap_mb": -1}, "bucket_cap_mb must be None or a number of MiB"),
        ({"qsdp": 8}, r"qsdp must be QSDP\(weight_bits=8, gradient_bits=8\) or the like, or None, got 8"),
        ({"qsdp": QSDP(), "data_parallel_size": 1}, "data_parallel_size is 1, so it sends nothing"),
    ],
)
def test_invalid_sizes_are_refused_before_anything_starts(options, message):
    with pytest.raises(ValueError, match=message):
        ShardedCore(LocalSGD(), **options)


def test_sizes_make_up_the_processes():
    assert arrange(2, "auto", 1, processes=8) == (2, 4, 1)
    assert arrange(None, "auto", 2, processes=8, machines=2) == (2, 2, 2)
    assert arrange(4, 1, 2, processes=8) == (4, 1, 2)
    for sizes in ((3, "auto", 1), (2, 3, 1), (8, "auto", 2)):
        with pytest.raises(ValueError, match=r"must be the number of processes, 8\.$"):
            arrange(*sizes, processes=8)
