"""Compressed algorithms in a Trainer: they train, agree, and resume bit for bit."""

import lightning as L
import pytest

from lightning_slowmo import QPRSGD, APMSqueeze, SensedSGD, SketchedSGD, SlowMo, SlowMoStrategy, SQuARM, Threshold
from lightning_slowmo.compression import QSGD, Sign, TopK
from tests.harness import run_trainers
from tests.trainer.models import Regression, all_finite, data, numbers, trainer

ALGORITHMS = {
    "qprsgd": QPRSGD(3, QSGD(3, norm="max", bucket=64)),
    "qprsgd_gossip": QPRSGD(3, QSGD(3, norm="max", bucket=64), "gossip"),
    "slowmo": SlowMo(sync_every=3, compressor=TopK(0.2)),
    "squarm": SQuARM("ring", 2, Sign(), 0.3, Threshold(0.5)),
    "apmsqueeze": APMSqueeze(5),
    "sketched": SketchedSGD(k=3, columns=4, dense_below=5),
    "sensed": SensedSGD(0.5, 0.1, dense_below=5),
}
OPTIMIZERS = {"apmsqueeze": {"adam": True}, "sketched": {"momentum": 0.0}, "sensed": {"momentum": 0.0}}


def interrupted_and_not(rank, size, folder):
    """Four epochs at once, and two and two; the checkpoint lies in the middle of a period."""
    models = {}
    for name, algorithm in ALGORITHMS.items():
        path = f"{folder}/{name}.ckpt"
        optimizer = {"momentum": 0.9} | OPTIMIZERS.get(name, {})
        whole, first, second = (Regression(lr=0.02, **optimizer) for _ in range(3))
        trainer(size, SlowMoStrategy(algorithm), max_epochs=4).fit(whole, data(rank))
        half = trainer(size, SlowMoStrategy(algorithm), max_epochs=4, max_steps=16, callbacks=[SaveAt(path)])
        half.fit(first, data(rank))
        trainer(size, SlowMoStrategy(algorithm), max_epochs=4).fit(second, data(rank), ckpt_path=path)
        models[name] = numbers(whole), numbers(second)
    return models


class SaveAt(L.Callback):
    """Saves at the end of the second epoch."""

    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, module):
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(self.path)


@pytest.mark.processes
def test_every_compressed_algorithm_trains_agrees_and_resumes_bit_for_bit(tmp_path):
    first, second = run_trainers(2, interrupted_and_not, 2, str(tmp_path))
    assert first == second
    for name, (whole, resumed) in first.items():
        assert all_finite(whole), name
        assert whole == resumed, name
