"""A fairseq translation model as a LightningModule."""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from io import StringIO
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor

from recipes.translation.quiet_fairseq import sacrebleu  # isort: skip
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.data import Dictionary
from fairseq.dataclass.configs import GenerationConfig
from fairseq.models import ARCH_MODEL_REGISTRY
from fairseq.tasks.translation import TranslationTask

from recipes.translation.data import TranslationData, translation_config


class Translation(L.LightningModule):
    """Trains an architecture of fairseq with label-smoothed cross-entropy, and translates with its beam search.

    Losses are per target token and in bits, as fairseq logs them: ``train/loss`` and ``val/loss`` are label-smoothed,
    ``val/nll`` is not, and ``val/perplexity`` is 2 to its power. Each worker's gradient is the mean over the tokens of
    its own batch, where fairseq's data-parallel training divides by the tokens of all workers. BLEU is sacreBLEU's
    with its defaults, of detokenized text. Use it with :class:`TranslationData`, which has the dictionaries.

    Args:
        architecture: a name that is registered with fairseq, such as ``transformer_vaswani_wmt_en_de_big``.
        optimizer: makes an optimizer of parameters.
        schedule: ``schedule(optimizer, *, total_steps, steps_per_epoch)`` makes a learning-rate schedule that is
            stepped with the optimizer; None for a constant rate.
        settings: fields of the architecture that differ from what its name stands for (``{"dropout": 0.1}``).
        label_smoothing: probability that is spread over all tokens.
        generation: fields of fairseq's ``GenerationConfig`` for the test.
        val_beam: size of the beam for ``val/bleu``, 1 for greedy search; None to save its time and log none.

    Raises:
        ValueError: if fairseq knows no such architecture, setting of it, or field of the generation.

    Example:
        >>> model = Translation("transformer_iwslt_de_en", torch.optim.Adam, settings={"dropout": 0.3})
        >>> model = Translation.load_from_checkpoint("last.ckpt", optimizer=torch.optim.Adam)
    """

    def __init__(
        self,
        architecture: str,
        optimizer: Callable[..., torch.optim.Optimizer],
        schedule: Callable[..., Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        label_smoothing: float = 0.1,
        generation: Mapping[str, Any] | None = None,
        val_beam: int | None = 1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["optimizer", "schedule"], logger=False)
        self.architecture = architecture
        self.optimizer = optimizer
        self.schedule = schedule
        self.settings = dict(settings or {})
        self.label_smoothing = label_smoothing
        self.generation = dict(generation or {})
        self.val_beam = val_beam
        if architecture not in ARCH_MODEL_REGISTRY:
            known = ", ".join(sorted(name for name in ARCH_MODEL_REGISTRY if name.startswith("transformer")))
            raise ValueError(f"fairseq knows no architecture {architecture!r}. Transformers that it knows: {known}.")
        check_names("generation", self.generation, {field.name for field in fields(GenerationConfig)})
        parser = ArgumentParser()
        ARCH_MODEL_REGISTRY[architecture].add_args(parser)
        check_names("settings", self.settings, {action.dest for action in parser._actions})
        self.network: torch.nn.Module | None = None

    # Model and optimizer ----------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Build the network once the dictionaries are known, before the strategy asks for parameters."""
        if self.network is None and self._trainer is not None:
            self._build(self.data.task)

    @property
    def data(self) -> TranslationData:
        """The Trainer's data."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, TranslationData):
            raise TypeError(
                "Translation needs the dictionaries of its data: fit(model, datamodule=TranslationData(...))."
            )
        return data

    def _build(self, task: TranslationTask) -> None:
        self.task = task
        self.network = task.build_model(Namespace(arch=self.architecture, **self.settings))
        self.criterion = LabelSmoothedCrossEntropyCriterion(
            task, sentence_avg=False, label_smoothing=self.label_smoothing
        )

    def configure_optimizers(self) -> Any:
        """The optimizer, and its schedule for as many steps as the Trainer will take."""
        optimizer = self.optimizer(self.parameters())
        if self.schedule is None:
            return optimizer
        total = self.trainer.estimated_stepping_batches
        if not math.isfinite(total):
            raise ValueError("The schedule needs an end: set trainer.max_epochs or trainer.max_steps.")
        per_epoch = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        schedule = self.schedule(optimizer, total_steps=int(total), steps_per_epoch=per_epoch)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the dictionaries, without which the weights mean nothing."""
        checkpoint["dictionaries"] = dictionary_texts(self.task)
        checkpoint["languages"] = {"source": self.task.cfg.source_lang, "target": self.task.cfg.target_lang}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the network for ``load_from_checkpoint``, and refuse data of other dictionaries."""
        texts, languages = checkpoint["dictionaries"], checkpoint["languages"]
        if self.network is None:
            source, target = (Dictionary.load(StringIO(texts[side])) for side in ("source", "target"))
            config = translation_config("", languages["source"], languages["target"])
            self._build(TranslationTask(config, source, target))
        elif texts != dictionary_texts(self.task):
            raise ValueError(f"The checkpoint was trained with other dictionaries than those in {self.data.folder}.")

    # Steps ------------------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The loss per token of this worker's batch."""
        loss, tokens, _ = self.criterion(self.network, batch)
        loss = loss / tokens
        self.log("train/loss", loss.detach() / math.log(2), batch_size=tokens, prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Nothing has been seen yet."""
        self._sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        self._translations: list[tuple[int, str]] = []

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Loss, and a quick translation where that is wanted."""
        self._evaluate(batch, {"beam": self.val_beam} if self.val_beam else None)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Loss, and a translation by beam search."""
        self._evaluate(batch, {})

    def _evaluate(self, batch: dict[str, Any], differently: dict[str, Any] | None) -> None:
        if not batch:  # this worker's shard is shorter than others'
            return
        _, tokens, logged = self.criterion(self.network, batch)
        self._sums += torch.stack([logged["loss"], logged["nll_loss"], logged["loss"].new_tensor(tokens)]).double()
        if differently is not None:
            best = self.translate(batch, **differently)
            texts = map(self.data.decode, best)
            self._translations += zip(batch["id"].tolist(), texts, strict=True)

    def translate(self, batch: dict[str, Any], **generation: Any) -> list[Tensor]:
        """The best translations of a batch, as tokens on the CPU.

        Args:
            batch: as :class:`TranslationData` has it.
            generation: what to do otherwise than ``self.generation`` says.

        Returns:
            One tensor for each sentence of the batch.
        """
        # Made anew each time: it would be a part of the module, and so of its checkpoints, if it were kept.
        generator = self.task.build_generator([self.network], Namespace(**self.generation | generation))
        found = self.task.inference_step(generator, [self.network], batch)
        return [hypotheses[0]["tokens"].int().cpu() for hypotheses in found]

    def on_validation_epoch_end(self) -> None:
        """Log the losses and BLEU over the shards of all workers."""
        self._log_evaluation("val", "valid")

    def on_test_epoch_end(self) -> None:
        """Likewise for the test."""
        self._log_evaluation("test", "test")

    def _log_evaluation(self, name: str, split: str) -> None:
        loss, nll, tokens = self.trainer.strategy.reduce(self._sums, reduce_op="sum").tolist()
        logged = {"loss": loss / tokens / math.log(2), "nll": nll / tokens / math.log(2)}
        logged["perplexity"] = 2 ** logged["nll"]
        if name == "test" or self.val_beam:
            logged["bleu"] = self._bleu(split)
        values = {f"{name}/{key}": value for key, value in logged.items()}
        self.log_dict(values, prog_bar=name == "val", sync_dist=True)  # equal everywhere; Lightning warns without

    def _bleu(self, split: str) -> float:
        """BLEU of all workers' translations; sentences that were not translated (in a short test) do not count."""
        translations = dict(gather(self._translations))
        references = self.data.references(split)
        chosen = sorted(translations)
        return sacrebleu.corpus_bleu([translations[i] for i in chosen], [[references[i] for i in chosen]]).score


def check_names(argument: str, given: Mapping[str, Any], known: set[str]) -> None:
    """Refuse names that fairseq would silently ignore."""
    unknown = sorted(set(given) - known)
    if unknown:
        close = sorted({match for name in unknown for match in get_close_matches(name, known)})
        hint = f" Did you mean {', '.join(close)}?" if close else ""
        raise ValueError(f"fairseq knows no {', '.join(unknown)} among its {argument}.{hint}")


def gather(items: list[Any]) -> list[Any]:
    """The items of all workers, the same list on each of them."""
    if not (dist.is_available() and dist.is_initialized()):
        return items
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, items)
    return [item for worker in everyone for item in worker]


def dictionary_texts(task: TranslationTask) -> dict[str, str]:
    """The dictionaries as fairseq writes them to files."""
    texts = {"source": StringIO(), "target": StringIO()}
    task.source_dictionary.save(texts["source"])
    task.target_dictionary.save(texts["target"])
    return {side: text.getvalue() for side, text in texts.items()}
