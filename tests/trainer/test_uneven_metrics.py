"""Metrics and other collectives that do not come through the strategy, while workers are at different places."""

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torchmetrics

from lightning_slowmo import SlowMo, SlowMoStrategy, SyncError
from tests.harness import run_trainers
from tests.trainer.models import Regression, data, numbers, trainer

SYNC_EVERY = 3
BATCHES = (8, 4, 5)
SOON = 8
"""Seconds within which every rank must have its error; the strategy's own timeout is far away."""


def strategy(**options):
    return SlowMoStrategy(SlowMo(sync_every=SYNC_EVERY), **options)


def batches(rank, count):
    return data(rank, examples=4 * count)


class Metrics(Regression):
    """Logs metrics of every kind; remembers what went into them."""

    def __init__(self):
        super().__init__()
        self.mean, self.largest, self.kept = (
            torchmetrics.MeanMetric(),
            torchmetrics.MaxMetric(),
            torchmetrics.CatMetric(),
        )
        self.by_hand = torchmetrics.SumMetric()
        self.values, self.steps, self.computed = [], [], []

    def value(self, batch):
        return batch[0].sum()

    def training_step(self, batch, batch_idx):
        value = self.value(batch)
        self.values.append(float(value))
        self.mean(value)
        self.largest(value)
        self.kept.update(value)
        self.by_hand.update(value)
        self.log("mean", self.mean, on_step=True, on_epoch=True)
        self.log("largest", self.largest, on_step=False, on_epoch=True)
        self.log("total", value, on_step=False, on_epoch=True, sync_dist=True, reduce_fx="sum")
        self.log("average", value, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)
        return self.loss(batch)

    def on_train_epoch_end(self):
        kept = self.kept.compute()
        total = torch.tensor(float(len(self.values)))
        dist.all_reduce(total)  # by torch.distributed itself
        self.computed.append((sorted(kept.flatten().tolist()), float(self.by_hand.compute()), float(total)))
        self.kept.reset()
        self.by_hand.reset()


def fit_metrics(rank, size):
    """Log every kind of metric for two epochs of unequal length."""
    module = Metrics()
    fitting = trainer(size, strategy())
    fitting.fit(module, batches(rank, BATCHES[rank]))
    logged = {name: float(value) for name, value in fitting.callback_metrics.items()}
    return module.values, logged, module.computed, numbers(module)


class InSteps(Metrics):
    """Logs in every step what all workers have to agree on."""

    def training_step(self, batch, batch_idx):
        value = self.value(batch)
        self.values.append(float(value))
        self.log("step", value, on_step=True, on_epoch=True, sync_dist=True, batch_size=1)
        self.log("most", value, on_step=True, on_epoch=False, sync_dist=True, reduce_fx="max")
        return self.loss(batch)

    def on_train_batch_end(self, *_):
        metrics = self.trainer.callback_metrics
        self.steps.append((float(metrics["step_step"]), float(metrics["most"])))

    on_train_epoch_end = Regression.on_train_epoch_end


def fit_in_steps(rank, size):
    module = InSteps()
    fitting = trainer(size, strategy(), max_epochs=1)
    fitting.fit(module, batches(rank, BATCHES[rank]))
    return module.values, module.steps, float(fitting.callback_metrics["step_epoch"]), numbers(module)


class Gathers(Regression):
    """Gathers in every step, as contrastive losses do, with or without gradients."""

    def __init__(self, sync_grads):
        super().__init__()
        self.sync_grads, self.rows = sync_grads, []

    def training_step(self, batch, batch_idx):
        predictions = self.net(batch[0])
        everyone = self.all_gather(predictions, sync_grads=self.sync_grads)
        self.rows.append(tuple(everyone.shape))
        return self.loss(batch) + (everyone.mean() ** 2 if self.sync_grads else 0)


class ReducesInSteps(Regression):
    """Calls torch.distributed in every step."""

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        dist.all_reduce(loss.detach().clone())
        return loss


