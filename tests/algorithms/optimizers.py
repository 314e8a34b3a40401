"""Every optimizer of the installed torch, and small ones like those of other packages: what the tests here try."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

Factory = Callable[..., Optimizer]

MATRICES_ONLY = {"Muon", "SparseAdam"}
OPTIONS = {"SGD": {"momentum": 0.9}, "RMSprop": {"momentum": 0.5, "centered": True}, "Adam": {"amsgrad": True}}
"""What gives an optimizer all the state that it can have."""
RATES = {"SGD": 0.02, "LBFGS": 0.2, "Adadelta": 1.0}


def parameters(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Parameter]:
    """A matrix, and for optimizers that take them also a vector and a scalar."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(4, 3)] if name.split()[0] in MATRICES_ONLY else [(4, 3), (5,), ()]
    return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def take_step(optimizer: Optimizer, own: list[Parameter], targets: list[Tensor]) -> None:
    """A step towards the targets, down a parabola in each element; through a closure, which any optimizer may call."""
    sparse = type(optimizer) is torch.optim.SparseAdam

    def closure() -> Tensor:
        for parameter, target in zip(own, targets, strict=True):
            gradient = parameter.detach() - target
            parameter.grad = gradient.to_sparse(1) if sparse else gradient
        return sum((p.detach() - t).square().sum() / 2 for p, t in zip(own, targets, strict=True))

    closure()
    optimizer.step(closure)


def runs(name: str, factory: Factory) -> bool:
    """Whether this variant exists and runs on a CPU."""
    own = parameters(name)
    try:
        take_step(factory(own), own, [torch.zeros_like(p) for p in own])
    except (AssertionError, RuntimeError, ValueError):
        return False
    return True


def every_optimizer() -> dict[str, Factory]:
    """All of torch's optimizers, with the variants that run on CPUs: a tensor as rate, foreach, fused, capturable."""
    found: dict[str, Factory] = {}
    for name, kind in sorted(vars(torch.optim).items()):
        if not (inspect.isclass(kind) and issubclass(kind, Optimizer)) or kind is Optimizer:
            continue
        options = {"lr": RATES.get(name, 0.01)} | OPTIONS.get(name, {})
        found[name] = partial(kind, **options)
        accepted = inspect.signature(kind).parameters
        for variant in ("foreach", "fused", "capturable"):
            if variant in accepted and runs(name, factory := partial(kind, **options, **{variant: True})):
                found[f"{name} {variant}"] = factory
        options["lr"] = torch.tensor(options["lr"])
        if name != "LBFGS" and runs(name, factory := partial(kind, **options)):
            found[f"{name} tensor lr"] = factory
    return found


# What other packages have ---------------------------------------------------------------------------------------------


class Small(Optimizer):
    """Calls the closure, as all do, and leaves the rest to ``update``."""

    def step(self, closure=None):
        loss = None if closure is None else closure()
        self.update()
        return loss


class Lion(Small):
    """Steps along signs; Chen et al., arXiv:2302.06675."""

    def __init__(self, params, lr=0.01, betas=(0.9, 0.99)):
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def update(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                p.sub_(state["exp_avg"].lerp(p.grad, 1 - beta1).sign(), alpha=group["lr"])
                state["exp_avg"].lerp_(p.grad, 1 - beta2)


class ScheduleFreeSGD(Small):
    """Defazio et al., arXiv:2405.15682: the parameters are y, x = y + (1 - 1 / beta) (z - y) is what is evaluated."""

    def __init__(self, params, lr=0.05, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta, "k": 0})

    @torch.no_grad()
    def update(self):
        for group in self.param_groups:
            lr, beta, c = group["lr"], group["beta"], 1 / (group["k"] + 1)
            for y in group["params"]:
                if y.grad is None:
                    continue
                state = self.state[y]
                if not state:
                    state["z"] = y.detach().clone()
                z = state["z"]
                y.lerp_(z, c).add_(y.grad, alpha=lr * (beta * (1 - c) - 1))
                z.sub_(y.grad, alpha=lr)
            group["k"] += 1


class ScheduleFreeAdamW(Small):
    """The same over Adam's second moment."""

    def __init__(self, params, lr=0.01, betas=(0.9, 0.999)):
        super().__init__(params, {"lr": lr, "betas": betas, "k": 0})

    @torch.no_grad()
    def update(self):
        for group in self.param_groups:
            lr, (beta1, beta2), c = group["lr"], group["betas"], 1 / (group["k"] + 1)
            for y in group["params"]:
                state = self.state[y]
                if not state:
                    state["z"], state["exp_avg_sq"] = y.detach().clone(), torch.zeros_like(y)
                z, square = state["z"], state["exp_avg_sq"]
                square.mul_(beta2).addcmul_(y.grad, y.grad, value=1 - beta2)
                direction = y.grad / (square / (1 - beta2 ** (group["k"] + 1))).sqrt().add_(1e-8)
                y.lerp_(z, c).add_(direction, alpha=lr * (beta1 * (1 - c) - 1))
                z.sub_(direction, alpha=lr)
            group["k"] += 1


