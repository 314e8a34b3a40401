"""fairseq's binarized translation data for Lightning: batches of so many tokens, sharded by worker."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn

from recipes.translation.quiet_fairseq import sacremoses  # isort: skip
from fairseq.data.iterators import EpochBatchIterator
from fairseq.tasks.translation import TranslationConfig, TranslationTask

from recipes.translation.text import RawText, read_lines

# fairseq pins memory wherever it loads, which torch has to say something about on machines without a GPU.
warnings.filterwarnings("ignore", ".*'pin_memory' argument is set as true but no accelerator.*")


class Batches:
    """A fairseq epoch iterator as Lightning wants a loader: sized, and with the right epoch.

    fairseq deals the batches of an epoch out to the workers in turn and fills the last turn up with empty batches.
    For training that turn is left out: each worker has equally many batches, none of them empty, and which sentences
    are left out changes with each epoch's shuffle. For evaluation everything is seen, and empty batches (``{}``) must
    be skipped.

    Args:
        iterator: fairseq's iterator, of this worker's shard.
        epoch: says the present epoch, counted from 0; the order of the batches depends on it. None: always the same
            order, and all sentences.
        start: how many batches of the first epoch to leave out, for training that is resumed.

    Raises:
        ValueError: if training has fewer batches than workers.
    """

    def __init__(self, iterator: EpochBatchIterator, epoch: Callable[[], int] | None = None, start: int = 0) -> None:
        self.iterator = iterator
        self.epoch = epoch
        self.start = self.position = start
        if len(self) == 0:
            raise ValueError(
                f"{len(iterator.frozen_batches)} batches are too few for {iterator.num_shards} workers. Lower "
                "data.max_tokens."
            )

    def __len__(self) -> int:
        if self.epoch is None:
            return len(self.iterator)
        return len(self.iterator.frozen_batches) // self.iterator.num_shards

    def __iter__(self) -> Iterator[dict[str, Any]]:
        start, self.start = self.start, 0
        shuffle = self.epoch is not None
        epoch = self.epoch() if self.epoch is not None else 0
        self.iterator.load_state_dict({"epoch": epoch + 1, "iterations_in_epoch": start, "shuffle": shuffle})
        batches = self.iterator.next_epoch_itr(shuffle=shuffle)
        self.position = start
        for batch in islice(batches, len(self) - start):
            self.position += 1
            yield batch


class TranslationData(L.LightningDataModule):
    """What ``fairseq-preprocess`` wrote, or raw text that is prepared so first.

    Args:
        root: folder of the binarized data (``dict.en.txt``, ``train.en-de.en.bin``, ...), or of the raw text.
        source: language to translate from.
        target: language to translate into.
        text: how to prepare raw text. None: the data in ``root`` are binarized already.
        max_tokens: at most so many tokens in a batch of a worker, padding included, on either side.
        test_max_tokens: likewise for validation and test; None: as many as for training.
        max_length: sentences of more tokens than this, on either side, are left out, and it is said how many; None: of
            more than a batch or the model takes.
        batch_multiple: make the number of sentences in a batch a multiple of this, where they are more.
        num_workers: processes that load data for each worker.
        seed: of the shuffle; must be equal on all workers.
        bpe: what joins the pieces of a word in the data, ``"@@ "`` as written by subword-nmt.

    Raises:
        FileNotFoundError: if the data are not there; says how to get them.
        ValueError: if ``max_length`` is more than ``max_tokens``.
    """

    def __init__(
        self,
        root: str | Path,
        source: str = "en",
        target: str = "de",
        text: RawText | None = None,
        max_tokens: int = 3584,
        test_max_tokens: int | None = None,
        max_length: int | None = None,
        batch_multiple: int = 8,
        num_workers: int = 0,
        seed: int = 1,
        bpe: str = "@@ ",
    ) -> None:
        super().__init__()
        if max_length is not None and not 0 < max_length <= max_tokens:
            raise ValueError(f"max_length must be from 1 to max_tokens, which is {max_tokens}, got {max_length}.")
        self.root = Path(root).expanduser().absolute()
        self.source = source
        self.target = target
        self.text = text
        self.max_tokens = max_tokens
        self.test_max_tokens = test_max_tokens or max_tokens
        self.max_length = max_length
        self.batch_multiple = batch_multiple
        self.num_workers = num_workers
        self.seed = seed
        self.bpe = bpe
        self._task: TranslationTask | None = None
        self._train: Batches | None = None
        self._start = 0
        self._moses = sacremoses.MosesDetokenizer(target)

    @property
    def folder(self) -> Path:
        """Where the binarized data are."""
        return self.root if self.text is None else self.text.folder(self.root, self.source, self.target)

    def prepare_data(self) -> None:
        """Binarize raw text; Lightning calls this on one process of each machine, while the others wait."""
        if self.text is not None:
            self.text.binarize(self.root, self.source, self.target)
        self._check_files()

    @property
    def task(self) -> TranslationTask:
        """What fairseq calls a task: the dictionaries and the data that are open."""
        if self._task is None:
            self._check_files()
            config = translation_config(str(self.folder), self.source, self.target)
            self._task = TranslationTask.setup_task(config)
        return self._task

    def _check_files(self) -> None:
        folder, pair = self.folder, f"{self.source}-{self.target}"
        names = [f"dict.{language}.txt" for language in (self.source, self.target)]
        names += [f"{split}.{pair}.{self.source}.idx" for split in ("train", "valid", "test")]
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"No {', '.join(missing)} in {folder}. Set data.root to a folder that was made with: "
                f"fairseq-preprocess --source-lang {self.source} --target-lang {self.target} --joined-dictionary "
                "--trainpref TRAIN --validpref VALID --testpref TEST --destdir FOLDER, where TRAIN and so on are "
                f"tokenized text after byte-pair encoding, without the ending .{self.source} or .{self.target}. "
                "examples/scaling_nmt in fairseq's repository says where to get that of WMT'16 English-German."
            )

    def setup(self, stage: str) -> None:
        """Open the data of a stage; they stay on disk and are mapped into memory."""
        for split in {"fit": ("train", "valid"), "validate": ("valid",)}.get(stage, ("test",)):
            self.task.load_dataset(split)

    @property
    def _fit(self) -> L.Trainer:
        if self.trainer is None:
            raise RuntimeError("Training data belong to a Trainer: use fit(model, datamodule=TranslationData(...)).")
        return self.trainer

    def train_dataloader(self) -> Batches:
        """This worker's shard of the training data."""
        iterator = self._iterator("train", self.max_tokens)
        self._train = Batches(iterator, epoch=lambda: self._fit.current_epoch, start=self._start)
        self._start = 0
        return self._train

    def state_dict(self) -> dict[str, int]:
        """How many batches of the epoch have been trained on; the same on all workers."""
        # Lightning asks loaders for a state too, but gives it back too late where a schedule wants the total steps.
        done = self._train.position if self._train is not None else 0
        return {"position": done if done < self._fit.num_training_batches else 0}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume in the middle of an epoch."""
        if self._fit.state.fn == "fit":
            self._start = state["position"]

    def val_dataloader(self) -> Batches:
        """This worker's shard of the validation data."""
        return Batches(self._iterator("valid", self.test_max_tokens))

    def test_dataloader(self) -> Batches:
        """This worker's shard of the test data."""
        return Batches(self._iterator("test", self.test_max_tokens))

    def _iterator(self, split: str, max_tokens: int) -> EpochBatchIterator:
        dataset = self.task.dataset(split)
        longest = min(max_tokens, *self.task.max_positions(), self.max_length or max_tokens)
        left_out = int((np.maximum(dataset.src_sizes, dataset.tgt_sizes) > longest).sum())
        if left_out == len(dataset):
            raise ValueError(
                f"Every sentence of {split} has more than {longest} tokens. Raise data.max_length and data.max_tokens."
            )
        if left_out:
            rank_zero_warn(
                f"{left_out} of {len(dataset)} sentences of {split} have more than {longest} tokens and are left out "
                "(data.max_length, data.max_tokens, data.test_max_tokens)."
            )
        return self.task.get_batch_iterator(
            dataset,
            max_tokens=max_tokens,
            max_positions=(longest, longest),
            ignore_invalid_inputs=True,
            required_batch_size_multiple=self.batch_multiple,
            seed=self.seed,
            num_shards=self.trainer.world_size if self.trainer else 1,
            shard_id=self.trainer.global_rank if self.trainer else 0,
            num_workers=self.num_workers,
            disable_iterator_cache=True,
        )

    def decode(self, tokens: torch.Tensor, unknown: str = "<unk>") -> str:
        """The text of a target sentence: pieces joined to words, and Moses' tokens to a sentence."""
        joined = self.task.target_dictionary.string(tokens, bpe_symbol=self.bpe, unk_string=unknown)
        return self._moses.detokenize(joined.split())

    def references(self, split: str) -> list[str]:
        """Human translations of ``"valid"`` or ``"test"``, in the order of the files.

        The raw text where it stands beside the binarized data (``test.de``), else what can be put together from the
        tokens; unknown words of the latter never match.
        """
        raw = self.folder / f"{split}.{self.target}"
        dataset = self.task.dataset(split)
        if raw.is_file():
            lines = read_lines(raw)
            if len(lines) != len(dataset):
                raise ValueError(f"{raw} has {len(lines)} lines, but the data beside it have {len(dataset)} sentences.")
            return lines
        return [self.decode(dataset.tgt[i], unknown="UNKNOWNTOKENINREF") for i in range(len(dataset))]


def translation_config(folder: str, source: str, target: str) -> TranslationConfig:
    """The configuration of fairseq's task; those of its fields that refer to other configurations are filled in."""
    return TranslationConfig(
        data=folder,
        source_lang=source,
        target_lang=target,
        train_subset="train",
        dataset_impl=None,
        required_seq_len_multiple=1,
    )
