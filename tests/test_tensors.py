"""Every kind of tensor that a model can have, between workers: averaged, copied, kept local, or refused by name."""

import io
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.nn.utils import parametrizations, prune

from lightning_slowmo import AllReduce, APMSqueeze, DiLoCo, Engine, LocalSGD, SensedSGD, SketchedSGD, SlowMo, Workers
from lightning_slowmo.communication import SyncError
from lightning_slowmo.communication.in_process import in_process, together
from lightning_slowmo.compression import QSGD
from lightning_slowmo.consistency import start_equal
from lightning_slowmo.presets import PRESETS
from lightning_slowmo.tensors import checksum, refusal
from tests.on_workers import TIMEOUT, taking_turns

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
PLAIN = partial(torch.optim.SGD, lr=0.1)
ADAM = partial(torch.optim.Adam, lr=0.05)


def errors_of(size, function):
    """What ``function(workers)`` raises on each of ``size`` workers."""

    def call(workers):
        with pytest.raises((SyncError, ValueError)) as caught:
            function(workers)
        return f"{type(caught.value).__name__}: {caught.value}"

    return together(in_process(size, TIMEOUT), call)


# Complex numbers ------------------------------------------------------------------------------------------------------

SHAPES = [(3, 4), (), (17,), (2, 3, 5)]
STEPS = 7


def noise(*key, shape, dtype=torch.complex128):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(hash(key)))


class Complex:
    """A problem in complex parameters, or in the pairs of reals that they are."""

    def __init__(self, workers, algorithm, optimizer, as_pairs, **options):
        starts = [noise(index, shape=shape) for index, shape in enumerate(SHAPES)]
        self.rank, self.as_pairs = workers.rank, as_pairs
        self.parameters = [Parameter(torch.view_as_real(start) if as_pairs else start) for start in starts]
        self.optimizer = optimizer(self.parameters)
        self.engine = Engine(algorithm, [self.optimizer], workers, **options)

    def step(self, number):
        for index, (parameter, shape) in enumerate(zip(self.parameters, SHAPES, strict=True)):
            pull = noise(self.rank, number, index, shape=shape)
            parameter.grad = parameter.detach() - (torch.view_as_real(pull) if self.as_pairs else pull)
        self.engine.after_backward()
        self.optimizer.step()
        self.engine.after_step()

    def values(self):
        pairs = [p if self.as_pairs else torch.view_as_real(p) for p in self.parameters]
        return torch.cat([p.detach().reshape(-1) for p in pairs])


SPECIAL = {
    "apmsqueeze": (APMSqueeze(warmup_steps=3), ADAM),
    "des_loc": (replace(PRESETS["des_loc"], sync_every=2), ADAM),
    "sketched_sgd": (SketchedSGD(uncompressed_below=1), PLAIN),
    "sensed_sgd": (SensedSGD(uncompressed_below=1), PLAIN),
}
OTHERS = {
    "averaged buffers of Adam": (SlowMo(sync_every=2, inner_buffers="average"), ADAM),
    "compressed": (SlowMo(sync_every=2, compressor=QSGD(bits=4)), SGD),
    "late and in parts": (DiLoCo(4, overlap=1, fragments=2), SGD),
    "small tensors": (SketchedSGD(uncompressed_below=10**6), PLAIN),
    "AllReduce inside": (SlowMo(AllReduce(), sync_every=2), SGD),
}


def often(algorithm):
    """An algorithm with so short a period that several syncs happen in a test."""
    return replace(algorithm, sync_every=2) if hasattr(algorithm, "sync_every") else algorithm


CASES = {name: SPECIAL.get(name, (often(algorithm), SGD)) for name, algorithm in PRESETS.items()} | OTHERS


