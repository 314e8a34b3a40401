"""A small network, whole or sharded, and its training on one worker: the same code for both."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_slowmo.trainer.clipping import clip_by_norm

WORDS, WIDTH = 7, 5


class Network(nn.Module):
    """Uneven shards (7, 5 and 3 rows), empty ones (1 row), tied weights, a frozen parameter and a moving teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.up = nn.Linear(WIDTH, 6)
        self.down = nn.Linear(6, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.score = nn.Linear(WIDTH, 1)
        self.out = nn.Linear(WIDTH, WORDS)
        self.scale = nn.Parameter(torch.rand(3), requires_grad=False)
        self.out.weight = self.words.weight
        self.teacher = copy.deepcopy(self.norm).requires_grad_(False)
        self.double()
        generator = torch.Generator().manual_seed(4)  # of its own: workers take turns
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)

    def reset_parameters(self) -> None:
        """Initialise what is this module's own, as those that begin on the meta device are asked to."""
        nn.init.ones_(self.scale)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.words(tokens)
        hidden = self.norm(hidden + self.down(torch.tanh(self.up(hidden))))
        return self.out(hidden), self.score(hidden) * self.scale.sum()

    def loss(self, tokens: Tensor) -> Tensor:
        logits, score = self(tokens)
        return nn.functional.cross_entropy(logits, (tokens * 3 + 1) % WORDS) + (score - 1).square().mean()

    def teach(self) -> None:
        """Let the teacher follow, as an exponential moving average of this worker's own parameters."""
        with torch.no_grad():
            for own, other in zip(self.norm.parameters(), self.teacher.parameters(), strict=True):
                other.lerp_(own, 0.1)


def shard(network: Network, mesh, compiler: str | None = None, **options) -> Network:
    """Tensor parallelism in the middle if the mesh has it, and FSDP2 around.

    Args:
        network: is changed.
        mesh: of a worker.
        compiler: what compiles one layer, while another recomputes its activations.
        options: of ``fully_shard``.
    """
    if compiler is not None:
        network.up = checkpoint_wrapper(network.up)
        network.down = torch.compile(network.down, backend=compiler)
    if mesh["tensor_parallel"].size() > 1:
        parallelize_module(network, mesh["tensor_parallel"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    data = mesh["data_parallel"]
    for part in (network.up, network.down, network.score):
        fully_shard(part, mesh=data, **options)
    return fully_shard(network, mesh=data, **options)


def batch(worker: int, step: int, place: int = 0, places: int = 1) -> Tensor:
    """The share of a worker's batch that one of its data-parallel processes gets."""
    return torch.randint(WORDS, (12,), generator=torch.Generator().manual_seed(100 * step + worker))[place::places]


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def values(network: nn.Module) -> list[Tensor]:
    return [whole(tensor) for tensor in network.state_dict().values()]


def make_optimizer(kind: str, network: Network) -> torch.optim.Optimizer:
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if kind == "adam":
        return torch.optim.AdamW(trained, lr=0.02)
    groups = [{"params": trained[:3], "lr": 0.05}, {"params": trained[3:], "weight_decay": 0.1}]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def train(engine, network, optimizer, worker, steps, place=0, places=1, clip=None, accumulate=1):
    """Train; every third step the consensus is evaluated.

    Returns:
        Losses of the consensus.
    """
    losses = []
    for step in steps:
        for part in range(accumulate):
            (network.loss(batch(worker, 50 * part + step, place, places)) / accumulate).backward()
        engine.after_backward()
        if clip is not None:
            clip_by_norm(network.parameters(), clip)
        optimizer.step()
        network.teach()
        engine.after_step()
        optimizer.zero_grad()
        if step % 3 == 2:
            with engine.consensus(), torch.no_grad():
                losses.append(float(network.loss(batch(99, step))))
    return losses
