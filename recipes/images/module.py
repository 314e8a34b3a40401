"""A LightningModule that trains any network to classify images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from recipes.images.batches import Batch
from recipes.images.captured import CapturedObjective, Objective

GRAPHS = ("reduce-overhead", "max-autotune")
"""Modes of ``torch.compile`` that capture graphs."""


class ImageClassifier(L.LightningModule):
    """Cross-entropy training of a network.

    Logs ``train/loss``, and ``loss`` and ``accuracy`` (in percent) of ``val`` and ``test``.

    Args:
        network: images to logits.
        optimizer: makes the optimizer of parameters or of parameter groups.
        schedule: makes the learning-rate scheduler, see :mod:`recipes.schedules`.
        label_smoothing: share of the target that is spread over all classes.
        decay_norms: whether weight decay also applies to biases and the parameters of norms.
        channels_last: whether the network's memory format is channels last, which some hardware likes.
        compile: mode of ``torch.compile`` for network and loss in training, such as ``"default"`` or
            ``"reduce-overhead"``; None does not compile them.
        capture: whether loss and gradients of a training step are captured as one CUDA graph, for a GPU that would wait
            for the host: see :mod:`recipes.images.captured`.

    Raises:
        ValueError: if a mode of ``torch.compile`` that captures graphs by itself is to be captured.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: Callable[[Any], Optimizer],
        schedule: Callable[..., Any],
        label_smoothing: float = 0.0,
        decay_norms: bool = True,
        channels_last: bool = False,
        compile: str | None = None,
        capture: bool = False,
    ) -> None:
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last) if channels_last else network
        self.make_optimizer = optimizer
        self.make_schedule = schedule
        self.loss = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        self.decay_norms = decay_norms
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.objective: Objective = self._objective
        if compile is not None:
            self.objective = torch.compile(self._objective, mode=compile)
        if capture:
            if compile in GRAPHS:
                raise ValueError(
                    f"compile={compile!r} captures graphs by itself. With capture=True use compile='default', or None."
                )
            self.objective = CapturedObjective(self.objective, self.network)

    def _objective(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.loss(self(images), labels)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.network(images.contiguous(memory_format=self.memory_format))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        images, labels = batch
        loss = self.objective(images, labels)
        if self._logs:
            self.log("train/loss", loss, prog_bar=True)
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute gradients, or take those that were captured with the loss."""
        if isinstance(self.objective, CapturedObjective):
            self.objective.backward(share=1 / self.trainer.accumulate_grad_batches)
        else:
            super().backward(loss, *args, **kwargs)

    @property
    def _logs(self) -> bool:
        """Whether loggers take what this step logs; for any other, logging takes a fast step's host a tenth longer."""
        trainer: Any = self.trainer
        period = trainer.log_every_n_steps
        return bool(period) and (trainer.global_step + 1) % period == 0

    def on_train_start(self) -> None:
        """Refuse DDP where gradients go past it.

        Raises:
            ValueError: if gradients are captured, and DDP waits for them.
        """
        if isinstance(self.objective, CapturedObjective) and isinstance(
            self.trainer.strategy.model, DistributedDataParallel
        ):
            raise ValueError("capture=True hands gradients over past DDP's hooks. Use strategy=allreduce in its place.")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss and accuracy of a batch."""
        self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss and accuracy of a batch."""
        self._evaluate("test", batch)

    def _evaluate(self, split: str, batch: Batch) -> None:
        images, labels = batch
        logits = self(images)
        values = {
            f"{split}/loss": nn.functional.cross_entropy(logits, labels),
            f"{split}/accuracy": 100 * (logits.argmax(1) == labels).float().mean(),
        }
        self.log_dict(values, on_epoch=True, sync_dist=True, batch_size=len(labels), prog_bar=True)

    def configure_optimizers(self) -> Any:
        """The optimizer, and the schedule over all steps of the training."""
        optimizer = self.make_optimizer(self._groups())
        total = self.trainer.estimated_stepping_batches
        if not math.isfinite(total):
            raise ValueError("The schedule needs an end: set trainer.max_epochs or trainer.max_steps.")
        per_epoch = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        schedule = self.make_schedule(optimizer, total_steps=int(total), steps_per_epoch=per_epoch)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _groups(self) -> Iterable[Any]:
        if self.decay_norms:
            return self.parameters()
        parameters = list(self.parameters())
        return [
            {"params": [p for p in parameters if p.dim() > 1]},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