@taking_turns(2, 3, each=list(CASES))
def test_complex_parameters_are_trained_as_the_pairs_of_reals_that_they_are(workers, case):
    algorithm, optimizer = CASES[case]
    complex_ones, pairs = (Complex(workers, algorithm, optimizer, as_pairs) for as_pairs in (False, True))
    for number in range(STEPS):
        complex_ones.step(number)
        pairs.step(number)
        torch.testing.assert_close(complex_ones.values(), pairs.values(), rtol=0, atol=1e-12)
    own = complex_ones.values()
    with complex_ones.engine.consensus(), pairs.engine.consensus():
        torch.testing.assert_close(complex_ones.values(), pairs.values(), rtol=0, atol=1e-12)
    assert torch.equal(complex_ones.values(), own)
    complex_ones.engine.finish()
    spread = torch.tensor(workers.gather(complex_ones.values().tolist()))
    assert (spread == spread[0]).all()


@taking_turns(2, each=list(CASES))
def test_training_on_complex_parameters_goes_on_bit_exactly_from_saved_state(workers, case):
    algorithm, optimizer = CASES[case]
    first, second = (Complex(workers, algorithm, optimizer, False) for _ in range(2))
    for number in range(3):
        first.step(number)
    file = io.BytesIO()
    torch.save([first.engine.shared_state(), first.engine.local_state(), first.optimizer.state_dict()], file)
    file.seek(0)
    shared, own, inner = torch.load(file, weights_only=True)
    for number in range(3, STEPS):
        first.step(number)
    expected = first.values()
    first.engine.finish()  # takes in what is still under way to the first ones
    second.optimizer.load_state_dict(inner)
    second.engine.load_shared_state(shared)
    second.engine.load_local_state(own)
    for number in range(3, STEPS):
        second.step(number)
    assert torch.equal(expected, second.values())


# The table ------------------------------------------------------------------------------------------------------------

AVERAGED, COPIED = "averaged", "worker 0's"
BUFFERS = {
    torch.float64: AVERAGED,
    torch.float32: AVERAGED,
    torch.float16: AVERAGED,
    torch.bfloat16: AVERAGED,
    torch.complex128: AVERAGED,
    torch.complex64: AVERAGED,
    torch.complex32: AVERAGED,
    torch.float8_e4m3fn: COPIED,
    torch.float8_e5m2: COPIED,
    torch.float4_e2m1fn_x2: COPIED,
    torch.int64: COPIED,
    torch.int32: COPIED,
    torch.int16: COPIED,
    torch.uint16: COPIED,
    torch.uint8: COPIED,
    torch.bool: COPIED,
}


def numbers(dtype, rank):
    """Three numbers of a dtype that differ by rank; of complex ones, real and imaginary parts have a sum of 0."""
    if dtype is torch.float4_e2m1fn_x2:
        return torch.tensor([2, 3, 4 + rank], dtype=torch.uint8).view(dtype)
    values = torch.tensor([2.0, 3.0, 4.0 + 2 * rank]) * (torch.tensor(1 - 1j) if dtype.is_complex else 1)
    return values.bool() ^ (rank > 0) if dtype is torch.bool else values.to(dtype)


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


@taking_turns(2, 3, each=list(BUFFERS))
def test_a_persistent_buffer_of_each_dtype_is_averaged_or_worker_0s_and_comes_back_bit_for_bit(workers, case):
    module = nn.Linear(1, 1)
    module.register_buffer("state", numbers(case, workers.rank))
    start_equal(module, workers)
    assert torch.equal(bits(module.state), bits(numbers(case, 0)))
    engine = Engine(LocalSGD(), [PLAIN(module.parameters())], workers, module=module)
    own = numbers(case, workers.rank)
    module.state.copy_(own)
    with engine.consensus():
        if BUFFERS[case] == AVERAGED:
            mean = sum(numbers(case, rank).to(torch.complex128) for rank in range(workers.size)) / workers.size
            torch.testing.assert_close(module.state.to(torch.complex128), mean, rtol=1e-2, atol=0)
        else:
            assert torch.equal(bits(module.state), bits(numbers(case, 0)))
    assert torch.equal(bits(module.state), bits(own))
    engine.finish()
    spread = workers.gather(bits(module.state).tolist())
    assert all(row == spread[0] for row in spread)


