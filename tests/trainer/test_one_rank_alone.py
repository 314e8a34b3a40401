"""Exports in the middle of training: ``strategy.consensus()`` on all ranks, and a clear error for one rank alone."""

import time
from datetime import timedelta

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_slowmo import AllReduce, Gossip, LocalSGD, SlowMo, SlowMoStrategy, SyncError
from tests.harness import run_trainers
from tests.trainer.models import Regression, data, distance, numbers, trainer

SOON = 8
"""Seconds within which every rank must have its error; the strategy's own timeout is far away."""


class Export(Callback):
    """Keeps each rank's own model and, from the context, the consensus; rank 0 writes a file."""

    def __init__(self, folder):
        self.folder, self.own, self.held, self.after = folder, [], [], []

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step % 5 == 3:
            self.export(trainer, module)

    def on_train_epoch_end(self, trainer, module):
        self.export(trainer, module)

    def on_train_end(self, trainer, module):
        self.export(trainer, module)

    def on_validation_epoch_end(self, trainer, module):
        before = numbers(module)
        with trainer.strategy.consensus():  # it is held already
            assert numbers(module) == before
        assert numbers(module) == before

    def export(self, trainer, module):
        self.own.append(numbers(module))
        with trainer.strategy.consensus():
            self.held.append(numbers(module))
            if trainer.is_global_zero:
                torch.save(module.state_dict(), f"{self.folder}/{len(self.held)}.pt")
        self.after.append(numbers(module))


def export(rank, folder):
    results = []
    for callbacks in ([Export(folder)], []):
        module = Regression(batch_norm=True)
        fitting = trainer(2, SlowMoStrategy(SlowMo(sync_every=4)), callbacks=callbacks)
        with fitting.strategy.consensus():  # before fit there is nobody to meet
            pass
        fitting.fit(module, data(rank), data(9))
        with fitting.strategy.consensus():
            final = numbers(module)
        results += [final, *((c.own, c.held, c.after) for c in callbacks)]
    return results


@pytest.mark.processes
def test_the_consensus_can_be_exported_from_any_hook_and_training_does_not_notice(tmp_path):
    first, second = run_trainers(2, export, str(tmp_path))
    assert first[0] == second[0] == first[2] == second[2]
    assert len(first[1][0]) == 3 + 2 + 1
    (owns, helds, _), (others, helds_there, _) = first[1], second[1]
    assert helds == helds_there
    for index, (own, other, held) in enumerate(zip(owns, others, helds, strict=True)):
        mean = [[(a + b) / 2 for a, b in zip(x, y, strict=True)] for x, y in zip(own, other, strict=True)]
        assert distance(held, mean) < 1e-6
        state = torch.load(tmp_path / f"{index + 1}.pt", weights_only=True)
        assert [value.double().flatten().tolist() for value in state.values()] == held
    assert any(distance(own, other) > 1e-3 for own, other in zip(owns, others, strict=True))
    assert (first[1][0], second[1][0]) == (first[1][2], second[1][2])


class Alone(Callback):
    """Does something on rank 0 alone, in one hook."""

    def __init__(self, hook, act, rank=0):
        self.act, self.rank = act, rank
        setattr(self, hook, self.now)

    def now(self, trainer, module, *_):
        if trainer.global_rank == self.rank and trainer.global_step >= 2 and not trainer.sanity_checking:
            self.act(trainer, module)


def save(trainer, module):
    trainer.save_checkpoint("never.ckpt")


def save_weights(trainer, module):
    trainer.save_checkpoint("never.ckpt", weights_only=True)


def enter(trainer, module):
    with trainer.strategy.consensus():
        pytest.fail("the others did not come")


def save_inside(trainer, module):
    """On all ranks, but what is inside is not."""
    with trainer.strategy.consensus():
        if trainer.is_global_zero:
            trainer.save_checkpoint("never.ckpt")


CASES = {
    "save in the middle of an epoch": ("on_train_batch_end", save, SlowMo(sync_every=3)),
    "save at the end of an epoch": ("on_train_epoch_end", save, SlowMo(sync_every=3)),
    "save at the end": ("on_train_end", save, SlowMo(sync_every=3)),
    "save in validation": ("on_validation_epoch_end", save, SlowMo(sync_every=3)),
    "save weights in validation": ("on_validation_epoch_end", save_weights, LocalSGD(3)),
    "save after validation": ("on_validation_end", save, LocalSGD(3)),
    "enter in the middle of an epoch": ("on_train_batch_end", enter, Gossip("ring")),
    "enter at the end of an epoch": ("on_train_epoch_end", enter, AllReduce()),
    "enter at the start of an epoch": ("on_train_epoch_start", enter, SlowMo(sync_every=3)),
    "save on one rank inside": ("on_train_batch_end", save_inside, SlowMo(sync_every=3)),
}


def alone(rank, size, name):
    hook, act, algorithm = CASES[name]
    # Epochs are too long to be waited for: in the middle of one, it is the next sync that tells.
    endless = hook == "on_train_batch_end"
    strategy = SlowMoStrategy(algorithm, sync_timeout=timedelta(minutes=5))
    callback = Alone(hook, act, rank if act is save_inside else 0)
    fitting = trainer(size, strategy, callbacks=callback, max_epochs=2)
    module = Slow() if endless else Regression()
    start = time.monotonic()
    with pytest.raises(SyncError) as raised:
        fitting.fit(module, data(rank, examples=4000 if endless else 32), data(9))
    return str(raised.value), time.monotonic() - start


class Slow(Regression):
    def training_step(self, batch, batch_idx):
        time.sleep(0.05)
        return super().training_step(batch, batch_idx)


def each_alone(rank, size):
    return {name: alone(rank, size, name) for name in CASES}


@pytest.mark.processes
@pytest.mark.parametrize("size", [3])
def test_one_rank_alone_gives_all_ranks_an_error_that_says_what_to_do(tmp_path, monkeypatch, size):
    monkeypatch.chdir(tmp_path)
    results = run_trainers(size, each_alone, size, limit=180)
    for name in CASES:
        for rank, result in enumerate(results):
            text, after = result[name]
            assert "enter strategy.consensus() on all ranks" in text, (name, rank, text)
            assert after < SOON, (name, rank, after)


class SaveEveryFive(Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step % 5 == 0:
            trainer.save_checkpoint(f"{self.folder}/{trainer.global_step}.ckpt")


def save_at_other_times(rank, folder):
    """Of 9 and 8 batches: the tenth step is rank 0's first in the second epoch, and rank 1's second."""
    strategy = SlowMoStrategy(SlowMo(sync_every=1))
    fitting = trainer(2, strategy, callbacks=SaveEveryFive(folder))
    module = Regression()
    fitting.fit(module, data(rank, examples=(36, 32)[rank]))
    return fitting.global_step, numbers(module)


@pytest.mark.processes
def test_workers_that_save_after_other_batches_because_their_inputs_differ_are_no_mistake(tmp_path):
    first, second = run_trainers(2, save_at_other_times, str(tmp_path))
    assert (first[0], second[0]) == (18, 16)
    assert first[1] == second[1]
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["10.ckpt", "15.ckpt", "5.ckpt"]
