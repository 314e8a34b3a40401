"""The rest of a simulated fit: checkpoints, callbacks, loggers, several loaders, bad input, memory."""

import gc
import re

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_slowmo import Engine, LocalSGD, SimulatedStrategy, SlowMo, SlowMoStrategy, Workers, together
from tests.harness import run_trainers
from tests.trainer.models import Regression, distance, numbers, trainer
from tests.trainer.test_simulated import Model, batches, loader

SIZE = 2
ALGORITHM = SlowMo(sync_every=4)


def alike(ranks):
    """Equal batches for each rank. A resume in the middle of an epoch begins the data anew, which must not matter."""
    first = [batches(rank)[0] for rank in ranks]
    return DataLoader(7 * first, batch_size=None, generator=torch.Generator())


def fit(strategy, devices, ranks, steps, resume=None, save=None, **more):
    torch.manual_seed(1)
    module = Model("slowmo")
    fitted = trainer(devices, strategy, precision="64-true", max_steps=steps, **more)
    fitted.fit(module, alike(ranks), ckpt_path=resume)
    if save:
        fitted.save_checkpoint(save)
    return module, fitted


class SaveAt(Callback):
    """Saves at a step, in the middle of a period."""

    def __init__(self, path, step=6):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def really(rank, folder):
    """On processes: save, resume what simulated workers saved, and train without a break."""
    own = f"{folder}/processes.ckpt"
    whole, _ = fit(SlowMoStrategy(ALGORITHM), SIZE, [rank], 12, callbacks=[SaveAt(own)])
    resumed, _ = fit(SlowMoStrategy(ALGORITHM), SIZE, [rank], 12, resume=f"{folder}/simulated.ckpt")
    return numbers(whole), numbers(resumed)


@pytest.mark.processes
def test_checkpoints_are_those_of_processes_and_resume_in_the_middle_of_a_period(tmp_path):
    saved = str(tmp_path / "simulated.ckpt")
    whole, _ = fit(SimulatedStrategy(ALGORITHM, SIZE), 1, range(SIZE), 12, callbacks=[SaveAt(saved)])
    [(real, carried_over), _] = run_trainers(SIZE, really, str(tmp_path))
    assert distance(numbers(whole), real) < 1e-12
    assert distance(numbers(whole), carried_over) < 1e-12
    for path in (saved, str(tmp_path / "processes.ckpt")):
        resumed, _ = fit(SimulatedStrategy(ALGORITHM, SIZE), 1, range(SIZE), 12, resume=path)
        assert distance(numbers(whole), numbers(resumed)) < 1e-12


def test_another_number_of_workers_goes_on_from_the_consensus_and_says_so(tmp_path):
    path = str(tmp_path / "a.ckpt")
    fit(SimulatedStrategy(ALGORITHM, 3), 1, range(3), 6, save=path)
    with pytest.warns(UserWarning, match="saved by 3 workers and is continued by 2"):
        _, fitted = fit(SimulatedStrategy(ALGORITHM, 2), 1, range(2), 9, resume=path, max_epochs=-1)
    assert fitted.global_step == 9
    assert Model.load_from_checkpoint(path, name="slowmo", weights_only=True).net[0].weight.isfinite().all()


class Momenta(Callback):
    """Notes where the workers' momentum lies when training begins."""

    def on_train_start(self, trainer, pl_module):
        optimizers = [replica.optimizers[0] for replica in trainer.strategy._stage.replicas]
        self.addresses = [state["momentum_buffer"].data_ptr() for each in optimizers for state in each.state.values()]


def test_another_number_of_workers_does_not_share_the_optimizer_state_that_all_begin_with(tmp_path):
    path, momenta = str(tmp_path / "a.ckpt"), Momenta()
    maintains = SlowMo(sync_every=4, inner_buffers="maintain")
    fit(SimulatedStrategy(maintains, 3), 1, range(3), 6, save=path)
    with pytest.warns(UserWarning, match="saved by 3 workers and is continued by 2"):
        fit(SimulatedStrategy(maintains, 2), 1, range(2), 9, resume=path, max_epochs=-1, callbacks=[momenta])
    assert len(set(momenta.addresses)) == len(momenta.addresses) == 2 * 6