@taking_turns(2, 3, each=list(BUFFERS))
def test_a_frozen_parameter_of_each_dtype_keeps_its_bits_until_it_is_seen_to_change(workers, case):
    module = nn.Linear(1, 1)
    module.frozen = Parameter(numbers(case, 0), requires_grad=False)
    start_equal(module, workers)
    engine = Engine(LocalSGD(), [PLAIN([module.weight])], workers, module=module)
    with engine.consensus():
        assert torch.equal(bits(module.frozen), bits(numbers(case, 0)))
    with torch.no_grad():
        module.frozen.copy_(numbers(case, workers.rank))
    with engine.consensus():
        spread = workers.gather(bits(module.frozen).tolist())
        assert all(row == spread[0] for row in spread)
    assert torch.equal(bits(module.frozen), bits(numbers(case, workers.rank)))


@taking_turns(2, 3, each=[dtype for dtype, what in BUFFERS.items() if what == AVERAGED])
def test_trained_parameters_of_each_dtype_of_16_bits_or_more_are_averaged(workers, case):
    parameter = Parameter(numbers(case, 0))
    engine = Engine(SlowMo(LocalSGD(), sync_every=1, slow_momentum=0.0), [PLAIN([parameter])], workers)
    parameter.grad = numbers(case, workers.rank)
    engine._optimizers[0].step()
    engine.after_step()
    mean = sum(0.1 * numbers(case, rank).to(torch.complex128) for rank in range(workers.size)) / workers.size
    expected = numbers(case, 0).to(torch.complex128) - mean
    torch.testing.assert_close(parameter.detach().to(torch.complex128), expected, rtol=2e-2, atol=0)


@pytest.mark.parametrize("dtype", [dtype for dtype, what in BUFFERS.items() if dtype.is_floating_point])
def test_trained_parameters_of_fewer_bits_are_refused_by_name(dtype):
    module = nn.Linear(1, 1)
    module.codes = Parameter(numbers(dtype, 0))
    if BUFFERS[dtype] == AVERAGED:
        assert refusal(module.codes, trained=True) is None
        return
    for text in errors_of(2, lambda workers: Engine(LocalSGD(), [PLAIN(module.parameters())], workers, module=module)):
        assert text.startswith(f"ValueError: Parameter codes is trained in {dtype}")


def refused():
    eye = torch.eye(3)
    yield "sparse", eye.to_sparse(), "has the layout sparse_coo"
    yield "csr", eye.to_sparse_csr(), "has the layout sparse_csr"
    yield "meta", torch.empty(3, device="meta"), "is on the meta device"
    quantized = torch.quantize_per_tensor(eye, 0.1, 0, torch.qint8)
    yield "quantized", quantized, "is a quantized tensor"


@pytest.mark.filterwarnings("ignore:.*(deprecated|beta state).*")
@pytest.mark.parametrize("kind", ["sparse", "csr", "meta", "quantized"])
def test_persistent_buffers_that_cannot_be_sent_are_refused_by_name_and_local_ones_are_left_alone(kind):
    [(_, tensor, message)] = [case for case in refused() if case[0] == kind]

    def start(workers, persistent):
        module = nn.Sequential(nn.Linear(1, 1))
        module[0].register_buffer("odd", tensor, persistent)
        start_equal(module, workers)
        engine = Engine(LocalSGD(), [PLAIN(module.parameters())], workers, module=module)
        with engine.consensus():
            pass
        assert module[0].odd.layout is tensor.layout

    for text in errors_of(3, lambda workers: start(workers, True)):
        assert text.startswith(f"ValueError: 0.odd in Linear (0) {message}")
    if kind != "meta":  # has nothing that could be put aside
        together(in_process(3, TIMEOUT), lambda workers: start(workers, False))


