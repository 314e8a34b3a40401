"""The strategy in loops of one's own under Fabric: it does what the Trainer's does, to the last bit."""

import logging
import subprocess
import sys

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from lightning.pytorch.plugins import MixedPrecision as TrainerPrecision

from lightning_slowmo import AllReduce, LocalSGD, SketchedSGD, SlowMo, SlowMoFabricStrategy, SlowMoStrategy
from tests.harness import run_trainers
from tests.trainer.models import Regression, data, distance, numbers, trainer

logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
SIZE, SYNC_EVERY, EPOCHS = 2, 3, 2  # of 8 batches each


def launched(algorithm, size=SIZE, plugins=None, precision=None, **options):
    strategy = algorithm if isinstance(algorithm, str) else SlowMoFabricStrategy(algorithm, **options)
    fabric = Fabric(accelerator="cpu", devices=size, strategy=strategy, plugins=plugins, precision=precision)
    fabric.launch()
    return fabric


def setup(fabric, **arguments):
    """A model, its optimizer and its scheduler; arguments as of :class:`Regression`."""
    module = Regression(**arguments)
    configured = module.configure_optimizers()
    if not isinstance(configured, dict):
        return *fabric.setup(module.net, configured), None
    model, optimizer = fabric.setup(module.net, configured["optimizer"])
    return model, optimizer, configured["lr_scheduler"]["scheduler"]


def loop(fabric, batches, model, optimizer, scheduler, accumulate=1, clip=None, first=0):
    """The steps of a few epochs, as in a script of a user's."""
    for index, (inputs, targets) in enumerate(batches):
        if index < first:
            continue
        waits = (index + 1) % accumulate != 0
        with fabric.no_backward_sync(model, enabled=waits):
            fabric.backward(torch.nn.functional.mse_loss(model(inputs), targets) / accumulate)
        if waits:
            continue
        if clip is not None:
            fabric.clip_gradients(model, optimizer, max_norm=clip, error_if_nonfinite=False)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()


def epochs(rank, count=EPOCHS, **arguments):
    return [batch for _ in range(count) for batch in data(rank, **arguments)]


# The same as the Trainer's --------------------------------------------------------------------------------------------

SCALED = {"init_scale": 2.0**14, "growth_interval": 3}
TWINS = {
    # name: (algorithm, precision, loop's options, the Trainer's, the model's)
    "by name": ("slowmo", None, {}, {}, {"momentum": 0.5}),
    "adam, a scheduler": (SlowMo(sync_every=SYNC_EVERY), None, {}, {}, {"adam": True, "warm_up": 3}),
    "batch norm": (LocalSGD(SYNC_EVERY), None, {}, {}, {"batch_norm": True}),
    "accumulated and clipped": (
        *(SlowMo(sync_every=SYNC_EVERY), None),
        *({"accumulate": 2, "clip": 0.3}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3}, {}),
    ),
    "gradients, accumulated and clipped": (
        *(SketchedSGD(k=0.2, columns=0.4), None),
        *({"accumulate": 2, "clip": 0.3}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3}, {}),
    ),
    "gradients with a scaler": (
        SketchedSGD(k=0.2, columns=0.4),
        "16-mixed",
        {"clip": 0.5},
        {"gradient_clip_val": 0.5},
        {},
    ),
    "gradients": (AllReduce(), "bf16-mixed", {}, {}, {"momentum": 0.5}),
}


def plugin(kind, precision):
    scaler = torch.amp.GradScaler("cpu", **SCALED)
    return {"plugins": kind("16-mixed", "cpu", scaler)} if precision == "16-mixed" else {"precision": precision}


def train_twins(rank, folder):
    results = {}
    for name, (algorithm, precision, options, theirs, arguments) in TWINS.items():
        fabric = launched(algorithm, **plugin(MixedPrecision, precision))
        model, optimizer, scheduler = setup(fabric, **arguments)
        loop(fabric, epochs(rank), model, optimizer, scheduler, **options)
        fabric.strategy.finish()
        strategy = algorithm if isinstance(algorithm, str) else SlowMoStrategy(algorithm)
        twin, arguments = Regression(**arguments), theirs | plugin(TrainerPrecision, precision)
        fitting = trainer(SIZE, strategy, **arguments)
        fitting.fit(twin, data(rank))
        counts = fabric.strategy.report.count, fitting.strategy.report.count
        results[name] = numbers(model), numbers(twin.net), counts
    results |= {check.__name__: check(rank, folder) for check in CHECKS}
    return results


