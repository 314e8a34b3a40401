"""The outer loops against their listings in numpy, to 1e-10 in float64, through the Trainer with simulated workers."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_slowmo import DESLOC, QSR, DiLoCo, LocalSGD, NoLoCo, PostLocal, Ramp, SimulatedStrategy, SparseLoCo
from lightning_slowmo.compression import ChunkedTopK
from tests.algorithms import reference, test_des_loc, test_muloco, test_noloco, test_sparse_loco
from tests.algorithms.training import CHANGING, GROUPS, MOMENTUM, Problem, same
from tests.trainer.models import trainer

WORKERS = 3


class Listed(L.LightningModule):
    """A problem of the numpy references: a batch says whose gradient it is, and the Trainer which step."""

    def __init__(self, problem: Problem, optimizer: Any) -> None:
        super().__init__()
        self.problem, self.optimizer = problem, optimizer
        self.values = torch.nn.ParameterList([torch.tensor(value) for value in problem.initial()])

    def place(self, batch, batch_idx):
        return int(batch), self.trainer.current_epoch * self.trainer.num_training_batches + batch_idx

    def training_step(self, batch, batch_idx):
        worker, step = self.place(batch, batch_idx)
        loss = torch.zeros((), dtype=torch.float64)
        for index, value in enumerate(self.values):
            gradient = self.problem.gradient(worker, step, index, value.detach().numpy())
            loss = loss + (value * torch.as_tensor(gradient)).sum()
        return loss

    def configure_optimizers(self):
        left, rates = iter(self.values), self.problem.rates
        optimizer = self.optimizer([{"params": [next(left) for _ in group]} for group in self.problem.groups], lr=1.0)
        at = [lambda step, group=group: rates[min(step, len(rates) - 1)][group] for group in range(len(GROUPS))]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, at)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Muon(Listed):
    """MuLoCo's two optimizers, stepped by hand."""

    def __init__(self):
        super().__init__(Problem((test_muloco.SHAPES,), ((0.02,),) * test_muloco.STEPS), None)
        self.automatic_optimization = False
        self.values = torch.nn.ParameterList(test_muloco.start())

    def training_step(self, batch, batch_idx):
        self.zero_grad()
        test_muloco.set_gradients(list(self.values), *self.place(batch, batch_idx))
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        return test_muloco.optimizers(list(self.values))


@dataclass
class Seen(Callback):
    """The first worker's parameters after each step."""

    rows: list

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.rows.append(flat(pl_module))


def flat(module):
    return np.concatenate([value.detach().numpy().ravel() for value in module.values])


