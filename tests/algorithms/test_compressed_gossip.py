"""SQuARM-SGD against its listing with a copy of every estimate, and its identities."""

import math
from dataclasses import replace
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch

from lightning_slowmo import QPRSGD, Gossip, LocalSGD, SQuARM, Threshold
from lightning_slowmo.communication.meeting import Header, Reason
from lightning_slowmo.compression import QSGD, Cast, Identity, RandomK, Sign, SignTopK, TopK
from lightning_slowmo.topology import make
from tests.algorithms.training import CHANGING, CONSTANT, MOMENTUM, PLAIN, Training, same, small_buckets, train
from tests.on_workers import taking_turns

NESTEROV = partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True)
RATES = np.concatenate(
    [np.full(math.prod(s), CONSTANT.rates[0][g]) for s, g in zip(CONSTANT.shapes, CONSTANT.group_of, strict=True)]
)


def gradients(worker, step, x):
    """All gradients at a point, in one vector."""
    parts, start = [], 0
    for index, shape in enumerate(CONSTANT.shapes):
        size = math.prod(shape)
        parts.append(CONSTANT.gradient(worker, step, index, x[start : start + size].reshape(shape)).ravel())
        start += size
    return np.concatenate(parts)


def top(x, fraction):
    """The largest elements of each tensor."""
    out, start = np.zeros_like(x), 0
    for shape in CONSTANT.shapes:
        size = math.prod(shape)
        if size:
            k = max(1, math.ceil(fraction * size))
            chosen = start + np.argsort(-np.abs(x[start : start + size]), kind="stable")[:k]
            out[chosen] = x[chosen]
        start += size
    return out


def listing(workers, period, fraction, gamma, c, zero, momentum=0.9):
    """The paper's listing, each worker's estimate known to all; models after each step, and messages held back."""
    weights = make("ring").on(workers).weights()
    first = np.concatenate([value.ravel() for value in CONSTANT.initial()])
    x = np.stack([first] * workers)
    h = np.zeros_like(x) if zero else x.copy()
    v, rows, skipped = np.zeros_like(x), [], np.zeros(workers, int)
    for t in range(len(CONSTANT.rates)):
        g = np.stack([gradients(i, t, x[i]) for i in range(workers)])
        v = momentum * v + g
        x = x - RATES * (momentum * v + g)
        if (t + 1) % period == 0:
            for i in range(workers):
                if c == 0 or (((x[i] - h[i]) / RATES) ** 2).sum() > c:
                    h[i] = h[i] + top(x[i] - h[i], fraction)
                else:
                    skipped[i] += 1
            x = x + gamma * (weights @ h - h)
        rows.append(x)
    return np.stack(rows), skipped


@taking_turns(1, 2, 3, 4, each=["model", "zero"])
def test_it_follows_the_papers_listing(workers, case):
    for period, gamma, c in ((1, 0.2, 0.0), (3, 0.3, 1000.0)):
        squarm = SQuARM("ring", period, TopK(0.3), gamma, Threshold(c), case)
        with small_buckets(workers):
            training = Training(workers, squarm, CONSTANT, NESTEROV)
            ours = training.trajectory()
        rows, skipped = listing(workers.size, period, 0.3, gamma, c, case == "zero")
        same(ours, rows[:, workers.rank])
        assert training.engine.total.skipped == skipped[workers.rank]
        if c and case == "model":
            assert 0 < skipped.sum() < workers.size * len(CONSTANT.rates) // period


@taking_turns(1, 2, 3, 4)
def test_without_compression_and_trigger_it_is_d_psgd_with_local_momentum(workers):
    ours = train(workers, SQuARM("ring", 1, Identity(), 1.0), CHANGING, NESTEROV)
    same(ours, train(workers, Gossip("ring", push_sum=False), CHANGING, NESTEROV))
    ours = train(workers, SQuARM("complete", 3, Identity(), 1.0), CHANGING, MOMENTUM)
    same(ours, train(workers, LocalSGD(3), CHANGING, MOMENTUM))


@taking_turns(1)
def test_one_worker_alone_is_torchs_own_nesterov_sgd(workers):
    parameters = [torch.nn.Parameter(torch.tensor(value)) for value in CHANGING.initial()]
    left = iter(parameters)
    optimizer = NESTEROV([{"params": [next(left) for _ in group]} for group in CHANGING.groups])
    rows = []
    for step, rates in enumerate(CHANGING.rates):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for index, parameter in enumerate(parameters):
            parameter.grad = torch.tensor(CHANGING.gradient(0, step, index, parameter.detach().numpy()))
        optimizer.step()
        rows.append(np.concatenate([parameter.detach().numpy().ravel() for parameter in parameters]))
    for squarm in (SQuARM("ring", 1), SQuARM("complete", 3, Sign("l2"), 0.3, Threshold(1.0), "zero")):
        same(train(workers, squarm, CHANGING, NESTEROV), np.stack(rows))


