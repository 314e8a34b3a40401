"""A text file, cut into pieces of equal length."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from recipes.images.batches import Batches
from recipes.text.tokens import BytePairs, Characters, Kind


class TextFile(L.LightningDataModule):
    """Any text file: its first part for training, the rest for validation and test.

    Args:
        path: of the file, UTF-8.
        tokens: ``"character"`` or ``"byte_pair"``.
        vocabulary: how many tokens there may be.
        length: tokens of an example; each is to be told from those before it.
        batch_size: examples of one process in a step.
        test_batch_size: examples of one process in a step of evaluation.
        test_share: share of the text that is kept for evaluation.
        seed: of the shuffles.

    Raises:
        FileNotFoundError: from :meth:`prepare_data`, if the file is missing.
        ValueError: if ``tokens`` is unknown or the vocabulary does not fit the text.
    """

    def __init__(
        self,
        path: str,
        tokens: Kind = "character",
        vocabulary: int = 256,
        length: int = 64,
        batch_size: int = 16,
        test_batch_size: int = 64,
        test_share: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if tokens not in ("character", "byte_pair"):
            raise ValueError(f"tokens must be 'character' or 'byte_pair', got {tokens!r}.")
        self.path, self.kind, self.vocabulary = Path(path).expanduser(), tokens, vocabulary
        self.length, self.test_share, self.seed = length, test_share, seed
        self.batch_size, self.test_batch_size = batch_size, test_batch_size
        self.parts: dict[str, Tensor] = {}

    def prepare_data(self) -> None:
        """Look whether the file is there."""
        if not self.path.is_file():
            raise FileNotFoundError(f"There is no {self.path}. Give data.path= any text file.")

    def setup(self, stage: str) -> None:
        """Read the file and make its tokens."""
        if self.parts:
            return
        text = self.path.read_text(encoding="utf-8")
        tokens = (Characters if self.kind == "character" else BytePairs)(text, self.vocabulary).encode(text)
        end = round(len(tokens) * (1 - self.test_share))
        self.parts = {"train": tokens[:end], "test": tokens[end:]}

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches."""
        return self._loader("train", self.batch_size)

    def val_dataloader(self) -> DataLoader:
        """The rest of the text."""
        return self._loader("test", self.test_batch_size)

    def test_dataloader(self) -> DataLoader:
        """The rest of the text."""
        return self._loader("test", self.test_batch_size)

    def _loader(self, split: str, batch_size: int) -> DataLoader:
        """Every data-parallel process has its share; processes of a tensor-parallel group have the same one."""
        assert self.trainer is not None
        place = self.trainer.strategy.distributed_sampler_kwargs  # type: ignore[attr-defined]
        data = Pieces(self.parts[split], self.length)
        batches = Batches(
            len(data), batch_size, place["rank"], place["num_replicas"], shuffle=split == "train", seed=self.seed
        )
        return DataLoader(data, batch_size=None, sampler=batches)


class Pieces(Dataset):
    """Pieces of a row of tokens, with the one token more that the last one of them is to tell.

    Args:
        tokens: the row.
        length: of a piece.
    """

    def __init__(self, tokens: Tensor, length: int) -> None:
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        """Number of pieces."""
        return max(0, (len(self.tokens) - 1) // self.length)

    def __getitem__(self, numbers: list[int]) -> Tensor:
        """A batch of pieces."""
        starts = self.length * torch.tensor(numbers)
        return self.tokens[starts[:, None] + torch.arange(self.length + 1)]