class Lookahead(Small):
    """Zhang et al., arXiv:1907.08610, around SGD with momentum; the slow weights are made by the constructor."""

    def __init__(self, params, lr=0.02, every=2):
        self.fast = torch.optim.SGD(params, lr=lr, momentum=0.9)
        self.every, self.steps = every, 0
        super().__init__(self.fast.param_groups, {})
        self.fast.param_groups = self.param_groups
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["slow"] = p.detach().clone()

    @torch.no_grad()
    def update(self):
        self.fast.step()
        self.steps += 1
        if self.steps % self.every == 0:
            for group in self.param_groups:
                for p in group["params"]:
                    p.copy_(self.state[p]["slow"].lerp_(p, 0.5))


class MasterWeights(Small):
    """SGD on float32 copies of parameters of low precision."""

    def __init__(self, params, lr=0.05):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def update(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["master"] = p.detach().float()
                p.copy_(state["master"].sub_(p.grad.float(), alpha=group["lr"]))


class SAM(Optimizer):
    """Foret et al., arXiv:2010.01412, as it is widely used: two half steps around a base optimizer."""

    def __init__(self, params, lr=0.02, rho=0.05):
        super().__init__(params, {"rho": rho, "lr": lr})
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr=lr, momentum=0.9)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old_p"] = p.detach().clone()
                p.add_(p.grad / (p.grad.norm() + 1e-12), alpha=group["rho"])
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p]["old_p"]
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure=None):
        self.first_step(zero_grad=True)
        torch.enable_grad()(closure)()
        self.second_step()


class MuonBesideAdam(Small):
    """One optimizer: orthogonalized momentum in groups that ask for it, Adam in the others."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr, "matrices": False})

    @torch.no_grad()
    def update(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if group["matrices"]:
                    buffer = state.setdefault("momentum_buffer", torch.zeros_like(p)).mul_(0.95).add_(p.grad)
                    u, _, v = torch.linalg.svd(buffer, full_matrices=False)
                    p.sub_(u @ v, alpha=group["lr"])
                else:
                    state["step"] = state.get("step", 0) + 1
                    mean = state.setdefault("exp_avg", torch.zeros_like(p)).lerp_(p.grad, 0.1)
                    square = state.setdefault("exp_avg_sq", torch.zeros_like(p)).lerp_(p.grad.square(), 0.01)
                    mean, square = mean / (1 - 0.9 ** state["step"]), square / (1 - 0.99 ** state["step"])
                    p.sub_(mean / square.sqrt().add(1e-8), alpha=group["lr"])


class Shampoo(Small):
    """Preconditioned by statistics of each dimension, kept in a list; Gupta et al., arXiv:1802.09568."""

    def __init__(self, params, lr=0.05):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def update(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["statistics"] = [torch.eye(extent) * 1e-4 for extent in p.shape]
                update = p.grad
                for axis, statistic in enumerate(state["statistics"]):
                    rows = p.grad.movedim(axis, 0).reshape(p.shape[axis], -1)
                    statistic.add_(rows @ rows.T)
                    values, vectors = torch.linalg.eigh(statistic)
                    root = vectors @ torch.diag(values.clamp_min(1e-8) ** (-0.5 / p.ndim)) @ vectors.T
                    update = torch.tensordot(root, update.movedim(axis, 0), 1).movedim(0, axis)
                p.sub_(update, alpha=group["lr"])


class EightBitMomentum(Small):
    """SGD with momentum in codes of 8 bits and one scale."""

    def __init__(self, params, lr=0.02):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def update(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["codes"], state["scale"] = torch.full_like(p, 128, dtype=torch.uint8), torch.zeros(())
                momentum = (state["codes"].float() - 128) / 127 * state["scale"] * 0.9 + p.grad
                state["scale"].copy_(momentum.abs().max())
                state["codes"].copy_((momentum / state["scale"].clamp_min(1e-12) * 127 + 128).round())
                p.sub_(momentum, alpha=group["lr"])


class RelativeStep(torch.optim.Adagrad):
    """An optimizer that sets its own step length: its groups say ``lr=None``, as the original Adafactor's do."""

    def __init__(self, params):
        super().__init__(params, lr=0.05)
        for group in self.param_groups:
            group["lr"] = None

    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"] = 0.05
        loss = super().step(closure)
        for group in self.param_groups:
            group["lr"] = None
        return loss


TORCHS = every_optimizer()
OTHERS: dict[str, Factory] = {
    kind.__name__: kind
    for kind in (
        Lion,
        ScheduleFreeSGD,
        ScheduleFreeAdamW,
        Lookahead,
        MasterWeights,
        SAM,
        MuonBesideAdam,
        Shampoo,
        EightBitMomentum,
        RelativeStep,
    )
}
ALL = TORCHS | OTHERS