# Checkpoints ----------------------------------------------------------------------------------------------------------


def objects(fabric, **arguments):
    model, optimizer, scheduler = setup(fabric, adam=True, warm_up=3, batch_norm=True, **arguments)
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "precision": fabric.strategy.precision}


def go_on(fabric, state, rank, first=0, count=EPOCHS, **options):
    parts = state["model"], state["optimizer"], state["scheduler"]
    loop(fabric, epochs(rank, count), *parts, first=first, **options)
    fabric.strategy.finish()
    return numbers(state["model"])


def resumed(rank, folder):
    """Saved after 8 of 16 steps, in the middle of a period; a scaler of its own on every rank."""
    path, found = f"{folder}/middle.ckpt", {}

    def fabric():
        return launched(SlowMo(sync_every=SYNC_EVERY), plugins=plugin(MixedPrecision, "16-mixed")["plugins"])

    first = fabric()
    state = objects(first)
    loop(first, epochs(rank, 1), state["model"], state["optimizer"], state["scheduler"])
    own = numbers(state["model"])
    first.save(path, state | {"step": 8, "rank": rank})
    assert numbers(state["model"]) == own
    found["end"] = go_on(first, state, rank, first=8)
    second = fabric()
    state = objects(second, seed=2) | {"step": 0, "rank": None}
    assert second.load(path, state) == {}
    found["own"] = own, numbers(state["model"])
    found["values"] = state["step"], state["rank"]
    found["resumed end"] = go_on(second, state, rank, first=state["step"])
    found["file"] = numbers_of(torch.load(path)["model"])
    first.barrier()
    return found


def numbers_of(state):
    return [tensor.double().flatten().tolist() for tensor in state.values()]


def other_strategies(rank, folder):
    """``ddp`` opens a checkpoint of the middle, the strategy opens one of ``ddp``'s, and raw weights."""
    path, found = f"{folder}/middle.ckpt", {}
    fabric = launched("ddp")
    state = {name: part for name, part in objects(fabric).items() if name != "precision"}
    left = fabric.load(path, state)
    found["ddp"] = numbers(state["model"].module), sorted(left)
    state["step"] = 8
    fabric.save(f"{folder}/ddp.ckpt", state)
    if rank == 0:
        torch.save(torch.load(path)["model"], f"{folder}/raw.pt")
    fabric.barrier()
    ends = []
    for source in ("ddp.ckpt", "raw.pt"):
        fabric = launched(SlowMo(sync_every=SYNC_EVERY))
        state = objects(fabric, seed=2)
        if source == "raw.pt":
            fabric.load_raw(f"{folder}/{source}", state["model"])
        else:
            fabric.load(f"{folder}/{source}", {"model": state["model"]})
        start = numbers(state["model"])
        ends.append((start, go_on(fabric, state, rank, count=1)))
    found["from others"] = ends
    return found


# Other things a script does -------------------------------------------------------------------------------------------


def consensus(rank, folder):
    """Validated in between, and not: the same bits afterwards; the same model on all workers inside."""
    ends, inside = [], []
    for validate in (True, False):
        fabric = launched(SlowMo(sync_every=SYNC_EVERY))
        state = objects(fabric)
        with fabric.strategy.training():
            for start in range(0, 16, 4):
                if validate:
                    with fabric.strategy.consensus():
                        inside.append(numbers(state["model"]))
                        mean = fabric.all_reduce(torch.tensor(float(rank)))
                        assert mean.item() == 0.5
                parts = state["model"], state["optimizer"], state["scheduler"]
                loop(fabric, epochs(rank)[: start + 4], *parts, first=start)
        ends.append(numbers(state["model"]))
    return ends, inside


def uneven(rank, folder):
    """Rank 0 has 5 batches, rank 1 has 8, and collectives come in between."""
    fabric = launched(SlowMo(sync_every=SYNC_EVERY))
    model, optimizer, _ = setup(fabric)
    with fabric.strategy.training():
        loop(fabric, epochs(rank, 1)[: (5, 8)[rank]], model, optimizer, None)
        fabric.barrier()
        total = fabric.all_reduce(torch.tensor(1.0 + rank), reduce_op="sum")
        torch.distributed.all_reduce(total)  # not through the strategy
        fabric.save(f"{folder}/uneven.ckpt", {"model": model})
    return numbers(model), total.item()


