"""The same strategy under the ``pytorch_lightning`` package."""

import pytest

from tests.harness import run_trainers

pl = pytest.importorskip("pytorch_lightning")


def train(rank):
    import logging

    import torch

    import lightning_slowmo.pl
    from lightning_slowmo import SlowMo
    from tests.trainer.models import Regression, data, numbers, trainer

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Regression().net

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05)

    models = []
    for strategy in ("slowmo", lightning_slowmo.pl.SlowMoStrategy(SlowMo())):
        module = Module()
        fitting = pl.Trainer(
            accelerator="cpu",
            devices=2,
            strategy=strategy,
            max_epochs=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        fitting.fit(module, data(rank))
        assert type(fitting.strategy) is lightning_slowmo.pl.SlowMoStrategy
        models.append((numbers(module), fitting.strategy.report.count))
    twin = Regression()
    fitting = trainer(2, "slowmo")
    fitting.fit(twin, data(rank))
    return [*models, (numbers(twin), fitting.strategy.report.count)]


@pytest.mark.processes
def test_pytorch_lightning_trains_the_same_model_by_name_and_by_instance():
    first, second = run_trainers(2, train)
    assert first == second
    by_name, by_instance, lightning = first
    assert by_name == by_instance == lightning
    assert by_name[1] == 1  # 16 steps, a sync after 12
