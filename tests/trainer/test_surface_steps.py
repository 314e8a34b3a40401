"""What happens in and around an optimizer step: the Trainer's options against a simulation in one process.

The simulation trains all workers one after the other in plain PyTorch, and does to them at every sync what the paper's
Algorithm 1 says. Whatever Lightning is asked to do besides (accumulate, clip, schedule, cast), both must agree.
"""

import copy
import math
import warnings

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from lightning_slowmo import LocalSGD, SlowMo, SlowMoStrategy
from tests.harness import run_trainers
from tests.trainer.models import Regression, data, distance, numbers, trainer

SIZE, SYNC_EVERY, BETA, RATE = 2, 3, 0.5, 0.05
EPOCHS, BATCHES = 3, 8

SCALE = 2.0**8  # of losses in half precision

EXACT, CAST = 1e-10, 1e-5


# The simulation -------------------------------------------------------------------------------------------------------


def clipped(parameters, by):
    for name, limit in by.items():
        {"norm": torch.nn.utils.clip_grad_norm_, "value": torch.nn.utils.clip_grad_value_}[name](parameters, limit)


def batches_of(rank, spoiled=None):
    """The batches of a worker; one worker may have a batch whose targets are so large that half precision overflows."""
    batches = [(inputs, targets.clone()) for inputs, targets in data(rank)]
    if rank == 1 and spoiled is not None:
        batches[spoiled][1].fill_(3e4)
    return batches


def steps_of(model, batches, accumulate=1, clip=None, autocast=None, rate=None):
    """Train one worker, pausing after each step."""
    optimizer = torch.optim.SGD(model.net.parameters(), lr=RATE)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=autocast is torch.float16)
    parameters = list(model.net.parameters())
    step = 0
    for epoch in range(EPOCHS):
        for first in range(0, len(batches), accumulate):
            optimizer.zero_grad()
            for batch in batches[first : first + accumulate]:
                with torch.autocast("cpu", autocast, enabled=autocast is not None, cache_enabled=False):
                    loss = model.loss(batch)
                scaler.scale(loss / accumulate).backward()
            clipped(parameters, clip or {})
            used = RATE if rate is None else rate(epoch, step)
            optimizer.param_groups[0]["lr"] = used
            scaler.step(optimizer)  # unless a gradient overflowed
            scaler.update()
            step += 1
            yield used


def mean(models):
    return [torch.stack(own).mean(0) for own in zip(*(list(model.net.parameters()) for model in models), strict=True)]


@torch.no_grad()
def set_all(models, values):
    for model in models:
        for parameter, value in zip(model.net.parameters(), values, strict=True):
            parameter.copy_(value)


def simulate(sync_every=SYNC_EVERY, spoiled=None, rates=None, dtype=torch.float64, **options):
    """SlowMo in the paper's own units, on all workers."""
    models = [copy.deepcopy(Regression()).to(dtype) for _ in range(SIZE)]
    anchor = mean(models)
    momentum = [torch.zeros_like(value) for value in anchor]
    workers = []
    for rank, model in enumerate(models):
        batches = [(inputs.to(dtype), targets.to(dtype)) for inputs, targets in batches_of(rank, spoiled)]
        rate = rates and (lambda epoch, step, rank=rank: rates(rank, epoch, step))
        workers.append(steps_of(model, batches, rate=rate, **options))
    for count, used in enumerate(zip(*workers, strict=True), start=1):
        if count % sync_every == 0:
            gamma = math.fsum(used) / SIZE
            with torch.no_grad():
                for x, u, average in zip(anchor, momentum, mean(models), strict=True):
                    u.mul_(BETA).add_((x - average) / gamma if gamma else 0.0)
                    x.sub_(gamma * u)
            set_all(models, anchor)
    set_all(models, mean(models))
    return numbers(models[0])


# What is compared -----------------------------------------------------------------------------------------------------


class Scheduled(Regression):
    """With a scheduler of the test's choice, after a rate that is a local metric of each rank."""

    scheduler = interval = None
    frequency = 1

    def training_step(self, batch, batch_idx):
        # Worse at each batch on rank 1 alone, so that only its scheduler finds a plateau.
        self.log("local", float(batch_idx + self.current_epoch * BATCHES) * (1 if self.global_rank else -1))
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=RATE)
        if self.scheduler is None:
            return optimizer
        entry = {"scheduler": self.scheduler(optimizer), "interval": self.interval, "monitor": "local"}
        return {"optimizer": optimizer, "lr_scheduler": entry}


class Exponential(Scheduled):
    interval = "step"

    def scheduler(self, optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


class ByEpoch(Scheduled):
    interval = "epoch"

    def scheduler(self, optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)


class WarmUp(Scheduled):
    interval = "step"

    def scheduler(self, optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 4, 1.0))


class Plateau(Scheduled):
    interval = "epoch"

    def scheduler(self, optimizer):
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.25, patience=0)


def plateau(rank, epoch, step):
    """The first epoch sets the best value; every one after it is worse, on rank 1."""
    return RATE * 0.25 ** max(0, epoch - 1) if rank else RATE


def scaler_plugin():
    # Lightning replaces 16-mixed by bf16-mixed on CPUs; its plugin runs there all the same.
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=SCALE))


DOUBLE, SINGLE = {"precision": "64-true"}, {"precision": "32-true"}

