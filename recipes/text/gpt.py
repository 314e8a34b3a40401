"""A small GPT, and its training: whole on every worker, or sharded where the strategy has a mesh."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer


class Block(nn.Module):
    """Attention to what came before, then a dense layer, each on a normalized input.

    Args:
        width: of the residual stream.
        heads: of attention; they divide the width.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attend, self.join = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.dense = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states of shape (batch, length, width)."""
        parts = self.attend(self.norms[0](hidden)).chunk(3, -1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        seen = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.join(seen.transpose(1, 2).flatten(2))
        return hidden + self.dense(self.norms[1](hidden))


class GPT(nn.Module):
    """Tokens to logits of the next ones.

    Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, without dropout; the embedding is
    also the last layer.

    Args:
        vocabulary: number of tokens.
        length: tokens at most.
        layers: blocks.
        width: of the residual stream.
        heads: of attention.
    """

    def __init__(self, vocabulary: int, length: int, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                deep = name.endswith(("join.weight", "dense.2.weight"))  # these add to the residual stream
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if deep else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of shape (batch, length, vocabulary)."""
        hidden = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            hidden = block(hidden)
        return nn.functional.linear(self.norm(hidden), self.tokens.weight)


class LanguageModel(L.LightningModule):
    """Training of a GPT. Logs ``train/loss``, ``val/loss`` and ``test/loss``, in nats per token.

    Args:
        optimizer: makes the optimizer of parameters.
        schedule: makes the learning-rate scheduler, see :mod:`recipes.schedules`.
        vocabulary: number of tokens.
        length: tokens of an example at most.
        layers: blocks.
        width: of the residual stream.
        heads: of attention.
    """

    def __init__(
        self,
        optimizer: Callable[[Any], Optimizer],
        schedule: Callable[..., Any],
        vocabulary: int = 256,
        length: int = 64,
        layers: int = 2,
        width: int = 64,
        heads: int = 4,
    ) -> None:
        super().__init__()
        self.network = GPT(vocabulary, length, layers, width, heads)
        self.make_optimizer, self.make_schedule = optimizer, schedule
        self.sharded = False

    def configure_model(self) -> None:
        """Shard every block over the processes of this worker, if the strategy shards."""
        if self.device_mesh is None or self.sharded:
            return
        mesh = self.device_mesh["data_parallel"]
        for block in self.network.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.network, mesh=mesh)
        self.sharded = True

    def training_step(self, tokens: Tensor, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        loss = self.loss(tokens)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, tokens: Tensor, batch_idx: int) -> None:
        """The loss of a batch."""
        self.log("val/loss", self.loss(tokens), sync_dist=True, batch_size=len(tokens), prog_bar=True)

    def test_step(self, tokens: Tensor, batch_idx: int) -> None:
        """The loss of a batch."""
        self.log("test/loss", self.loss(tokens), sync_dist=True, batch_size=len(tokens))

    def loss(self, tokens: Tensor) -> Tensor:
        """Cross-entropy of each token after those before it."""
        logits = self.network(tokens[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def configure_optimizers(self) -> Any:
        """The optimizer, and the schedule over all steps of the training."""
        optimizer = self.make_optimizer(self.parameters())
        total = self.trainer.estimated_stepping_batches
        if not math.isfinite(total):
            raise ValueError("The schedule needs an end: set trainer.max_epochs or trainer.max_steps.")
        per_epoch = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        schedule = self.make_schedule(optimizer, total_steps=int(total), steps_per_epoch=per_epoch)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