def fit(algorithm, module, epochs=1, callbacks=(), **more):
    """Train. Returns the first worker's trajectory, and what all hold at the end."""
    dealt = torch.arange(WORKERS).repeat(len(module.problem.rates) // epochs)
    seen = Seen([])
    options = {"precision": "64-true", "max_epochs": epochs, "callbacks": [seen, *callbacks]}
    options["enable_checkpointing"] = bool(callbacks)
    fitted = trainer(1, SimulatedStrategy(algorithm, WORKERS), **options)
    fitted.fit(module, DataLoader(dealt, batch_size=None), **more)
    return np.array(seen.rows), flat(module)


def sparse_loco():
    compress = partial(test_sparse_loco.sparse, k=2, chunk=4)
    ours = SparseLoCo(4, 0.7, 0.95, ChunkedTopK(2, chunk=4))
    return ours, MOMENTUM, test_sparse_loco.listing(CHANGING, WORKERS, 4, 0.7, 0.95, compress)


def noloco():
    return NoLoCo(4, 0.7, 0.5, seed=3), MOMENTUM, test_noloco.listing(CHANGING, WORKERS, 4, 0.7, 0.5, 3)


def des_loc():
    return DESLOC(2, 5, 12), test_des_loc.ADAM, test_des_loc.listing(CHANGING, WORKERS, 2, 5, 12)


START, PERIOD, COURSE = 8, 4, Ramp({12: 0.0, 16: 0.8, 20: 0.8, 24: 0.4})


def pier():
    """Lazy start: averaged gradients, while b gathers and moves nothing; then DiLoCo with a momentum that changes."""
    problem, eta, rows, gathered = CHANGING, 0.7, [], 0.0
    x = [problem.initial() for _ in range(WORKERS)]
    inner = [reference.SGD(0.9) for _ in range(WORKERS)]
    anchor, b = problem.initial(), [np.zeros_like(value) for value in problem.initial()]
    for step, rates in enumerate(problem.rates):
        lazy = step < START
        for p, group in enumerate(problem.group_of):
            g = [problem.gradient(i, step, p, x[i][p]) for i in range(WORKERS)]
            for i in range(WORKERS):
                x[i][p] = inner[i].step(p, x[i][p], sum(g) / WORKERS if lazy else g[i], rates[group])
            if (step + 1) % PERIOD:
                continue
            mu, outer = COURSE.at(step + 1), anchor[p] - sum(each[p] for each in x) / WORKERS
            b[p] = mu * b[p] + outer
            anchor[p] = anchor[p] - (outer if lazy else eta * (outer + mu * b[p]))
            gathered = max(gathered, np.abs(b[p]).max(initial=0.0)) if lazy else gathered
            for each in x if not lazy else ():
                each[p] = anchor[p].copy()
        rows.append([np.concatenate([np.ravel(value) for value in each]) for each in x])
    assert gathered > 0.01
    return DiLoCo(PostLocal(START, PERIOD), eta, COURSE), MOMENTUM, np.array(rows)


@pytest.mark.parametrize("case", [sparse_loco, noloco, des_loc, pier])
def test_the_trainer_follows_the_listing(case):
    algorithm, optimizer, rows = case()
    trajectory, end = fit(algorithm, Listed(CHANGING, optimizer))
    same(trajectory, rows[:, 0])
    same(end, rows[-1].mean(axis=0))
    assert np.abs(rows[-2] - rows[-2].mean(axis=0)).max() > 1e-3  # workers do differ in between


def test_the_trainer_follows_muloco():
    trajectory, end = fit(DiLoCo(test_muloco.EVERY, 0.7, 0.6), Muon())
    rows = np.array(test_muloco.listing(WORKERS, 0.7, 0.6))
    same(trajectory[-1], rows[0])
    same(end, rows.mean(axis=0))


# QSR under a cosine ---------------------------------------------------------------------------------------------------

COSINE = Problem(GROUPS, tuple((0.1 * (1 + math.cos(math.pi * s / 40)), 0.0) for s in range(40)), seed=2)
QSR_RULE = QSR(base=2, coefficient=0.3)


def periods(rates, base, alpha):
    """The paper's H = max(base, floor((alpha / eta)²)) at the first step of each period."""
    ends, step = [], 0
    while step < len(rates):
        step += max(base, math.floor((alpha / rates[step]) ** 2))
        ends.append(min(step, len(rates)))
    return ends


def local_sgd(problem, workers, ends):
    """Local steps, and the mean of all at the end of each period."""
    x = [problem.initial() for _ in range(workers)]
    inner = [reference.SGD(0.9) for _ in range(workers)]
    rows = []
    for step, rates in enumerate(problem.rates):
        for i in range(workers):
            for p, group in enumerate(problem.group_of):
                x[i][p] = inner[i].step(p, x[i][p], problem.gradient(i, step, p, x[i][p]), rates[group])
        if step + 1 in ends:
            means = [sum(each[p] for each in x) / workers for p in range(len(problem.shapes))]
            x = [[mean.copy() for mean in means] for _ in range(workers)]
        rows.append([np.concatenate([np.ravel(value) for value in each]) for each in x])
    return np.array(rows)


def test_qsr_has_the_formulas_periods_under_a_cosine_and_after_a_resume_in_the_middle(tmp_path):
    ends = periods([rates[0] for rates in COSINE.rates], 2, 0.3)
    lengths = np.diff([0, *ends])
    assert len(set(lengths)) >= 4
    at = 20  # between two epochs of five steps, and in the middle of a period
    assert at not in ends
    assert lengths[np.searchsorted(ends, at)] > QSR_RULE.base
    rows = local_sgd(COSINE, WORKERS, ends)
    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=at, save_top_k=-1)
    trajectory, end = fit(LocalSGD(QSR_RULE), Listed(COSINE, MOMENTUM), 8, [saves])
    same(trajectory[:-1], rows[:-1, 0])  # the last period ends with training
    same(end, rows[-1].mean(axis=0))
    resumed, end = fit(LocalSGD(QSR_RULE), Listed(COSINE, MOMENTUM), 8, ckpt_path=tmp_path / f"step={at}.ckpt")
    same(resumed[:-1], rows[at:-1, 0])
    same(end, rows[-1].mean(axis=0))
