"""The characters of any text file, each to be told from those before it, by the recipes' GPT made small."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.problems.problem import Measure, Split
from recipes.text.data import Pieces
from recipes.text.gpt import GPT
from recipes.text.tokens import Characters

SHARE = 0.1
"""The last of the text, which tests; and of the rest, the last that rates learning rates."""

EMBEDDING = 0.1
"""Standard deviation of the embeddings."""


@dataclass(frozen=True)
class Text:
    """The problem: a :class:`~benchmarks.problems.Problem`.

    Attributes:
        path: of the file, UTF-8.
        length: characters of an example.
        layers: blocks of the GPT.
        width: of its residual stream.
        heads: of its attention.
    """

    path: str
    length: int = 32
    layers: int = 1
    width: int = 32
    heads: int = 4
    measure: ClassVar[Measure] = Measure("test bits per character", 3, lower=True)

    def data(self, held_out: bool) -> tuple[Split, Split]:
        """Pieces [N, length + 1]; the last character of a piece is the first one of the next."""
        end = round(len(self._tokens) * (1 - SHARE))
        parts = self._tokens[:end], self._tokens[end:]
        if held_out:
            middle = round(end * (1 - SHARE))
            parts = self._tokens[:middle], self._tokens[middle:end]
        learn, rating = (Pieces(part, self.length) for part in parts)
        if not len(rating):
            raise ValueError(f"The text is too short: the part that rates has no {self.length + 1} characters.")
        return (learn[list(range(len(learn)))],), (rating[list(range(len(rating)))],)

    def initial(self, seed: int) -> list[Tensor]:
        """Parameters of one model, in the order of the GPT's.

        Its deviation of 0.02 is for widths of about 1,000. Weights of so narrow a model need more, or AdamW stays for
        long with what letters are frequent.
        """
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            values = [parameter.detach() for parameter in self._model().parameters()]
        for place, value in enumerate(values):
            if value.dim() == 2:
                value *= (1 / math.sqrt(self.width) if place in self.hidden else EMBEDDING) / 0.02
        return values

    def loss(self, values: Sequence[Tensor], examples: Split) -> Tensor:
        """Cross-entropy in nats per character."""
        return vmap(partial(_loss, self._network))(tuple(values), examples[0]).sum()

    def rating(self, values: Sequence[Tensor], split: Split) -> float:
        """Bits per character."""
        nats = sum(float(_loss(self._network, values, some)) * len(some) for some in split[0].split(512))
        return nats / len(split[0]) / math.log(2)

    @cached_property
    def hidden(self) -> frozenset[int]:
        """The matrices of the blocks: not the embeddings, of which one is the last layer, too."""
        named = enumerate(self._network.named_parameters())
        return frozenset(i for i, (name, value) in named if name.startswith("blocks.") and value.dim() == 2)

    @cached_property
    def _tokens(self) -> Tensor:
        return self._characters.encode(self._text)

    @cached_property
    def _characters(self) -> Characters:
        return Characters(self._text, len(set(self._text)))

    @cached_property
    def _text(self) -> str:
        return Path(self.path).read_text(encoding="utf-8")

    @cached_property
    def _network(self) -> GPT:
        return self._model()

    def _model(self) -> GPT:
        return GPT(len(self._characters.characters), self.length, self.layers, self.width, self.heads)


def _loss(network: GPT, values: Sequence[Tensor], pieces: Tensor) -> Tensor:
    """Of one model with these parameters."""
    named = dict(zip((name for name, _ in network.named_parameters()), values, strict=True))
    with sdpa_kernel(SDPBackend.MATH):  # the others have no batching rule
        logits = functional_call(network, named, (pieces[:, :-1],))
    return nn.functional.cross_entropy(logits.flatten(0, 1), pieces[:, 1:].flatten())
