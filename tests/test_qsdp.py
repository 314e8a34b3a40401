"""QSDP inside FSDP2: what travels, what the ranks see, and that training comes to the same."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lightning_slowmo import QSDP
from lightning_slowmo.compression import seeded_generator
from lightning_slowmo.plan import inside
from lightning_slowmo.qsdp import Codec
from tests.harness import run

SIZE = 4


class Net(nn.Module):
    """Blocks with a norm and biases; 30 rows are no multiple of 4, and 2 rows leave some ranks without any."""

    def __init__(self, seed=0, features=64, width=30, classes=10, unused=False):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(features, width), nn.LayerNorm(width), nn.Tanh())])
            self.blocks.append(nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, width)))
            self.blocks.append(nn.Sequential(nn.Linear(width, 2), nn.Linear(2, width)))
            self.head = nn.Linear(width, classes)
            self.unused = nn.Linear(width, width) if unused else None

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def sharded(quantized=None, seed=0, ranks=None, dtype=torch.float32, policy=None, reshard=True, **options):
    model = Net(seed, **options).to(dtype)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if ranks is None else ranks
    arguments = {"mesh": mesh, "mp_policy": policy or MixedPrecisionPolicy(), "reshard_after_forward": reshard}
    for block in model.blocks:
        fully_shard(block, **arguments)
    fully_shard(model, **arguments)
    return model, quantized.apply(model) if quantized is not None else None


def batch(rank, dtype=torch.float32, count=16):
    x = torch.randn(count, 64, generator=seeded_generator(11, rank)).to(dtype)
    return x, torch.randint(10, (count,), generator=seeded_generator(12, rank))


def whole(tensors):
    return [tensor.full_tensor().detach().clone() for tensor in tensors]


def gradients(model, x, y):
    model.zero_grad()
    nn.functional.cross_entropy(model(x).float(), y).backward()
    return [p.grad.full_tensor() for p in model.parameters()]


def steps(model, rank, count, lr=0.1, first=0, momentum=0.9, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr, momentum=momentum)
    for step in range(first, first + count):
        x, y = batch(rank + 100 * step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return optimizer


# What each rank sees --------------------------------------------------------------------------------------------------


def seen(rank):
    """Weights in the forward and backward pass of two steps, on this rank, beside the owner's."""
    model, sharding = sharded(QSDP(weight_bits=5, bucket=64))
    weights = []

    def look(module, *_):
        weights.append([p.detach().clone() for p in module[0].parameters()])

    model.blocks[1].register_forward_pre_hook(look)
    model.blocks[1].register_full_backward_hook(look)
    owner = [whole(model.blocks[1][0].parameters())]
    steps(model, rank, 1)
    owner.append(whole(model.blocks[1][0].parameters()))
    steps(model, rank, 1)
    return weights, owner, sharding.state_dict()


def full_precision_is_fsdp(rank):
    ends = []
    for quantized in (None, QSDP(None, None), QSDP(16, 16), QSDP()):
        model, sharding = sharded(quantized)
        steps(model, rank, 5)
        ends.append(whole(model.parameters()))
        if quantized == QSDP(None, None):
            assert sharding.traffic.sent == sharding.gather_bytes == sharding.reduce_bytes == 0
    return ends


def mean_gradient(rank, draws=64):
    """The mean of this rank's gradients over many roundings, beside the exact ones."""
    x, y = batch(rank, torch.float64)

    def own(model):
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        return torch.cat([p.grad.to_local().flatten() for p in model.parameters()])

    exact = own(sharded(dtype=torch.float64)[0])
    model, _ = sharded(QSDP(weight_bits=None, gradient_bits=3, bucket=64), dtype=torch.float64)
    drawn = torch.stack([own(model) for _ in range(draws)])
    return exact, drawn.mean(0), drawn.std(0), draws