# Lazy modules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_lazy_parameter_is_named_with_what_to_do_on_all_workers(size):
    module = nn.Sequential(nn.LazyLinear(3))
    for text in errors_of(size, lambda workers: start_equal(module, workers)):
        assert text.startswith(
            "ValueError: 0.weight in LazyLinear (0) has no shape yet, as its module is lazy: run one"
        )
    optimizer = PLAIN(module.parameters())
    for text in errors_of(size, lambda workers: Engine(LocalSGD(), [optimizer], workers, module=module)):
        assert text.startswith("ValueError: Parameter 0.weight has no shape yet")
    module(torch.zeros(1, 2))
    together(in_process(size, TIMEOUT), lambda workers: start_equal(module, workers))


def test_a_parameter_that_is_lazy_on_one_worker_alone_is_an_error_on_all():
    def start(workers):
        module = nn.Sequential(nn.LazyLinear(3))
        if workers.rank:
            module(torch.zeros(1, 2))
        start_equal(module, workers)

    for text in errors_of(2, start):
        assert "rank 0 has uninitialized, rank 1 has float32[3, 2] as 0.weight in LazyLinear (0)" in text or (
            "rank 0 has uninitialized, rank 1 has float32[3, 2] as 0.weight in Linear (0)" in text
        )


# Buffers --------------------------------------------------------------------------------------------------------------


def model_with(name, tensor, persistent=True):
    module = nn.Sequential(nn.Linear(2, 2), nn.Module())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(0.5)
    module[1].register_buffer(name, tensor, persistent)
    return module


@taking_turns(2, 3)
def test_buffers_that_are_not_persistent_stay_local_whatever_their_shapes(workers):
    module = model_with("cache", torch.full((1 + workers.rank,), float(workers.rank)), persistent=False)
    start_equal(module, workers)
    assert module[1].cache.tolist() == [workers.rank] * (1 + workers.rank)
    engine = Engine(LocalSGD(), [PLAIN(module.parameters())], workers, module=module)
    with engine.consensus():
        assert module[1].cache.tolist() == [workers.rank] * (1 + workers.rank)
        module[1].cache = torch.zeros(9)  # as a longer sequence in validation makes it grow
    assert module[1].cache.tolist() == [workers.rank] * (1 + workers.rank)
    engine.finish()
    assert module[1].cache.tolist() == [workers.rank] * (1 + workers.rank)


@taking_turns(2, 3)
def test_local_buffers_of_one_shape_start_from_those_of_rank_0(workers):
    module = model_with("features", torch.full((2,), float(workers.rank)), persistent=False)
    start_equal(module, workers)
    assert module[1].features.tolist() == [0, 0]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("visit", ["consensus", "finish"])
def test_persistent_buffers_of_other_shapes_are_an_error_on_all_that_names_them_before_anything_is_sent(size, visit):
    def train(workers):
        module = model_with("queue", torch.zeros(2))
        engine = Engine(LocalSGD(), [PLAIN(module.parameters())], workers, module=module)
        module[1].queue = torch.zeros(2 + workers.rank)
        own, sent = [p.detach().clone().add_(workers.rank) for p in module.parameters()], workers.traffic.collectives
        with torch.no_grad():
            for parameter, value in zip(module.parameters(), own, strict=True):
                parameter.copy_(value)
        try:
            engine.finish() if visit == "finish" else engine.enter_consensus()
        finally:
            assert workers.traffic.collectives == sent
            assert all(torch.equal(p, value) for p, value in zip(module.parameters(), own, strict=True))
            assert not engine.in_consensus

    has = ", ".join(f"rank {rank} has float32[{2 + rank}]" for rank in range(size))
    for text in errors_of(size, train):
        assert text.startswith(f"SyncError: The model differs between workers: {has} as 1.queue in Module (1).")
        assert "persistent=False" in text


