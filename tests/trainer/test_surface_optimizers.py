"""Several optimizers, in manual optimization: each has a count and slow state of its own."""

import pytest
import torch

from lightning_slowmo import LocalSGD, SlowMo, SlowMoStrategy
from lightning_slowmo.callbacks import EMAAtSync
from tests.harness import run_trainers
from tests.trainer.models import FEATURES, Regression, data, distance, numbers, trainer


class Gan(Regression):
    """A generator and a critic. ``turns`` says on which batches each of them steps."""

    def __init__(self, turns):
        super().__init__()
        self.automatic_optimization = False
        self.turns = turns
        self.generator, self.critic = torch.nn.Linear(2, FEATURES), torch.nn.Linear(FEATURES, 1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.linspace(-0.5, 0.5, parameter.numel()).view(parameter.shape))
        self.after = {"generator": [], "critic": []}

    def training_step(self, batch, batch_idx):
        inputs, _ = batch
        optimizers = dict(zip(self.after, self.optimizers(), strict=True))
        for name, turn in self.turns.items():
            if not turn(batch_idx, self.global_rank):
                continue
            optimizer = optimizers[name]
            self.toggle_optimizer(optimizer)
            made = self.generator(inputs[:, :2])
            loss = -self.critic(made).mean()
            if name == "critic":
                weights = self.critic.weight
                loss = self.critic(made.detach()).mean() - self.critic(inputs).mean() + (weights**2).sum()
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
            optimizer.step()
            self.untoggle_optimizer(optimizer)
            self.after[name].append(numbers(getattr(self, name)))

    def configure_optimizers(self):
        return [
            torch.optim.SGD(self.generator.parameters(), lr=0.05),
            torch.optim.Adam(self.critic.parameters(), lr=0.01),
        ]


IN_TURN = "in turn, one even period"

SITUATIONS = {
    # name: (algorithm, whose turn it is at a batch of a rank, steps between syncs)
    IN_TURN: (
        LocalSGD(2),
        {"critic": lambda batch, rank: True, "generator": lambda batch, rank: True},
        2,
    ),
    "five steps of the critic for one of the generator": (
        SlowMo(sync_every=3),
        {"critic": lambda batch, rank: True, "generator": lambda batch, rank: batch % 5 == 4},
        3,
    ),
}

UNEQUAL = {"critic": lambda batch, rank: True, "generator": lambda batch, rank: batch % (2 + rank) == 0}
"""The ranks step their generators on different batches, and differently often."""


def fit(rank, algorithm, turns, callbacks=None):
    module = Gan(turns)
    fitting = trainer(2, SlowMoStrategy(algorithm), max_epochs=3, callbacks=callbacks)
    fitting.fit(module, data(rank, examples=40))
    return module.after, numbers(module), fitting.global_step


def fit_all(rank):
    results = {name: fit(rank, algorithm, turns) for name, (algorithm, turns, _) in SITUATIONS.items()}
    results["unequal"] = fit(rank, SlowMo(sync_every=3), UNEQUAL)
    for name, turns in (("averaged", SITUATIONS[IN_TURN][1]), ("averaged, unequal", UNEQUAL)):
        ema = EMAAtSync(decay=0.5)
        fit(rank, LocalSGD(2), turns, ema)
        results[name] = numbers(ema._average_model.module), int(ema._average_model.n_averaged)
    return results


@pytest.fixture(scope="module")
def fitted():
    return run_trainers(2, fit_all)


@pytest.mark.processes
@pytest.mark.parametrize("name", SITUATIONS)
def test_both_networks_are_averaged_after_each_period_of_their_own_steps(fitted, name):
    period = SITUATIONS[name][2]
    (first, end, steps), (second, end_there, steps_there) = (results[name] for results in fitted)
    assert steps == steps_there == len(first["generator"]) + len(first["critic"])
    assert end == end_there
    for network in ("generator", "critic"):
        assert len(first[network]) >= 2 * period
        for count, (own, other) in enumerate(zip(first[network], second[network], strict=True), start=1):
            assert (own == other) is (count % period == 0), (network, count)


@pytest.mark.processes
def test_ranks_that_step_an_optimizer_differently_often_neither_hang_nor_part(fitted):
    (first, end, steps), (second, end_there, steps_there) = (results["unequal"] for results in fitted)
    assert steps != steps_there
    assert len(first["generator"]) > len(second["generator"])
    assert len(first["critic"]) == len(second["critic"])
    assert end == end_there
    assert distance(end, numbers(Gan(UNEQUAL))) > 1e-2


@pytest.mark.processes
def test_weights_are_averaged_when_both_networks_are_equal_on_all_ranks(fitted):
    for name in ("averaged", "averaged, unequal"):
        (average, updates), there = (results[name] for results in fitted)
        assert (average, updates) == there, name
        assert updates > 0
    # Every second time that both have stepped; when the first of them syncs, the other is a step behind.
    assert fitted[0]["averaged"][1] == 30 // 2
