"""An outer loop of one's own in sixty lines, and a main program that tries it with two workers.

    python examples/own_algorithm.py

Quasi-hyperbolic momentum (Ma and Yarats, 2019, https://arxiv.org/abs/1810.06801) along the outer gradient
delta = x - mean_i x_i of ``sync_every`` local steps, instead of SlowMo's or DiLoCo's momentum::

    g = beta g + (1 - beta) delta;    x = x - lr ((1 - nu) delta + nu g)

The rule is a function of tensors. Meetings, uneven inputs, checkpoints, two levels, GPU kernels and the plan are those
of every other outer loop. At nu = 0 and lr = 1 it is Local SGD: the main program tries it.
"""

import logging
import warnings
from dataclasses import dataclass

import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_slowmo import Algorithm, LocalSGD, SlowMoStrategy, traffic
from lightning_slowmo.algorithms.local_sgd import local_steps
from lightning_slowmo.algorithms.outer_loop import RunningOuterLoop
from lightning_slowmo.arithmetic import add, multiply, subtract


@dataclass(frozen=True)
class QuasiHyperbolic(Algorithm):
    """Its settings, of which the docstring of this file says what they do."""

    is_outer_loop = True

    sync_every: int = 12
    lr: float = 1.0
    beta: float = 0.5
    nu: float = 0.7

    def bind(self, optimizer, workers):
        return RunningQuasiHyperbolic(self, optimizer, workers)

    def syncs(self, layout, workers):  # what it sends, for the plan
        head, mean = traffic.header(workers), self.average_sync(layout, workers)
        return traffic.averages(self.sync_every, head, mean)

    def state_numel(self, layout, workers):  # what it keeps: anchor and momentum
        return 2 * layout.numel


def step(anchor, start, total, momentum, *, share, lr, beta, nu):
    """The new x and g of a block of parameters; ``share * total`` is the mean over the workers."""
    delta = subtract(start, total, share, out=total)
    momentum = add(multiply(momentum, beta, out=momentum), delta, 1 - beta, out=momentum)
    anchor = subtract(anchor, delta, lr * (1 - nu), out=anchor)
    return subtract(anchor, momentum, lr * nu, out=anchor), momentum


class RunningQuasiHyperbolic(RunningOuterLoop):
    rule = staticmethod(step)

    def __init__(self, config, optimizer, workers):
        base = local_steps(optimizer, workers, config.sync_every)
        super().__init__(base, config.sync_every, "maintain", optimizer, workers)
        self.config = config

    def scalars(self, round):  # for each parameter group
        numbers = {"lr": self.config.lr, "beta": self.config.beta, "nu": self.config.nu}
        return [numbers] * len(self.optimizer.param_groups)


class Regression(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(32, 1)

    def training_step(self, batch, _):
        return (self.layer(batch[0]) - batch[0].sum(1, keepdim=True)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def train(algorithm):
    """The weights after three epochs of 32 steps."""
    L.seed_everything(1, workers=True, verbose=False)
    model = Regression()
    inputs = torch.randn(512, 32, generator=torch.Generator().manual_seed(2))
    trainer = L.Trainer(
        strategy=SlowMoStrategy(algorithm), accelerator="cpu", devices=2, max_epochs=3, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader(TensorDataset(inputs), 8))
    return trainer, model.layer.weight.detach().clone()


if __name__ == "__main__":
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore", module=r"lightning\.|torch\.")
    trainer, weight = train(QuasiHyperbolic())
    local, plain = train(LocalSGD())[1], train(QuasiHyperbolic(lr=1.0, nu=0.0))[1]
    if trainer.is_global_zero:
        print(f"{trainer.strategy.report.count} syncs; momentum moved the weights by {(weight - local).norm():.4f}")
        print(f"at nu = 0 and lr = 1 it is Local SGD: {torch.allclose(plain, local, rtol=1e-6, atol=1e-7)}")