def test_a_persistent_buffer_that_one_worker_lacks_is_an_error_on_all():
    def train(workers):
        module = model_with("queue", torch.zeros(2))
        engine = Engine(LocalSGD(), [PLAIN(module.parameters())], workers, module=module)
        if workers.rank == 1:
            module[0].register_buffer("extra", torch.zeros(1))
        engine.finish()

    for text in errors_of(2, train):
        assert "rank 0 has none, rank 1 has float32[1] as 0.extra in Linear (0)" in text


@taking_turns(2, 3)
def test_buffers_come_back_by_name_whatever_validation_did_to_them(workers):
    module = model_with("bound", torch.full((2,), float(workers.rank)))
    body = module[1]
    for name in ("grown", "resized", "deleted", "retyped"):
        body.register_buffer(name, torch.full((2,), float(workers.rank)))
    engine = Engine(LocalSGD(), [PLAIN(module.parameters())], workers, module=module)
    mean = (workers.size - 1) / 2
    objects = dict(body.named_buffers())
    for _ in range(2):
        with engine.consensus():
            assert all(buffer.tolist() == [mean, mean] for name, buffer in body.named_buffers() if name != "first")
            body.bound = body.bound + 1
            body.grown = torch.zeros(7)
            body.resized.resize_(5).fill_(3)
            del body.deleted
            body.retyped = body.retyped.half()
            body.register_buffer("first", torch.tensor([4.0]))
        assert all(dict(body.named_buffers())[name] is tensor for name, tensor in objects.items())
        assert all(tensor.tolist() == [workers.rank] * 2 for tensor in objects.values())
        assert body.first.tolist() == [4]
    engine.finish()
    assert body.deleted.tolist() == [mean, mean]


@taking_turns(2)
def test_buffers_are_saved_and_loaded_by_name_and_lists_of_older_checkpoints_too(workers):
    def make():
        module = model_with("queue", torch.full((3,), 7.0))
        module[1].register_buffer("cache", torch.zeros(1), persistent=False)
        return module, Engine(LocalSGD(), [PLAIN(module.parameters())], workers, module=module)

    module, engine = make()
    module[1].cache = torch.full((4,), float(workers.rank))
    with engine.consensus():
        state = engine.local_state()
    assert state["buffers"]["1.cache"].tolist() == [workers.rank] * 4
    later, resumed = make()
    resumed.load_local_state(state)
    assert later[1].cache.tolist() == [workers.rank] * 4
    older, resumed = make()
    resumed.load_local_state(state | {"buffers": [torch.full((3,), 8.0), torch.ones(1)]})
    assert [older[1].queue.tolist(), older[1].cache.tolist()] == [[8, 8, 8], [1]]


def test_a_saved_buffer_that_the_model_does_not_have_is_left_out_with_a_warning():
    module = model_with("cache", torch.ones(1), persistent=False)
    engine = Engine(LocalSGD(), [PLAIN(module.parameters())], Workers(), module=module)
    state = engine.local_state()
    del module[1].cache
    with pytest.warns(UserWarning, match="this worker's 1.cache, which the model does not have"):
        engine.load_local_state(state)


# Masks ----------------------------------------------------------------------------------------------------------------


def pruned(workers, different):
    """A model that is pruned by magnitude, from equal weights or from different ones."""
    module = nn.Sequential(nn.Linear(4, 4))
    with torch.no_grad():
        module[0].weight.copy_(torch.arange(16.0).view(4, 4))
        module[0].bias.fill_(0.5)
    engine = Engine(LocalSGD(), [PLAIN(module.parameters())], workers, module=module)
    if different and workers.rank:
        with torch.no_grad():
            module[0].weight.copy_(torch.arange(16.0).flip(0).view(4, 4))
    return module, engine


@taking_turns(2, 3)
def test_equal_masks_stay_binary_bit_for_bit(workers):
    module, engine = pruned(workers, different=False)
    prune.l1_unstructured(module[0], "weight", 0.5)
    mask = module[0].weight_mask.clone()
    with engine.consensus():
        assert torch.equal(module[0].weight_mask, mask)
    engine.finish()
    assert torch.equal(module[0].weight_mask, mask)


