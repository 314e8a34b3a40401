"""Optimizers unlike SGD and Adam, through the Trainer."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_slowmo import LocalSGD, SlowMo, SlowMoStrategy
from lightning_slowmo.algorithms.iterates import Iterates
from tests.algorithms.optimizers import SAM, RelativeStep, ScheduleFreeSGD
from tests.harness import run_trainers
from tests.trainer.models import Regression, all_finite, data, distance, numbers, trainer

EVERY = 3
OPTIMIZERS = {
    "relative step": RelativeStep,
    "schedule-free": ScheduleFreeSGD,
    "RMSprop": torch.optim.RMSprop,
    "Rprop": torch.optim.Rprop,
    "SAM": SAM,
}
AUTOMATIC = [name for name in OPTIMIZERS if name != "SAM"]


class With(Regression):
    """The regression with another optimizer."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def configure_optimizers(self):
        return OPTIMIZERS[self.name](self.parameters())


class Halves(With):
    """SAM in manual optimization, by its two half steps or by step(closure)."""

    def __init__(self, halves):
        super().__init__("SAM")
        self.halves = halves
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        sharp = self.optimizers()
        if self.halves:
            self.manual_backward(self.loss(batch))
            sharp.first_step(zero_grad=True)
            self.manual_backward(self.loss(batch))
            sharp.second_step(zero_grad=True)
        else:

            def closure():
                sharp.zero_grad()
                loss = self.loss(batch)
                self.manual_backward(loss)
                return loss

            closure()
            sharp.step(closure)


def fit_and_resume(rank, folder):
    """For each optimizer: the model after fit, after one that goes on from its middle, and the copies in the state."""
    results = {}
    for name in AUTOMATIC:  # an epoch has 8 steps, so the save is between two syncs
        path = f"{folder}/{name}"
        saves = ModelCheckpoint(path, "{step}", every_n_epochs=1, save_top_k=-1)
        ends = []
        for start in (None, f"{path}/step=8.ckpt"):
            module = With(name)
            fitting = trainer(
                2, SlowMoStrategy(SlowMo(sync_every=EVERY)), callbacks=[saves], enable_checkpointing=True, max_epochs=2
            )
            fitting.fit(module, data(rank), ckpt_path=start)
            ends.append(numbers(module))
            saves = ModelCheckpoint(f"{path}, resumed", save_top_k=0)
        copies = [z.flatten().tolist() for z in Iterates(fitting.optimizers[0]).tensors()]
        results[name] = *ends, copies, fitting.strategy.report.count
    return results


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    return run_trainers(2, fit_and_resume, str(tmp_path_factory.mktemp("checkpoints")))


@pytest.mark.processes
@pytest.mark.parametrize("name", AUTOMATIC)
def test_ranks_end_equal_and_resumed_runs_end_the_same(fitted, name):
    (end, resumed, copies, count), (end_there, _, copies_there, _) = (results[name] for results in fitted)
    assert all_finite(end)
    assert distance(end, numbers(With(name))) > 1e-3
    assert end == end_there == resumed
    assert copies == copies_there
    assert bool(copies) == (name == "schedule-free")
    assert count > 0


def fit_sharp(rank, halves):
    module = Halves(halves)
    fitting = trainer(2, SlowMoStrategy(LocalSGD(EVERY)))
    fitting.fit(module, data(rank))
    return numbers(module), fitting.strategy.report.count


@pytest.mark.processes
def test_half_steps_that_are_not_counted_are_an_error_at_once():
    for outcome in run_trainers(2, fit_sharp, True, expect_failure=True):
        assert "SGD was stepped without the strategy" in outcome
        assert "needs step(closure)" in outcome


@pytest.mark.processes
def test_whole_steps_of_the_same_optimizer_are_counted():
    (end, count), (end_there, _) = run_trainers(2, fit_sharp, False)
    assert count == 16 // EVERY
    assert end == end_there
