"""Simulated workers on a GPU, whose values are copied to one place, against the CPU, where they are pointed to."""

import pytest
import torch

from lightning_slowmo import SimulatedStrategy
from tests.test_contract import configured
from tests.trainer.models import distance, trainer
from tests.trainer.test_simulated import CASES, fit, loader

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu

WORKERS = 3
TOLERANCE = 1e-9
NAMES = ("slowmo", "slowmo_sgp", "allreduce", "dpsgd", "bmuf", "accumulation", "manual", "validation in between")


@pytest.mark.parametrize("case", NAMES)
def test_a_gpu_trains_as_the_cpu_does(case):
    runs = [
        fit(case, lambda algorithm: SimulatedStrategy(algorithm, WORKERS), 1, range(WORKERS), accelerator=accelerator)
        for accelerator in ("cpu", "gpu")
    ]
    assert distance(runs[0][0], runs[1][0]) < TOLERANCE
    assert runs[0][1] == pytest.approx(runs[1][1], abs=100 * TOLERANCE)
    assert runs[0][2] == runs[1][2]


def test_every_worker_has_a_loss_scale_of_its_own():
    _, module, _ = CASES["slowmo"]()
    strategy = SimulatedStrategy(configured("slowmo"), WORKERS)
    fitted = trainer(1, strategy, accelerator="gpu", precision="16-mixed", max_steps=12)
    fitted.fit(module, loader(range(WORKERS)))
    assert fitted.global_step == 12
    assert all(parameter.isfinite().all() for parameter in module.parameters())