class SyncsMetricInSteps(Metrics):
    def __init__(self):
        super().__init__()
        self.mean = torchmetrics.MeanMetric(dist_sync_on_step=True)


CANNOT = {
    "all_gather": lambda: Gathers(False),
    "all_gather with gradients": lambda: Gathers(True),
    "torch.distributed": ReducesInSteps,
    "dist_sync_on_step": SyncsMetricInSteps,
}


def fit_what_cannot_be(rank, size):
    """Operations that belong to a step and need every worker: right with even inputs, else an error."""
    results = {}
    for name, make in CANNOT.items():
        module = make()
        trainer(size, strategy(), max_epochs=1).fit(module, batches(rank, 5))
        results[name, "even"] = numbers(module), getattr(module, "rows", None)
    return results


def fit_refused(rank, size, name):
    start = time.monotonic()
    fitting = trainer(size, strategy(sync_timeout=timedelta(minutes=5)), max_epochs=1)
    with pytest.raises(SyncError) as raised:
        fitting.fit(CANNOT[name](), batches(rank, BATCHES[rank]))
    return str(raised.value), time.monotonic() - start


def fit_all_metrics(rank, size):
    results = {"metrics": fit_metrics(rank, size), "steps": fit_in_steps(rank, size)}
    results |= fit_what_cannot_be(rank, size)
    results |= {("uneven", name): fit_refused(rank, size, name) for name in CANNOT}
    return results


@pytest.fixture(scope="module", params=[3])
def fitted(request):
    return run_trainers(request.param, fit_all_metrics, request.param, limit=120)


@pytest.mark.processes
def test_metrics_of_uneven_inputs_are_those_of_all_data(fitted):
    values, logged, computed, model = zip(*(result["metrics"] for result in fitted), strict=True)
    assert [len(own) for own in values] == [2 * count for count in BATCHES[: len(fitted)]]
    assert all(own == model[0] for own in model)
    for epoch in (0, 1):
        parts = [own[len(own) // 2 * epoch : len(own) // 2 * (epoch + 1)] for own in values]
        everything = [value for own in parts for value in own]
        for kept, total, count in (own[epoch] for own in computed):
            assert kept == sorted(everything)
            assert total == pytest.approx(sum(everything), abs=1e-4)
            assert count == sum(len(own) // 2 * (epoch + 1) for own in values)
    for own in logged:
        assert own["mean_epoch"] == pytest.approx(sum(everything) / len(everything), abs=1e-5)
        assert own["average"] == pytest.approx(sum(everything) / len(everything), abs=1e-5)
        assert own["largest"] == max(everything)
        # Lightning divides a sum by nothing: it is the sum over the workers.
        assert own["total"] == pytest.approx(sum(everything), abs=1e-4)


@pytest.mark.processes
def test_what_is_logged_in_steps_is_the_mean_over_those_that_have_a_batch(fitted):
    values, steps, epoch, model = zip(*(result["steps"] for result in fitted), strict=True)
    assert all(own == model[0] for own in model)
    for own_values, own_steps in zip(values, steps, strict=True):
        assert len(own_steps) == len(own_values)
        for index, (mean, most) in enumerate(own_steps):
            present = [others[index] for others in values if index < len(others)]
            assert mean == pytest.approx(sum(present) / len(present), abs=1e-5)
            assert most == max(present)
    everything = [value for own in values for value in own]
    assert epoch == pytest.approx([sum(everything) / len(everything)] * len(fitted), abs=1e-5)


@pytest.mark.processes
@pytest.mark.parametrize("name", list(CANNOT))
def test_what_needs_every_worker_in_a_step_works_or_is_one_error_on_all(fitted, name):
    models, rows = zip(*(result[name, "even"] for result in fitted), strict=True)
    assert all(model == models[0] for model in models)
    if rows[0]:
        assert set(rows[0]) == {(len(fitted), 4, 1)}
    for text, seconds in (result["uneven", name] for result in fitted):
        assert "epoch end" in text
        assert "Log with on_epoch=True" in text
        assert seconds < SOON
