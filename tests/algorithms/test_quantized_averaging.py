"""QPRSGD, and outer loops over compressed differences, against identities and listings in numpy."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from lightning_slowmo import QPRSGD, DiLoCo, Gossip, LocalSGD, SlowMo
from lightning_slowmo.averaging.feedback import Feedback
from lightning_slowmo.compression import QSGD, Identity, RandomK, Sign, TopK
from lightning_slowmo.topology import make
from tests.algorithms.training import CHANGING, CONSTANT, MOMENTUM, PLAIN, Training, same, small_buckets, train
from tests.on_workers import taking_turns

FIRST = np.concatenate([value.ravel() for value in CHANGING.initial()])
THREE_BITS = QSGD(bits=3, norm="max", bucket=512)


@taking_turns(1, 2, 3, 4, each=["ring", "two_shot"])
def test_without_compression_it_is_local_sgd(workers, case):
    for message in ("difference", "model"):
        for period in (1, 3):
            with small_buckets(workers):
                ours = train(workers, QPRSGD(period, Identity(), case, message=message), CHANGING, MOMENTUM)
            same(ours, train(workers, LocalSGD(period), CHANGING, MOMENTUM))


@taking_turns(1, 2, 3, 4)
def test_without_compression_its_gossip_is_d_psgd(workers):
    for message in ("difference", "model"):
        ours = train(workers, QPRSGD(1, Identity(), "gossip", message=message), CHANGING, MOMENTUM)
        same(ours, train(workers, Gossip("ring", push_sum=False), CHANGING, MOMENTUM))


@taking_turns(3)
def test_gossip_with_models_may_change_its_neighbours(workers):
    ours = train(workers, QPRSGD(1, Identity(), "gossip", "one_peer_exponential", message="model"), CHANGING, PLAIN)
    same(ours, train(workers, Gossip("one_peer_exponential"), CHANGING, PLAIN))


@taking_turns(1, 2, 3, 4, each=["ring", "two_shot"])
def test_replicas_are_equal_bit_for_bit_after_a_sync(workers, case):
    for algorithm in (QPRSGD(4, THREE_BITS, case), SlowMo(QPRSGD(4, THREE_BITS, case), 4)):
        with small_buckets(workers):
            values = Training(workers, algorithm, CHANGING, dtype=torch.float32).trajectory()
        rows = np.array(workers.gather(values[11].tolist()))
        assert (rows == rows[0]).all()
        assert workers.alone or not np.array_equal(*np.array(workers.gather(values[9].tolist()))[:2])


@taking_turns(3)
def test_what_gossip_knows_of_a_worker_is_what_that_worker_knows(workers):
    """The mixes are the weighted sums of the public copies, and the mean of models is that of the copies."""
    training = Training(workers, QPRSGD(1, RandomK(0.5, rescale=True), "gossip"), CHANGING)
    weights = make("ring").on(workers.size).weights()
    for _ in range(6):
        training.step()
        (unit,) = training.engine.units
        public = np.array(workers.gather(torch.cat(unit.estimate).tolist()))
        mixed = np.array(workers.gather(torch.cat(unit.mixed).tolist()))
        models = np.array(workers.gather(training.values().tolist()))
        np.testing.assert_allclose(mixed, weights @ public, rtol=0, atol=1e-12)
        np.testing.assert_allclose(models.mean(0), public.mean(0), rtol=0, atol=1e-12)


@taking_turns(1, 2, 4)
def test_an_outer_loop_without_loss_is_the_exact_one(workers):
    for exact in (SlowMo(sync_every=3), DiLoCo(3), DiLoCo(3, outer_optimizer=partial(torch.optim.Adam, lr=0.1))):
        with small_buckets(workers):
            ours = train(workers, replace(exact, compressor=Identity()), CHANGING, MOMENTUM)
            same(ours, train(workers, exact, CHANGING, MOMENTUM))


@taking_turns(2, 3)
def test_slow_momentum_over_compressed_differences_follows_lines_6_to_8_with_error_feedback(workers):
    """One worker's view: anchor and momentum follow from the means that were decoded; nothing is lost on the way."""
    beta, period = 0.5, 4
    slowmo = SlowMo(sync_every=period, slow_momentum=beta, compressor=TopK(0.2))
    training = Training(workers, slowmo, CONSTANT)
    (unit,) = training.engine.units
    x, v, missing = FIRST, np.zeros_like(FIRST), 0
    for _ in range(4):
        for _ in range(period - 1):
            training.step()
        local = training.values()
        rates = np.concatenate(
            [np.full(p.numel(), group["lr"]) for group in training.optimizer.param_groups for p in group["params"]]
        )
        here = [p.detach().numpy() for p in training.parameters]
        gradients = [CONSTANT.gradient(workers.rank, training.steps, i, p) for i, p in enumerate(here)]
        local = local - rates * np.concatenate([g.ravel() for g in gradients])
        training.step()
        wanted = (np.array(workers.gather(local.tolist())) - x).mean(0)
        total = np.concatenate([t.numpy().ravel() for t in unit.averager.feedback.total()])
        decoded = wanted + missing - total
        missing = total
        v = beta * v - decoded
        x = x - v
        np.testing.assert_allclose(training.values(), x, rtol=0, atol=1e-12)
        assert np.count_nonzero(np.abs(decoded) > 1e-12) < len(decoded)


@taking_turns(2, 4)
def test_three_bits_send_ninety_percent_less_than_local_sgd(workers):
    big = replace(CHANGING, groups=(((100, 200), (200,)), ((20, 50),)), rates=CHANGING.rates[:4])
    sent = []
    for algorithm in (LocalSGD(2), QPRSGD(2, THREE_BITS), QPRSGD(2, THREE_BITS, "two_shot")):
        before = workers.traffic.copy()
        training = Training(workers, algorithm, big, dtype=torch.float32)
        before = workers.traffic.copy()
        training.trajectory()
        used = workers.traffic - before
        sent.append(used.sent - used.headers * 100)
    assert all(bytes <= 0.1 * sent[0] for bytes in sent[1:]), sent


@taking_turns(3)
def test_the_residual_of_the_mean_survives_other_numbers_of_workers(workers):
    training = Training(workers, QPRSGD(2, Sign("l1"), "two_shot", error_feedback=True), CHANGING)
    training.trajectory()
    (unit,) = training.engine.units
    total = unit.averager.feedback.total()
    assert max(float(part.abs().max()) for part in total if part.numel()) > 1e-3
    for size in (1, 2, 5):  # as if these workers were of that number
        alone = type(workers)()
        alone.size = size
        new = Feedback(unit.layout, alone)
        new.set_total(total)
        same = [own / size * size for own in new.contribution()]  # the mean of `size` equal contributions
        for one, other in zip(unit.layout.per_parameter(same), total, strict=True):
            torch.testing.assert_close(one, other)
    moved = unit.averager.feedback.moved_to(unit.layout)
    for one, other in zip(moved.total(), total, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"compressor": "qsgd"}, "compressor must be"),
        ({"compressor": Sign()}, "biased"),
        ({"transport": "pigeon"}, "transport must be one of ring"),
        ({"message": "gradient"}, "message must be one of difference"),
        ({"error_feedback": True}, "two_shot"),
        ({"sync_every": 0}, "sync_every"),
    ],
)
def test_what_cannot_be_configured_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        QPRSGD(**arguments)


def test_compressed_outer_loops_need_an_average_to_compress():
    with pytest.raises(ValueError, match="LocalSGD"):
        SlowMo(Gossip(), compressor=Sign())
    with pytest.raises(ValueError, match="compressor must be"):
        DiLoCo(compressor=3)
