"""MuLoCo: DiLoCo over Muon for matrices and AdamW for the rest, each in an optimizer of its own."""

import numpy as np
import pytest
import torch

from lightning_slowmo import PRESETS, DiLoCo, Engine
from lightning_slowmo.compression import Bins, Identity
from tests.on_workers import taking_turns

SHAPES = ((5, 4), (4,), (3, 6), (1,))
STEPS, EVERY = 13, 4


def optimizers(parameters):
    """As in the paper: Muon for what has two dimensions, AdamW for biases and norms."""
    matrices = [p for p in parameters if p.dim() == 2]
    rest = [p for p in parameters if p.dim() != 2]
    muon = torch.optim.Muon(matrices, lr=0.02, momentum=0.95, nesterov=False, weight_decay=0.01)
    return [muon, torch.optim.AdamW(rest, lr=0.02, betas=(0.9, 0.95), weight_decay=0.01)]


def start():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def set_gradients(parameters, worker, step):
    for index, parameter in enumerate(parameters):
        noise = np.random.default_rng((worker, step, index)).normal(size=tuple(parameter.shape))
        parameter.grad = parameter.detach() - torch.as_tensor(noise)


def listing(workers, eta, mu):
    """Each worker's own Muon and AdamW, and a Nesterov step in numpy along what the workers covered."""
    models = [[torch.nn.Parameter(value.clone()) for value in start()] for _ in range(workers)]
    inner = [optimizers(model) for model in models]
    shared = [value.numpy() for value in start()]
    b = [np.zeros_like(value) for value in shared]
    for step in range(STEPS):
        for worker, model in enumerate(models):
            set_gradients(model, worker, step)
            for optimizer in inner[worker]:
                optimizer.step()
        if (step + 1) % EVERY == 0:
            for p in range(len(SHAPES)):
                outer = shared[p] - sum(model[p].detach().numpy() for model in models) / workers
                b[p] = mu * b[p] + outer
                shared[p] = shared[p] - eta * (outer + mu * b[p])
                for model in models:
                    model[p].data.copy_(torch.as_tensor(shared[p]))
    return [np.concatenate([p.detach().numpy().ravel() for p in model]) for model in models]


def trained(workers, algorithm):
    model = [torch.nn.Parameter(value) for value in start()]
    inner = optimizers(model)
    engine = Engine(algorithm, inner, workers)
    for step in range(STEPS):
        set_gradients(model, workers.rank, step)
        for index, optimizer in enumerate(inner):
            optimizer.step()
            engine.after_step(index)
    return np.concatenate([p.detach().numpy().ravel() for p in model])


@taking_turns(1, 2, 3)
def test_muloco_is_diloco_over_muon_and_adamw(workers):
    preset = PRESETS["muloco"]
    assert isinstance(preset, DiLoCo)
    algorithm = DiLoCo(EVERY, preset.outer_lr, preset.outer_momentum)
    expected = listing(workers.size, preset.outer_lr, preset.outer_momentum)[workers.rank]
    np.testing.assert_allclose(trained(workers, algorithm), expected, rtol=0, atol=1e-10)
    exact = DiLoCo(EVERY, preset.outer_lr, preset.outer_momentum, compressor=Identity())
    np.testing.assert_allclose(trained(workers, exact), expected, rtol=0, atol=1e-10)
    assert np.abs(trained(workers, DiLoCo(EVERY, 1.0, 0.0)) - expected).max() > 1e-3


@taking_turns(2)
def test_two_bits_with_error_feedback_stay_near(workers):
    preset = PRESETS["muloco"]
    compressed = trained(workers, DiLoCo(EVERY, preset.outer_lr, preset.outer_momentum, compressor=Bins(2)))
    exact = listing(2, preset.outer_lr, preset.outer_momentum)[workers.rank]
    untrained = np.concatenate([value.numpy().ravel() for value in start()])
    error = np.linalg.norm(compressed - exact) / np.linalg.norm(exact - untrained)
    assert 1e-6 < error < 0.5


def test_muon_takes_matrices_alone():
    with pytest.raises(ValueError, match="2D"):
        torch.optim.Muon([torch.nn.Parameter(torch.ones(3))])