def two_models(rank, folder):
    """Two models that are set up one after the other train like one that holds both."""
    ends = []
    for apart in (True, False):
        fabric = launched(SlowMo(sync_every=SYNC_EVERY))
        nets = torch.nn.ModuleList([Regression().net, Regression(seed=2).net])
        optimizers = [torch.optim.SGD(nets[0].parameters(), 0.05), torch.optim.Adam(nets[1].parameters(), 0.01)]
        if apart:
            pairs = [fabric.setup(net, optimizer) for net, optimizer in zip(nets, optimizers, strict=True)]
            models, optimizers = zip(*pairs, strict=True)
        else:
            _, *optimizers = fabric.setup(nets, *optimizers)
            models = nets
        for step, (inputs, targets) in enumerate(epochs(rank)):
            for model, optimizer in list(zip(models, optimizers, strict=True))[: 1 + step % 2]:
                fabric.backward(torch.nn.functional.mse_loss(model(inputs), targets))
                optimizer.step()
                optimizer.zero_grad()
        if apart:
            state = {"first": models[0], "second": models[1], "a": optimizers[0], "b": optimizers[1]}
            fabric.save(f"{folder}/two.ckpt", state)
            before = numbers(nets)
            for parameter in nets.parameters():
                parameter.data.zero_()
            fabric.load(f"{folder}/two.ckpt", state)
            assert numbers(nets) == before
        fabric.strategy.finish()
        ends.append((numbers(nets), fabric.strategy.core.engine.rounds))
    return ends


def refused(rank, folder):
    """What would never be synced, or was not set up together, is an error that says what to do."""
    messages = []

    def expect(kind, act):
        with pytest.raises(kind) as error:
            act()
        messages.append(str(error.value))

    fabric = launched("slowmo")
    module = Regression().net
    raw = torch.optim.SGD(module.parameters(), 0.1)
    expect(NotImplementedError, lambda: fabric.setup_module(module))
    expect(NotImplementedError, lambda: fabric.setup_optimizers(raw))
    expect(RuntimeError, lambda: fabric.strategy.training().__enter__())
    teacher = fabric.setup_module(Regression().net.requires_grad_(False))
    assert not teacher(torch.ones(1, 5)).requires_grad
    model, optimizer = fabric.setup(module, raw)
    inputs = torch.ones(4, 5)
    expect(RuntimeError, lambda: model(inputs).sum().backward())
    fabric.backward(model(inputs).square().sum())
    expect(RuntimeError, raw.step)
    foreign = fabric.setup_dataloaders(data(rank))
    assert len(foreign.sampler) == 16  # a sampler that gives each rank its share
    with torch.no_grad():
        module[0].weight.mul_(2)
    expect(RuntimeError, optimizer.step)
    with torch.no_grad():
        module[0].weight.div_(2)
    fabric.strategy.core.engine.rounds = 0
    fabric.load_raw(saved(fabric, module, folder), model)
    optimizer.step()
    expect(RuntimeError, lambda: fabric.setup(Regression().net, torch.optim.SGD(Regression().parameters(), 0.1)))
    with fabric.strategy.consensus():
        expect(RuntimeError, optimizer.step)
    fabric.strategy.finish()
    expect(RuntimeError, optimizer.step)
    with fabric.strategy.training():
        optimizer.step()
    raw.step()  # nobody waits for anybody any more
    for options in ({"ddp_kwargs": {"bucket_cap_mb": 1}}, {"on_nonfinite": "ignore"}, {"workers_per_node": 0}):
        expect(ValueError, lambda options=options: SlowMoFabricStrategy("slowmo", **options))
    return messages


def saved(fabric, module, folder):
    path = f"{folder}/own.pt"
    if fabric.global_rank == 0:
        torch.save(module.state_dict(), path)
    fabric.barrier()
    return path


CHECKS = (resumed, other_strategies, consensus, uneven, two_models, refused)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return run_trainers(SIZE, train_twins, str(tmp_path_factory.mktemp("fabric")), limit=240)


@pytest.mark.processes
@pytest.mark.parametrize("name", TWINS)
def test_it_trains_the_same_model_as_the_trainer(trained, name):
    for results in trained:
        fabric, fitted, (count, expected) = results[name]
        assert fabric == fitted == trained[0][name][0]
        assert count == expected
        assert distance(fabric, numbers(Regression(**TWINS[name][4]).net)) > 1e-2