@pytest.mark.parametrize("size", [2, 3])
def test_masks_that_differ_are_an_error_on_all_that_says_how_to_prune(size):
    def train(workers):
        module, engine = pruned(workers, different=True)
        prune.l1_unstructured(module[0], "weight", 0.5)
        engine.finish()

    for text in errors_of(size, train):
        assert text.startswith("SyncError: The mask 0.weight_mask differs between workers: rank 1")
        assert "trainer.strategy.consensus()" in text


@taking_turns(2, 3)
def test_pruning_inside_the_consensus_gives_all_workers_one_mask_each_time(workers):
    module, engine = pruned(workers, different=True)
    own = module[0].weight.clone()
    for left in (8, 4):
        with engine.consensus():
            prune.l1_unstructured(module[0], "weight", 0.5)
        mask = module[0].weight_mask
        assert mask.sum() == left
        assert torch.equal(module[0].weight_orig, own)
        spread = workers.gather(mask.flatten().tolist())
        assert all(row == spread[0] for row in spread)
    engine.finish()
    assert module[0].weight_mask.sum() == 4


@taking_turns(2)
def test_what_is_binary_on_one_worker_only_or_has_no_parameters_shape_is_no_mask(workers):
    module = nn.Linear(2, 2)
    module.register_buffer("statistics", torch.full((2,), 1.0 if workers.rank else 3.0))
    module.register_buffer("seen", torch.tensor(float(workers.rank)))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(0.5)
    engine = Engine(LocalSGD(), [PLAIN(module.parameters())], workers, module=module)
    with engine.consensus():
        assert module.statistics.tolist() == [2, 2]
        assert module.seen.item() == 0.5


def test_checksums_of_masks_see_single_bits_and_swaps():
    mask = torch.zeros(1000)
    mask[::3] = 1
    sums = {checksum(mask)}
    for place in range(1000):
        other = mask.clone()
        other[place] = 1 - other[place]
        sums.add(checksum(other))
    assert len(sums) == 1001
    assert checksum(mask) != checksum(mask.roll(1))


PARAMETRIZED = [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal]


@taking_turns(2, 3, each=PARAMETRIZED)
def test_parametrized_weights_are_trained_and_end_equal(workers, case):
    module = case(nn.Linear(4, 4))
    start_equal(module, workers)
    optimizer = SGD(module.parameters())
    engine = Engine(SlowMo(sync_every=2), [optimizer], workers, module=module)
    for step in range(5):
        inputs = noise(workers.rank, step, shape=(8, 4), dtype=torch.float32)
        module(inputs).square().mean().backward()
        optimizer.step()
        engine.after_step()
        optimizer.zero_grad()
    with engine.consensus():
        assert module.weight.isfinite().all()
    engine.finish()
    module.eval()
    spread = workers.gather(module.weight.flatten().tolist())
    assert all(row == spread[0] for row in spread)


# Sparse gradients -----------------------------------------------------------------------------------------------------

WORDS = 12
START = torch.linspace(-1, 1, WORDS * 3, dtype=torch.float64).view(WORDS, 3)


def embedding(workers, algorithm, optimizer, sparse, steps=6, dtype=torch.float64, tied=False, idle=None):
    """Train an embedding on other words on each worker; one worker may have no words at a step."""
    table = nn.Embedding(WORDS, 3, sparse=sparse, dtype=dtype)
    unused = nn.Embedding(4, 2, sparse=sparse, dtype=dtype)
    with torch.no_grad():
        table.weight.copy_(START)
        unused.weight.fill_(1)
    made = optimizer([*table.parameters(), *unused.parameters()])
    engine = Engine(algorithm, [made], workers)
    for step in range(steps):
        words = torch.tensor([workers.rank, (workers.rank + step) % WORDS, 7, 7])
        loss = (table(words) * (1 + workers.rank)).square().sum()
        if tied and workers.rank == 0:
            loss = loss + table.weight.sum()  # dense here alone
        if workers.rank != idle:
            loss.backward()
        else:
            table.weight.grad = (
                torch.zeros_like(table.weight) if not sparse else torch.zeros_like(table.weight).to_sparse(1)
            )
        engine.after_backward()
        made.step()
        engine.after_step()
        made.zero_grad()
    engine.finish()
    torch.testing.assert_close(unused.weight.detach(), torch.ones_like(unused.weight))
    return table.weight.detach()


