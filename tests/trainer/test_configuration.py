"""The strategy from LightningCLI, by flags and YAML, and from Hydra."""

import hydra
import pytest
from lightning.pytorch.cli import LightningCLI
from omegaconf import OmegaConf

from lightning_slowmo import (
    QSDP,
    DiLoCo,
    LocalSGD,
    SlowMo,
    SlowMoModelParallelStrategy,
    SlowMoStrategy,
    SparseLoCo,
    SQuARM,
)
from lightning_slowmo.compression import SignTopK
from tests.trainer.models import Regression, data

NESTED = """
trainer:
  accelerator: cpu
  devices: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  max_steps: 7
  strategy:
    class_path: lightning_slowmo.SlowMoStrategy
    init_args:
      algorithm:
        class_path: lightning_slowmo.SlowMo
        init_args:
          base:
            class_path: lightning_slowmo.LocalSGD
            init_args: {sync_every: 2}
          sync_every: 6
          slow_momentum: 0.7
      sync_timeout: 0:10:00
      on_nonfinite: skip
"""


def cli(*arguments):
    quiet = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.logger=false"]
    return LightningCLI(Regression, args=[*quiet, *arguments], run=False, save_config_callback=None)


@pytest.mark.parametrize(
    ("arguments", "algorithm"),
    [
        (["--trainer.strategy=slowmo"], SlowMo()),
        (["--trainer.strategy=diloco_spawn"], DiLoCo()),
        (["--trainer.strategy.class_path=lightning_slowmo.SlowMoStrategy"], SlowMo()),
        (["--trainer.strategy=lightning_slowmo.SlowMoStrategy", "--trainer.strategy.algorithm=diloco"], DiLoCo()),
        (["--trainer.strategy=lightning_slowmo.SlowMoStrategy", "--trainer.strategy.algorithm=SQuARM"], SQuARM()),
        (
            ["--trainer.strategy=lightning_slowmo.SlowMoStrategy", "--trainer.strategy.algorithm=SparseLoCo"],
            SparseLoCo(),
        ),
        (
            [
                "--trainer.strategy=lightning_slowmo.SlowMoStrategy",
                "--trainer.strategy.algorithm=lightning_slowmo.SQuARM",
                "--trainer.strategy.algorithm.compressor=lightning_slowmo.compression.SignTopK",
                "--trainer.strategy.algorithm.compressor.fraction=0.1",
            ],
            SQuARM(compressor=SignTopK(0.1)),
        ),
        (
            [
                "--trainer.strategy=lightning_slowmo.SlowMoStrategy",
                "--trainer.strategy.algorithm=lightning_slowmo.SlowMo",
                "--trainer.strategy.algorithm.sync_every=3",
                "--trainer.strategy.algorithm.base=lightning_slowmo.LocalSGD",
                "--trainer.strategy.algorithm.base.sync_every=1",
            ],
            SlowMo(LocalSGD(1), sync_every=3),
        ),
    ],
)
def test_flags_of_lightning_cli_give_the_strategy(arguments, algorithm):
    strategy = cli(*arguments).trainer.strategy
    assert type(strategy) is SlowMoStrategy
    assert strategy.algorithm == algorithm


SHARDED = """
trainer:
  strategy:
    class_path: lightning_slowmo.SlowMoModelParallelStrategy
    init_args:
      algorithm: diloco
      workers: 2
      bucket_cap_mb: 25
      qsdp: {weight_bits: 8, gradient_bits: null}
"""


def test_flags_yaml_and_hydra_give_a_sharded_strategy_its_qsdp(tmp_path):
    name, file = "lightning_slowmo.SlowMoModelParallelStrategy", tmp_path / "config.yaml"
    file.write_text(SHARDED)
    flags = [f"--trainer.strategy={name}", "--trainer.strategy.qsdp.gradient_bits=4"]
    nested = {"_target_": "lightning_slowmo.QSDP", "weight_bits": 4}
    made = {
        QSDP(8, None): cli(f"--config={file}").trainer.strategy,
        QSDP(8, 4): cli(*flags).trainer.strategy,
        QSDP(4, 8): hydra.utils.instantiate(OmegaConf.create({"_target_": name, "qsdp": nested})),
    }
    for qsdp, strategy in made.items():
        assert type(strategy) is SlowMoModelParallelStrategy
        assert strategy.core.qsdp == qsdp
    assert made[QSDP(8, None)].bucket_cap_mb == 25


def test_yaml_of_lightning_cli_gives_the_nested_algorithm_and_trains(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(NESTED)
    made = LightningCLI(Regression, args=[f"--config={file}"], run=False, save_config_callback=None)
    strategy = made.trainer.strategy
    assert strategy.algorithm == SlowMo(LocalSGD(2), sync_every=6, slow_momentum=0.7)
    assert (strategy.sync_timeout.total_seconds(), strategy.on_nonfinite) == (600, "skip")
    made.trainer.fit(made.model, data(0))
    assert made.trainer.global_step == 7
    assert strategy.report.count == 3  # after 2, 4 and 6 steps


def test_hydra_instantiates_the_strategy_with_its_nested_algorithm():
    config = OmegaConf.create(
        {
            "_target_": "lightning_slowmo.SlowMoStrategy",
            "algorithm": {
                "_target_": "lightning_slowmo.SlowMo",
                "sync_every": 8,
                "base": {"_target_": "lightning_slowmo.LocalSGD", "sync_every": 4},
            },
            "sync_timeout": {"_target_": "datetime.timedelta", "minutes": 2},
        }
    )
    strategy = hydra.utils.instantiate(config)
    assert type(strategy) is SlowMoStrategy
    assert strategy.algorithm == SlowMo(LocalSGD(4), sync_every=8)
    assert strategy.sync_timeout.total_seconds() == 120
    assert hydra.utils.instantiate({"_target_": "lightning_slowmo.SlowMoStrategy"}).algorithm == SlowMo()