def resumed(rank):
    """5 steps, and 2 steps, a state, and 3 more in a new model: the same bits, also behind an evaluation."""
    ends = []
    model, _ = sharded(QSDP(4, 4))
    steps(model, rank, 5)
    ends.append(whole(model.parameters()))
    for evaluated in (False, True):
        model, sharding = sharded(QSDP(4, 4))
        optimizer = steps(model, rank, 2)
        if evaluated:
            with torch.no_grad():
                model(batch(rank)[0])
        state = copy.deepcopy((sharding.state_dict(), model.state_dict(), optimizer.state_dict()))
        model, sharding = sharded(QSDP(4, 4), seed=7)
        with torch.no_grad():
            model(batch(rank)[0])  # has drawn something already
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        sharding.load_state_dict(state[0])
        model.load_state_dict(state[1])
        optimizer.load_state_dict(state[2])
        steps(model, rank, 3, first=2, optimizer=optimizer)
        ends.append(whole(model.parameters()))
    with pytest.raises(ValueError, match="other fully_shard modules"):
        sharding.load_state_dict({"weights": [1], "gradients": []})
    return ends


# What travels ---------------------------------------------------------------------------------------------------------


def traffic(rank):
    """Bytes that the collectives of this process were given, beside what lengths alone predict."""
    handed = []
    gather, exchange = dist.all_gather_into_tensor, dist.all_to_all_single
    dist.all_gather_into_tensor = lambda out, own, **o: (handed.append((SIZE - 1) * own.numel()), gather(out, own, **o))
    dist.all_to_all_single = lambda out, own, *a, **o: (handed.append(own.numel()), exchange(out, own, *a, **o))
    found = {}
    try:
        for name, quantized, itemsize in (("8/8", QSDP(), 4), ("4/3", QSDP(4, 3), 4), ("bf16", QSDP(), 2)):
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16) if itemsize == 2 else None
            model, sharding = sharded(quantized, policy=policy, width=512)
            weights, gradients = 0.0, 0.0  # weights are gathered for the forward and for the backward pass
            for module in (*model.blocks, model):
                own = [p for m in module.modules() for p in m.parameters(recurse=False)] if module is not model else []
                for parameter in own or model.head.parameters():
                    length = -(-parameter.shape[0] // SIZE) * (parameter.numel() // parameter.shape[0])
                    exact, buckets = parameter.dim() < 2, -(-length // 1024)
                    weights += 2 * (itemsize * length if exact else quantized.weight_bits * length / 8 + 8 * buckets)
                    gradients += itemsize * length if exact else quantized.gradient_bits * length / 8 + 4 * buckets
            handed.clear()
            x, y = batch(rank)
            nn.functional.cross_entropy(model(x).float(), y).backward()
            counted, expected = sharding.traffic.sent, (SIZE - 1) * (weights + gradients)
            shapes = [tuple(parameter.shape) for parameter in model.parameters()]
            sent = quantized.bytes_sent(shapes, SIZE, torch.bfloat16 if itemsize == 2 else torch.float32)
            foretold = 2 * sharding.gather_bytes + sharding.reduce_bytes, 2 * sent[0] + sent[1]
            planned = inside(shapes, SIZE, quantized).sent
            found[name] = sum(handed), counted, expected, *foretold, planned
    finally:
        dist.all_gather_into_tensor, dist.all_to_all_single = gather, exchange
    return found


# Everything else that FSDP2 does --------------------------------------------------------------------------------------


def other_uses(rank):
    """Mixed precision, accumulation, parameters without gradients, no resharding, NaN: none fails, all ranks agree."""
    ends = {}
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for name, arguments in {
        "bf16": {"policy": policy},
        "unused": {"unused": True},
        "not resharded": {"reshard": False},
        "fp16": {"policy": MixedPrecisionPolicy(torch.float16, torch.float16)},
        "double": {"dtype": torch.float64},
    }.items():
        model, _ = sharded(QSDP(), **arguments)
        exact, _ = sharded(None, **arguments)
        x, y = batch(rank, arguments.get("dtype", torch.float32))
        for each in (model, exact):
            each.set_requires_gradient_sync(False)
            nn.functional.cross_entropy(each(x).float(), y).backward()
            each.set_requires_gradient_sync(True)
            nn.functional.cross_entropy(each(x).float(), y).backward()
        pairs = zip(model.parameters(), exact.parameters(), strict=True)
        ends[name] = [(a.grad.full_tensor(), b.grad.full_tensor()) for a, b in pairs if b.grad is not None]
    model, _ = sharded(QSDP())
    x, y = batch(rank)
    if rank == 1:
        x[0] = float("inf")
    found = gradients(model, x, y)
    ends["infinity"] = [bool(gradient.isfinite().all()) for gradient in found]
    alone = init_device_mesh("cpu", (SIZE, 1), mesh_dim_names=("worker", "shard"))["shard"]
    model, sharding = sharded(QSDP(), ranks=alone)
    exact, _ = sharded(None, ranks=alone)
    ends["one rank"] = (
        sharding.traffic.sent,
        list(zip(gradients(model, *batch(rank)), gradients(exact, *batch(rank)), strict=True)),
    )
    return ends


def refused(rank):
    messages = []

    def expect(act):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            act()
        messages.append(str(error.value))

    expect(lambda: QSDP().apply(nn.Linear(2, 2)))
    expect(lambda: sharded(QSDP(), reshard=2))
    model, _ = sharded(QSDP())
    for module in (*model.blocks, model):
        module.set_gradient_divide_factor(3.0)
    expect(lambda: gradients(model, *batch(rank)))
    return messages


# A real task ----------------------------------------------------------------------------------------------------------


STEPS, SEEDS = 100, 6
BITS = {"32/32": None, "8/8": QSDP(8, 8), "4/4": QSDP(4, 4), "1/2": QSDP(1, 2)}


def train_digits(rank, seed, quantized):
    """Cross-entropy on the 357 images that are held out, and how many of them are read wrongly."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    if quantized is not None:
        quantized.apply(model)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    order = torch.randperm(1440, generator=seeded_generator(seed))
    for step in range(STEPS):
        chosen = order[(64 * step + 32 * rank + torch.arange(32)) % 1440]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
    whole = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}  # what would be saved
    plain = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    plain.load_state_dict(whole)
    with torch.no_grad():
        logits = plain(x[1440:])
    return nn.functional.cross_entropy(logits, y[1440:]).item(), (logits.argmax(1) != y[1440:]).sum().item()


def digits(rank):
    return {bits: [train_digits(rank, seed, qsdp) for seed in range(SEEDS)] for bits, qsdp in BITS.items()}


CHECKS = (seen, full_precision_is_fsdp, mean_gradient, resumed, traffic, other_uses, refused)


def check_all(rank):
    return {check.__name__: check(rank) for check in CHECKS}


@pytest.fixture(scope="module")
def found():
    return run(SIZE, check_all, limit=240)


@pytest.mark.processes
def test_all_ranks_see_the_same_weights_within_half_a_step_of_the_owners(found):
    for results in found:
        weights, owner, drawn = results["seen"]
        assert len(weights) == 4
        assert drawn == {"weights": [2] * 4, "gradients": [2] * 4}  # a shift for each step, on empty shards, too
        for step, (forward, backward) in enumerate((weights[:2], weights[2:])):
            for index, ours in enumerate(forward):
                assert ours.equal(backward[index])
                assert ours.equal(found[0]["seen"][0][2 * step][index])
        for forward, exact in zip((weights[0], weights[2]), owner, strict=True):
            error = (forward[0] - exact[0]).abs().max()
            assert 0 < error <= (exact[0].max() - exact[0].min()) / 31 / 2
            assert forward[1].equal(exact[1])  # a bias


@pytest.mark.processes
def test_without_bits_it_is_fsdp_and_with_sixteen_nearly(found):
    for results in found:
        plain, none, sixteen, eight = results["full_precision_is_fsdp"]
        assert all(map(torch.equal, plain, none))
        near, far = (
            max((a - b).abs().max().item() for a, b in zip(plain, each, strict=True)) for each in (sixteen, eight)
        )
        assert 0 < near < 1e-3
        assert near < far / 10


@pytest.mark.processes
def test_rounded_gradients_are_unbiased(found):
    scores = []
    for results in found:
        exact, mean, deviation, draws = results["mean_gradient"]
        noisy = deviation > 1e-12
        assert torch.allclose(mean[~noisy], exact[~noisy], rtol=0, atol=1e-12)
        scores.append((mean - exact)[noisy] / (deviation[noisy] / draws**0.5))
    scores = torch.cat(scores)
    assert len(scores) > 3000
    assert (scores.abs() > 4).float().mean() < 2e-3  # some are rarely rounded the other way: their deviation is a guess
    assert scores.mean().abs() < 0.1
    assert scores.std().item() == pytest.approx(1, abs=0.15)


@pytest.mark.processes
def test_a_resume_draws_what_would_have_been_drawn(found):
    for results in found:
        straight, resumed_end, behind_evaluation = results["resumed"]
        assert all(map(torch.equal, straight, resumed_end))
        assert all(map(torch.equal, straight, behind_evaluation))


@pytest.mark.processes
def test_bytes_are_as_predicted(found):
    for results in found:
        for name, (handed, counted, expected, foretold, by_shapes, planned) in results["traffic"].items():
            assert handed == counted, name
            assert counted == pytest.approx(expected, rel=0.02), name
            assert by_shapes == pytest.approx(counted, rel=0.02), name
            if name != "bf16":  # whose messages are of another dtype than the parameters
                assert foretold == counted, name
                assert planned == pytest.approx(counted, rel=0.02), name


@pytest.mark.processes
def test_it_goes_with_what_fsdp_does(found):
    for results in found:
        uses = results["other_uses"]
        for name in ("bf16", "unused", "not resharded", "fp16", "double"):
            ours = torch.cat([a.flatten().double() for a, _ in uses[name]])
            exact = torch.cat([b.flatten().double() for _, b in uses[name]])
            assert 0 < torch.linalg.vector_norm(ours - exact) / torch.linalg.vector_norm(exact) < 0.05, name
        assert not any(uses["infinity"])
        sent, pairs = uses["one rank"]
        assert sent == 0
        assert all(a.equal(b) for a, b in pairs)


@pytest.mark.processes
def test_what_cannot_work_is_refused(found):
    texts = ("no fully_shard module in Linear", "reshard_after_forward=True", "set_gradient_divide_factor")
    for results in found:
        assert all(text in message for message, text in zip(results["refused"], texts, strict=True))


@pytest.mark.faults
@pytest.mark.processes
def test_with_eight_bits_digits_are_learned_as_well_as_in_full_precision():
    found = {bits: torch.tensor(results) for bits, results in run(2, digits, limit=600)[0].items()}
    print("\n| bits | held-out loss | wrong of 357 |\n|---|---|---|")
    for bits, results in found.items():
        cells = [f"{column.mean():.4f} ± {column.std():.4f}" for column in results.T]
        print(f"| {bits} | {' | '.join(cells)} |")
    plain, spread = found["32/32"].mean(0), found["32/32"].std(0)
    assert plain[0] < 0.5  # of 2.3 at the start
    assert ((found["8/8"].mean(0) - plain).abs() < spread).all()
    assert found["1/2"].mean(0)[0] > (plain + 3 * spread)[0]  # too few bits would be seen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_bits": 0}, "weight_bits is 0; allowed are 1 to 16, or None"),
        ({"gradient_bits": 1}, "gradient_bits is 1; allowed are 2 to 16, or None"),
        ({"weight_bits": 8.0}, "weight_bits is 8.0"),
        ({"bucket": 0}, "at least 1 element"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        QSDP(**options)


def test_a_codec_rounds_some_shards_and_leaves_the_others():
    shards = [(5, True), (3, False), (0, True), (4, False), (70, True)]
    codec = Codec(QSDP(weight_bits=2).weights, shards, torch.float32)
    x = torch.randn(82, generator=seeded_generator(1))
    payload = codec.encode(x, seeded_generator(2))
    assert payload.numel() == codec.size == (2 * 8 + 75 * 2 // 8 + 1 + 7) // 8 * 8 + 32
    out = codec.decode(payload, torch.empty(82))
    assert out[5:12].equal(x[5:12])
    assert 0 < (out - x).abs().max() <= (x.max() - x.min()) / 3