SCENARIOS = {
    # name: (module, Trainer's arguments, simulation's arguments, tolerance)
    "plain": (Scheduled, DOUBLE, {}, EXACT),
    "accumulation, the last step of an epoch partial": (
        Scheduled,
        DOUBLE | {"accumulate_grad_batches": 3},
        {"accumulate": 3},
        EXACT,
    ),
    "clipping by norm": (
        Scheduled,
        DOUBLE | {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "norm"},
        {"clip": {"norm": 0.5}},
        EXACT,
    ),
    "clipping by value": (
        Scheduled,
        DOUBLE | {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
        {"clip": {"value": 0.1}},
        EXACT,
    ),
    "a scheduler by step": (Exponential, DOUBLE, {"rates": lambda r, e, s: RATE * 0.9**s}, EXACT),
    "a scheduler by epoch": (ByEpoch, DOUBLE, {"rates": lambda r, e, s: RATE * 0.5**e}, EXACT),
    "warm-up from 0": (
        WarmUp,
        DOUBLE,
        {"rates": lambda r, e, s: RATE * min(s / 4, 1), "sync_every": 1},
        EXACT,
    ),
    "a plateau on one rank": (Plateau, DOUBLE, {"rates": plateau}, EXACT),
    "bf16-mixed": (
        Scheduled,
        {"precision": "bf16-mixed"},
        {"autocast": torch.bfloat16, "dtype": torch.float32},
        CAST,
    ),
    "16-mixed, one rank skips a step": (
        Scheduled,
        {"plugins": scaler_plugin},
        {"autocast": torch.float16, "dtype": torch.float32, "spoiled": 3},
        CAST,
    ),
}


def fit(rank, kind, arguments, sync_every=SYNC_EVERY, spoiled=None):
    module = kind()
    arguments = {name: value() if callable(value) else value for name, value in arguments.items()}
    algorithm = SlowMo(LocalSGD(sync_every), sync_every=sync_every, slow_momentum=BETA)
    fitting = trainer(SIZE, SlowMoStrategy(algorithm), max_epochs=EPOCHS, **arguments)
    fitting.fit(module, torch.utils.data.DataLoader(batches_of(rank, spoiled), batch_size=None))
    return module, fitting


def fit_all(rank):
    results = {}
    for name, (kind, arguments, simulation, _) in SCENARIOS.items():
        some = {key: simulation[key] for key in ("sync_every", "spoiled") if key in simulation}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module, fitting = fit(rank, kind, arguments, **some)
        scaler = getattr(fitting.precision_plugin, "scaler", None)
        results[name] = {
            "model": numbers(module),
            "dtypes": {p.dtype for p in module.parameters()} | {fitting.strategy.engine.units[0].anchor[0].dtype},
            "syncs": fitting.strategy.report.count,
            "rate": fitting.optimizers[0].param_groups[0]["lr"],
            "scale": scaler and scaler.get_scale(),
        }
    return results


@pytest.fixture(scope="module")
def fitted():
    return run_trainers(SIZE, fit_all)


@pytest.mark.processes
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_fit_is_what_the_simulation_of_all_workers_says(fitted, name):
    _, arguments, simulation, tolerance = SCENARIOS[name]
    first, second = (results[name] for results in fitted)
    assert first["model"] == second["model"]
    expected = simulate(**{"dtype": torch.float64} | simulation)
    assert distance(first["model"], expected) < tolerance
    steps = EPOCHS * -(-BATCHES // simulation.get("accumulate", 1))
    assert first["syncs"] == second["syncs"] == steps // simulation.get("sync_every", SYNC_EVERY)
    assert first["dtypes"] == {torch.float64 if arguments.get("precision") == "64-true" else torch.float32}
    if name != "plain":  # the option makes a difference, so it was in force in both
        assert distance(first["model"], fitted[0]["plain"]["model"]) > 1e-6


@pytest.mark.processes
def test_ranks_differ_where_the_scenario_means_them_to(fitted):
    first, second = (results["a plateau on one rank"]["rate"] for results in fitted)
    assert (first, second) == (RATE, RATE * 0.25**2)
    first, second = (results["16-mixed, one rank skips a step"]["scale"] for results in fitted)
    assert (first, second) == (SCALE, SCALE / 2**EPOCHS)  # rank 1 met the batch that overflows in every epoch


# Parameters in half precision -----------------------------------------------------------------------------------------


class OneSided(Regression):
    """One parameter, 1.0. Rank 0 steps down by the least that bfloat16 can see there, rank 1 not at all."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(self.net.weight)

    def training_step(self, batch, batch_idx):
        return self.net.weight.sum() * (0.0 if self.global_rank else 1.0)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=2**-8)


def fit_in_half_precision(rank):
    module = OneSided()
    algorithm = SlowMo(sync_every=1, slow_momentum=0.0, slow_lr=0.25)
    fitting = trainer(SIZE, SlowMoStrategy(algorithm), max_steps=16, max_epochs=-1, precision="bf16-true")
    fitting.fit(module, data(rank))
    engine = fitting.strategy.engine
    wide = Regression()
    fitting = trainer(SIZE, "slowmo", precision="bf16-true")
    fitting.fit(wide, data(rank))
    return (
        {p.dtype for p in module.parameters()},
        {state.dtype for state in (*engine.units[0].anchor, *engine.units[0].momentum)},
        float(engine.units[0].anchor[0]),
        numbers(module),
        numbers(wide),
    )


@pytest.mark.processes
def test_bf16_true_keeps_slow_state_in_float32_so_small_outer_steps_add_up():
    results = run_trainers(SIZE, fit_in_half_precision)
    assert results[0] == results[1]
    parameters, slow, anchor, model, wide = results[0]
    assert parameters == {torch.bfloat16}
    assert slow == {torch.float32}
    # Each outer step is a quarter of half of 2**-8, which a bfloat16 near 1 cannot hold.
    assert anchor < 1 - 8 * 2**-11
    assert abs(model[0][0] - anchor) <= 2**-8
    assert distance(wide, numbers(Regression())) > 1e-2