GRADIENTS = {"AllReduce": AllReduce(), "SlowMo over AllReduce": SlowMo(AllReduce(), sync_every=3)}
SKETCHES = {"SketchedSGD": SketchedSGD(uncompressed_below=10), "small SketchedSGD": SketchedSGD(uncompressed_below=99)}
SKETCHES |= {"SensedSGD": SensedSGD(uncompressed_below=10)}


@taking_turns(2, 3, each=list(GRADIENTS | SKETCHES))
def test_sparse_gradients_are_exchanged_as_dense_ones_are(workers, case):
    algorithm = (GRADIENTS | SKETCHES)[case]
    dense = embedding(workers, algorithm, PLAIN, sparse=False)
    torch.testing.assert_close(embedding(workers, algorithm, PLAIN, sparse=True), dense, rtol=0, atol=1e-12)


@taking_turns(2, 3, each=[torch.bfloat16, torch.float32])
def test_sparse_gradients_of_other_dtypes_are_exchanged_too(workers, case):
    dense, sparse = (embedding(workers, AllReduce(), PLAIN, sparse, 3, case) for sparse in (False, True))
    torch.testing.assert_close(sparse, dense, rtol=0, atol=1e-2 if case is torch.bfloat16 else 1e-6)


@taking_turns(2, 3)
def test_a_gradient_that_is_dense_on_one_worker_is_exchanged_dense(workers):
    dense, sparse = (embedding(workers, AllReduce(), PLAIN, sparse, tied=True) for sparse in (False, True))
    torch.testing.assert_close(sparse, dense, rtol=0, atol=1e-12)


@taking_turns(2, 3)
def test_sparse_adam_steps_on_the_rows_that_any_worker_has_and_keeps_all_equal(workers):
    adam = partial(torch.optim.SparseAdam, lr=0.1)
    trained = embedding(workers, AllReduce(), adam, sparse=True, idle=1)
    spread = workers.gather(trained.flatten().tolist())
    assert all(row == spread[0] for row in spread)
    moved = ((trained - START).abs() > 1e-6).any(1)
    assert moved[[7, 0, -1]].tolist() == [True, True, False]


LOCAL = {
    name: PRESETS[name]
    for name in PRESETS
    if name not in ("allreduce", "apmsqueeze", "des_loc", "sketched_sgd", "sensed_sgd")
}


@taking_turns(2, 3, each=list(LOCAL))
def test_local_algorithms_do_not_mind_sparse_gradients(workers, case):
    for optimizer in (PLAIN, partial(torch.optim.SparseAdam, lr=0.1), partial(torch.optim.Adagrad, lr=0.1)):
        trained = embedding(workers, often(LOCAL[case]), optimizer, sparse=True)
        spread = workers.gather(trained.flatten().tolist())
        assert all(row == spread[0] for row in spread)
    dense, sparse = (embedding(workers, often(LOCAL[case]), PLAIN, sparse) for sparse in (False, True))
    torch.testing.assert_close(sparse, dense, rtol=0, atol=1e-12)


def test_sparse_gradients_with_other_numbers_of_index_dimensions_are_an_error_on_all():
    def train(workers):
        weight = Parameter(torch.ones(3, 2))
        engine = Engine(AllReduce(), [PLAIN([weight])], workers)
        weight.grad = torch.eye(3)[:, :2].to_sparse(1 + workers.rank)
        engine.after_backward()

    for text in errors_of(2, train):
        assert "of shape [3, 2] have indices of 1 and 2 dimensions on different workers" in text