@pytest.mark.processes
def test_a_resume_in_the_middle_of_a_period_is_bit_exact(trained):
    found = [results["resumed"] for results in trained]
    for rank, each in enumerate(found):
        own, loaded = each["own"]
        assert own == loaded
        assert each["values"] == (8, rank)
        assert each["resumed end"] == each["end"] == found[0]["end"]
    means = [
        [(a + b) / 2 for a, b in zip(*rows, strict=True)] for rows in zip(*(f["own"][0] for f in found), strict=True)
    ]
    assert found[0]["own"][0] != found[1]["own"][0]
    assert distance(means, found[0]["file"]) < 1e-6


@pytest.mark.processes
def test_ddp_opens_its_checkpoints_and_it_opens_ddps_and_raw_weights(trained):
    for results in trained:
        loaded, left = results["other_strategies"]["ddp"]
        assert loaded == results["resumed"]["file"]
        assert left == ["lightning_slowmo", "precision", "rank", "step"]
        for (start, end), (_, first) in zip(
            results["other_strategies"]["from others"], trained[0]["other_strategies"]["from others"], strict=True
        ):
            assert start == loaded
            assert end == first
            assert distance(start, end) > 1e-3


@pytest.mark.processes
def test_the_consensus_is_one_model_and_leaves_no_trace(trained):
    for results in trained:
        (validated, plain), inside = results["consensus"]
        assert validated == plain == trained[0]["consensus"][0][0]
        assert inside == trained[0]["consensus"][1]
        assert inside[1] != inside[2]


@pytest.mark.processes
def test_uneven_inputs_end_and_collectives_wait_for_all(trained):
    (first, total), (second, other) = (results["uneven"] for results in trained)
    assert first == second
    assert total == other == 6.0