@taking_turns(2, 4)
def test_a_threshold_of_zero_always_sends(workers):
    """Even when nothing has changed, as with gradients of zero."""
    for problem in (CHANGING, replace(CHANGING, scale=0.0)):
        training = Training(workers, SQuARM("ring", 2, trigger=Threshold(0.0)), problem, NESTEROV)
        before = workers.traffic.copy()
        training.trajectory()
        (unit,) = training.engine.units
        payload = sum(unit.compressor.payload_bytes(b.segments, b.dtype) for b in unit.layout.buckets)
        syncs, used = len(problem.rates) // 2, workers.traffic - before
        headers = 8 * (workers.size - 1) * (len(Header(Reason.SYNC, pending=(1,)).numbers()) + 1)
        assert training.engine.total.skipped == 0
        assert used.sent == syncs * (headers + min(2, workers.size - 1) * payload)


@taking_turns(1, 3)
def test_nobody_who_is_silent_sends_or_moves(workers):
    """An infinite threshold, or one worker alone: the optimizer's own steps, bit for bit."""
    alone = train(workers, LocalSGD(10**9), CHANGING, NESTEROV)
    silent = Training(workers, SQuARM("ring", 2, trigger=Threshold(math.inf)), CHANGING, NESTEROV)
    before = workers.traffic.copy()
    assert np.array_equal(silent.trajectory(), alone)
    assert (workers.traffic - before).collectives == 0
    assert silent.engine.total.skipped == len(CHANGING.rates) // 2
    if workers.alone:
        assert np.array_equal(train(workers, SQuARM("ring", 2, SignTopK(0.1)), CHANGING, NESTEROV), alone)


ANY = [
    Identity(),
    SignTopK(0.2),
    Sign("l1"),
    Sign("l2"),
    TopK(0.3, values=Cast("bf16")),
    RandomK(0.4),
    QSGD(3, contractive=True),
    Cast("int8"),
]


@taking_turns(2, 3, 4, each=ANY)
def test_gossip_preserves_the_mean_and_estimates_are_what_the_others_have(workers, case):
    training = Training(workers, SQuARM("ring", 1, case, 0.3, Threshold(50.0)), CONSTANT, PLAIN)
    (unit,) = training.engine.units
    weights = make("ring").on(workers.size).weights()
    for _ in range(8):
        x = np.array(workers.gather(training.values().tolist()))
        g = np.stack([gradients(i, training.steps, x[i]) for i in range(workers.size)])
        training.step()
        after = np.array(workers.gather(training.values().tolist()))
        np.testing.assert_allclose(after.mean(0), (x - RATES * g).mean(0), rtol=0, atol=1e-12)
        estimate = np.array(workers.gather(torch.cat(unit.estimate).tolist()))
        mixed = np.array(workers.gather(torch.cat(unit.mixed).tolist()))
        np.testing.assert_allclose(mixed, weights @ estimate, rtol=0, atol=1e-12)


@taking_turns(
    2,
    4,
    each=[
        SQuARM("ring", 1, QSGD(3, contractive=True), 0.3, Threshold(60.0)),
        SQuARM("complete", 2, SignTopK(0.2), initial_estimate="zero"),
        QPRSGD(1, QSGD(3, norm="max"), "gossip"),
    ],
)
def test_estimates_equal_their_copies_at_the_neighbours_bit_for_bit(workers, case):
    """A worker that keeps a copy of each neighbour's estimate, from what it hears alone, has what that worker has."""
    heard = []

    send_and_receive = workers.send_and_receive

    def listening(message, receivers, senders):
        messages = yield from send_and_receive(message, receivers, senders)
        heard.append((senders, messages))
        return messages

    with small_buckets(workers), mock.patch.object(workers, "send_and_receive", listening):
        training = Training(workers, case, CONSTANT, PLAIN, torch.float32)
        (unit,) = training.engine.units
        neighbours = [peer for peer, _ in unit.schedule.exchange(workers.rank, 0).receives]
        copies = {peer: [flat.clone() for flat in unit.estimate] for peer in neighbours}
        messages = 0
        for _ in range(8):
            heard.clear()
            training.step()
            for bucket, (senders, payloads) in zip(unit.layout.buckets, heard, strict=False):
                for sender, payload in zip(senders, payloads, strict=True):
                    told = unit.compressor.decompress(payload, bucket.segments, bucket.dtype)
                    bucket.of(copies[sender]).add_(told)
                    messages += 1
            rows = workers.gather(torch.cat(unit.estimate).tolist())
            for peer, copy in copies.items():
                assert torch.cat(copy).tolist() == rows[peer]
        assert messages


def test_the_threshold_grows_and_stops():
    threshold = Threshold(2.0, 1.5, every=10, until=25)
    assert [threshold.at(sync) for sync in (0, 9, 10, 25, 1000)] == [2.0, 2.0, 3.5, 5.0, 5.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"trigger": 3.0}, "trigger must be"),
        ({"initial_estimate": "one"}, "initial_estimate"),
        ({"consensus_step": -1.0}, "consensus_step"),
        ({"compressor": None}, "compressor"),
    ],
)
def test_what_cannot_be_configured_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SQuARM(**arguments)
    with pytest.raises(ValueError, match="initial must be"):
        Threshold(-1.0)