def test_a_fit_that_had_ended_already_ends_with_the_consensus_again(tmp_path):
    path = str(tmp_path / "a.ckpt")
    first, _ = fit(SimulatedStrategy(LocalSGD(4), 2), 1, range(2), 6, callbacks=[SaveAt(path, 6)])
    again, _ = fit(SimulatedStrategy(LocalSGD(4), 2), 1, range(2), 6, resume=path)
    assert distance(numbers(first), numbers(again)) < 1e-12


def test_the_module_has_memory_of_its_own_afterwards():
    module, _ = fit(SimulatedStrategy(ALGORITHM, 3), 1, range(3), 5)
    storages = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    assert len(storages) == len(list(module.parameters()))


def test_syncs_are_logged_with_the_bytes_as_if_sent_and_without_seconds(tmp_path):
    log = CSVLogger(tmp_path, name="", version="")
    _, fitted = fit(SimulatedStrategy(ALGORITHM, 3), 1, range(3), 8, logger=log, log_every_n_steps=1)
    log.save()
    head, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert "sync/bytes_sent" in head
    assert "sync/seconds" not in head
    assert len([row for row in rows if row]) == fitted.strategy.report.count == 2
    assert fitted.strategy.report.bytes_sent > 0


def test_presets_take_the_number_of_workers_from_the_environment(monkeypatch):
    monkeypatch.setenv("LIGHTNING_SLOWMO_WORKERS", "3")
    _, fitted = fit("local_sgd_simulated", 1, range(3), 4)
    assert fitted.strategy.workers.size == 3
    monkeypatch.delenv("LIGHTNING_SLOWMO_WORKERS")
    with pytest.raises(ValueError, match=r"SimulatedStrategy\(workers=32\)"):
        L.Trainer(strategy="slowmo_simulated", accelerator="cpu", devices=1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"workers": 0}, "positive integer, got 0"),
        ({"workers": "many"}, "positive integer, got 'many'"),
        ({"workers": 2, "algorithm": "slomo"}, "Unknown algorithm"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        SimulatedStrategy(**arguments)


def test_several_devices_are_refused():
    with pytest.raises(ValueError, match="on one device, but the Trainer has 2"):
        fit(SimulatedStrategy(ALGORITHM, 2), 2, range(2), 2)


class TwoLoaders(Regression):
    """Trains on a dictionary of batches."""

    def training_step(self, batch, batch_idx):
        return self.loss(batch["a"]) + self.loss(batch["b"])


def test_batches_of_several_loaders_are_dealt_together():
    module = TwoLoaders()
    fitted = trainer(1, SimulatedStrategy(LocalSGD(2), 2), precision="64-true", max_epochs=1)
    fitted.fit(module, {"a": loader(range(2)), "b": loader(range(2))})
    alone = Regression(lr=0.1)  # of two equal losses the gradient is twice as large
    trainer(1, SimulatedStrategy(LocalSGD(2), 2), precision="64-true", max_epochs=1).fit(alone, loader(range(2)))
    assert distance(numbers(module), numbers(alone)) < 1e-12


class Iterates(Regression):
    def training_step(self, dataloader_iter):
        return self.loss(next(dataloader_iter)[0])


def test_a_step_that_takes_the_iterator_is_refused():
    with pytest.raises(ValueError, match="takes dataloader_iter"):
        trainer(1, SimulatedStrategy(LocalSGD(2), 2)).fit(Iterates(), loader(range(2)))


class Fails(Regression):
    def training_step(self, batch, batch_idx):
        if batch_idx == 2:
            raise RuntimeError("no more")
        return super().training_step(batch, batch_idx)


def test_a_users_error_is_raised_as_it_is():
    with pytest.raises(RuntimeError, match="no more"):
        trainer(1, SimulatedStrategy(LocalSGD(2), 3), precision="64-true").fit(Fails(), loader(range(3)))


class Interrupted(Model):
    """Gets Ctrl-C in the fifth step of the second worker."""

    calls = 0

    def training_step(self, batch, batch_idx):
        self.calls += 1
        if self.calls == 14:
            raise KeyboardInterrupt
        return super().training_step(batch, batch_idx)


def test_after_an_interrupt_the_model_is_the_consensus():
    module = Interrupted("local_sgd")
    strategy = SimulatedStrategy(LocalSGD(4), 3)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer(1, strategy, precision="64-true").fit(module, loader(range(3)))
    assert not strategy.core.training
    own = [torch.cat([p.flatten() for p in replica.module.parameters()]) for replica in strategy._stage.replicas]
    assert all(torch.equal(own[0], other) for other in own)
    assert torch.equal(own[0], torch.cat([p.flatten() for p in module.parameters()]))


def test_what_does_not_fill_a_step_of_all_workers_is_dropped():
    odd = DataLoader(list(loader(range(2)))[:5], batch_size=None)
    fitted = trainer(1, SimulatedStrategy(LocalSGD(2), 2), precision="64-true", max_epochs=1)
    fitted.fit(Regression(), odd)
    assert fitted.global_step == 2


def test_an_engine_without_lightning():
    def train(workers):
        model = torch.nn.Linear(3, 1).double()
        with torch.no_grad():
            model.weight.fill_(1.0)
            model.bias.zero_()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine = Engine(SlowMo(sync_every=2), [optimizer], workers, module=model)
        for step in range(5):
            loss = (model(torch.full((2, 3), 0.1 * (workers.rank + step), dtype=torch.float64)) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            engine.after_step()
        engine.finish()
        return numbers(model)

    first, *others = together(Workers.simulated(4), train)
    assert all(distance(first, other) == 0 for other in others)


def test_memory_of_many_workers_is_what_their_state_takes():
    """All tensors of 64 workers: parameters, momentum, anchor and slow momentum, and a tenth more."""
    workers, hidden = 64, 4000
    module = Regression(hidden=hidden, momentum=0.9)
    numel = sum(parameter.numel() for parameter in module.parameters())
    fitted = trainer(1, SimulatedStrategy(SlowMo(sync_every=2), workers), max_steps=4)
    alive = tensors_alive()
    many = [[torch.randn(2, 5), torch.randn(2, 1)] for _ in range(4 * workers)]
    fitted.fit(module, DataLoader(many, batch_size=None))
    assert tensors_alive() - alive <= 1.1 * workers * 4 * 4 * numel


def tensors_alive():
    """Bytes of all storages."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and not thing.is_meta:  # not the compiler's fake ones
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class Compiled(Model):
    """Its network is compiled; what stands around it needs no gradient."""

    def __init__(self, backend):
        super().__init__("slowmo")
        self.compiled = torch.compile(self.net, backend=backend, fullgraph=True)

    def loss(self, batch):
        return torch.nn.functional.mse_loss(self.compiled(batch[0]), batch[1])


@pytest.mark.parametrize("static", [False, True], ids=["pointed to", "copied"])
def test_one_graph_serves_all_workers(static):
    """Nothing is compiled anew when workers change, with values that are pointed to, or copied as on a GPU."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def train(module):
        strategy = SimulatedStrategy(ALGORITHM, 3)
        strategy._static = static
        torch.manual_seed(1)
        trainer(1, strategy, precision="64-true", max_steps=6).fit(module, alike(range(3)))
        return numbers(module.net)

    torch.compiler.reset()
    expected = train(Model("slowmo"))
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert distance(train(Compiled(backend)), expected) < 1e-12
    assert len(graphs) == 1


def test_values_that_are_copied_train_as_those_that_are_pointed_to():
    trained = []
    for static in (False, True):
        strategy = SimulatedStrategy(ALGORITHM, 3)
        strategy._static = static
        torch.manual_seed(1)
        module = Model("slowmo", dropout=0.5)
        trainer(1, strategy, precision="64-true", max_steps=10, accumulate_grad_batches=2).fit(module, loader(range(3)))
        trained.append(numbers(module))
    assert distance(*trained) == 0