@pytest.mark.processes
def test_models_that_are_set_up_apart_train_as_together(trained):
    for results in trained:
        (apart, rounds), (together, expected) = results["two_models"]
        assert apart == together == trained[0]["two_models"][0][0]
        assert (rounds, expected) == (16 // SYNC_EVERY + 8 // SYNC_EVERY,) * 2


@pytest.mark.processes
def test_what_would_not_be_synced_is_refused(trained):
    expected = [
        "does not support setting up the module and optimizer(s) independently",
        "Please call `setup_module_and_optimizers(model, [optimizer, ...])` to jointly set them up.",
        "Call fabric.setup(model, optimizer) before",
        "call `fabric.backward(loss)`",
        "Call step() on the optimizer that fabric.setup returned.",
        "changed between fabric.setup and the first step",
        "before the first step",
        "outside of fabric.strategy.consensus()",
        "inside `with fabric.strategy.training():`",
        "workers_per_node is None",
        "on_nonfinite must be",
        "workers_per_node must be",
    ]
    for results in trained:
        messages = results["refused"]
        assert len(messages) == len(expected)
        for message, text in zip(messages, expected, strict=True):
            assert text in message


# Failures -------------------------------------------------------------------------------------------------------------


def fail(rank):
    fabric = launched(SlowMo(sync_every=SYNC_EVERY))
    model, optimizer, _ = setup(fabric)
    with fabric.strategy.training():
        loop(fabric, epochs(rank)[: 4 if rank else 16], model, optimizer, None)
        raise ValueError("no more digits")


@pytest.mark.processes
def test_the_others_are_told_why_a_worker_failed():
    waiting, failing = run_trainers(SIZE, fail, expect_failure=True, limit=60)
    assert failing.startswith("ValueError: no more digits")
    assert waiting.startswith("SyncError")
    assert "rank 1 (node 0) failed: ValueError: no more digits" in waiting or "rank 1 failed: ValueError" in waiting


UNCAUGHT = """
import os, sys
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[2], "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
os.environ |= {"RANK": sys.argv[1], "LOCAL_RANK": sys.argv[1], "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
from tests.fabric.test_fabric import *
rank = int(sys.argv[1])
fabric = launched(SlowMo(sync_every=SYNC_EVERY))
model, optimizer, _ = setup(fabric)
loop(fabric, epochs(rank)[: 4 if rank else 16], model, optimizer, None)
raise ValueError("no more digits")
"""


@pytest.mark.faults
@pytest.mark.processes
def test_an_error_that_nothing_catches_is_told_without_the_context():
    from tests.harness import free_port

    port = str(free_port())
    started = [
        subprocess.Popen([sys.executable, "-c", UNCAUGHT, str(rank), port], stderr=subprocess.PIPE, text=True)
        for rank in range(SIZE)
    ]
    texts = [process.communicate(timeout=400)[1] for process in started]
    assert "ValueError: no more digits" in texts[1]
    assert "failed: ValueError: no more digits" in texts[0].rsplit("SyncError", 1)[-1]


# Two levels -----------------------------------------------------------------------------------------------------------


def train_on_two_levels(rank, folder):
    algorithm, ends = SlowMo(sync_every=SYNC_EVERY), []
    fabric = launched(algorithm, size=4, workers_per_node=2)
    state = objects(fabric)
    loop(fabric, epochs(rank), state["model"], state["optimizer"], state["scheduler"], accumulate=2, first=8)
    fabric.save(f"{folder}/levels.ckpt", state)
    own = numbers(state["model"])
    trained = [parameter.tolist() for parameter in state["model"].parameters()]
    ends.append(go_on(fabric, state, rank, accumulate=2))
    second = launched(algorithm, size=4, workers_per_node=2)
    state = objects(second, seed=2)
    second.load(f"{folder}/levels.ckpt", state)
    assert numbers(state["model"]) == own
    ends.append(go_on(second, state, rank, accumulate=2))
    fabric = launched(algorithm, size=4, workers_per_node=2)
    state = objects(fabric)
    ends.append(go_on(fabric, state, rank, accumulate=2))
    module = Regression(adam=True, warm_up=3, batch_norm=True)
    strategy = SlowMoStrategy(algorithm, workers_per_node=2)
    trainer(4, strategy, accumulate_grad_batches=2).fit(module, data(rank))
    return ends, numbers(module.net), trained


@pytest.mark.processes
def test_two_levels_do_as_in_the_trainer_and_resume_exactly(tmp_path):
    results = run_trainers(4, train_on_two_levels, str(tmp_path), limit=180)
    assert results[0][2] == results[1][2] != results[2][2] == results[3][2]
    for (end, resumed_end, whole), fitted, _ in results:
        assert end == resumed_end == results[0][0][0]
        assert whole == fitted == results[0][1]


# Without the Trainer --------------------------------------------------------------------------------------------------

ALONE = """
import sys
sys.modules["lightning"] = sys.modules["pytorch_lightning"] = None  # as if they were not installed
import torch
from lightning_fabric import Fabric
import lightning_slowmo
from lightning_slowmo import SlowMoFabricStrategy

fabric = Fabric(strategy="slowmo", accelerator="cpu", devices=1)
fabric.launch()
assert type(fabric.strategy) is SlowMoFabricStrategy, type(fabric.strategy)
net = torch.nn.Linear(2, 1)
model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), 0.1))
with fabric.strategy.training():
    for _ in range(13):
        fabric.backward(model(torch.ones(1, 2)).square().sum())
        optimizer.step()
assert fabric.strategy.report.count == 1
foreign = [name for name in sys.modules if "pytorch" in name and "lightning" in name and sys.modules[name]]
own = [name for name in sys.modules if name.startswith("lightning_slowmo.trainer")]
print("loaded:", foreign + own)
"""


@pytest.mark.processes
def test_neither_lightning_nor_its_trainer_is_needed():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=600)
    said = [line for line in done.stdout.splitlines() if not line.startswith("[Gloo]")]  # torch 2.10's prints there
    assert said == ["loaded: []"], done.stderr


@pytest.mark.faults
@pytest.mark.processes
def test_processes_may_be_spawned():
    code = "from tests.fabric.test_fabric import *; spawn()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert "syncs: 1" in done.stdout, done.stderr


def spawn():
    fabric = Fabric(strategy="slowmo_spawn", accelerator="cpu", devices=SIZE)
    print("syncs:", fabric.launch(spawned))


def spawned(fabric):
    model, optimizer, _ = setup(fabric)
    with fabric.strategy.training():
        loop(fabric, epochs(fabric.global_rank), model, optimizer, None)
    gathered = fabric.all_gather(torch.nn.utils.parameters_to_vector(model.parameters()).detach())
    assert gathered[0].equal(gathered[1])
    return fabric.strategy.report.count
