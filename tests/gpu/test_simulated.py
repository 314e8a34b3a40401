"""Simulated workers on a GPU, whose values are copied to one place, against the CPU, where they are pointed to."""

from functools import partial
from itertools import islice

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_slowmo import SimulatedStrategy, SlowMo
from recipes.images import ImageClassifier
from recipes.images.captured import CapturedObjective
from recipes.images.data import InMemoryImages
from recipes.images.networks import small_cnn
from recipes.schedules import constant
from tests.test_contract import configured
from tests.trainer.models import Regression, distance, trainer
from tests.trainer.test_simulated import CASES, fit, loader
from tests.trainer.test_simulated_host import OnHost, ends, ends_with_adam

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


@pytest.mark.parametrize("case", NAMES)
def test_workers_whose_values_lie_on_the_host_train_as_the_cpu_does(case):
    host, cpu = ends(case, ("gpu", "cpu"))
    assert distance(host[0], cpu[0]) < TOLERANCE
    assert host[1] == pytest.approx(cpu[1], abs=100 * TOLERANCE)
    assert host[2] == cpu[2]


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"capturable": True}], ids=str)
def test_adam_counts_its_steps_where_torch_wants_it_if_states_lie_on_the_host(options):
    [host], [_, cpu] = islice(ends_with_adam(options, ("gpu", "cpu")), 1), ends_with_adam({})
    assert distance(host, cpu) < TOLERANCE


def test_a_card_holds_few_copies_of_a_model_whose_workers_lie_on_the_host():
    module = Regression(hidden=200_000, momentum=0.9)
    size = sum(parameter.nbytes for parameter in module.parameters())
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fitted = trainer(1, OnHost(SlowMo(sync_every=2), 32), accelerator="gpu", max_steps=2)
    fitted.fit(module, DataLoader([[torch.randn(2, 5), torch.randn(2, 1)] for _ in range(64)], batch_size=None))
    assert torch.cuda.max_memory_allocated() - before < 12 * size  # 128 with all of them


def test_every_worker_has_a_loss_scale_of_its_own():
    _, module, _ = CASES["slowmo"]()
    strategy = SimulatedStrategy(configured("slowmo"), WORKERS)
    fitted = trainer(1, strategy, accelerator="gpu", precision="16-mixed", max_steps=12)
    fitted.fit(module, loader(range(WORKERS)))
    assert fitted.global_step == 12
    assert all(parameter.isfinite().all() for parameter in module.parameters())


class Pictures(InMemoryImages):
    """Noise, of two sizes of batches in training and evaluation."""

    def read(self):
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (240, 3, 8, 8), dtype=torch.uint8, generator=generator)
        labels = torch.randint(10, (240,), generator=generator)
        return {"train_images": images, "train_labels": labels, "test_images": images[:50], "test_labels": labels[:50]}

    def on_after_batch_transfer(self, batch, dataloader_idx):
        images, labels = super().on_after_batch_transfer(batch, dataloader_idx)
        return images.double(), labels


def classify(accelerator, capture, strategy="auto", **options):
    """A fit of a small network in float64, with validation in the middle."""
    torch.manual_seed(0)
    sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    module = ImageClassifier(small_cnn(width=4), sgd, constant, channels_last=True, capture=capture)
    options = {"precision": "64-true", "max_epochs": 2, "log_every_n_steps": 1} | options
    fitted = trainer(1, strategy, accelerator=accelerator, **options)
    fitted.fit(module, datamodule=Pictures(10, crop=1, flip=True))
    return module, float(fitted.callback_metrics["val/loss"])


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_captured_step_trains_as_one_on_the_cpu_does(workers, options):
    strategies = [SimulatedStrategy(SlowMo(sync_every=3), workers) if workers > 1 else "auto" for _ in range(2)]
    plain = classify("cpu", False, strategies[0], **options)
    captured = classify("gpu", True, strategies[1], **options)
    assert distance(plain[0].parameters(), captured[0].parameters()) < TOLERANCE
    assert plain[1] == pytest.approx(captured[1], abs=100 * TOLERANCE)


def test_a_captured_step_refuses_float16():
    network = small_cnn(width=4).cuda()
    objective = CapturedObjective(lambda images, labels: nn.functional.cross_entropy(network(images), labels), network)
    batch = torch.randn(4, 3, 8, 8, device="cuda"), torch.zeros(4, dtype=torch.long, device="cuda")
    with pytest.raises(ValueError, match="does not scale losses"), torch.autocast("cuda", torch.float16):
        objective(*batch)
