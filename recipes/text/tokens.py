"""Tokens of a text: its characters, or pairs of bytes that occur often together."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["character", "byte_pair"]

WORDS = re.compile(r"\s?\S+|\s")
"""What byte pairs do not reach beyond: a word with the blank before it."""


class Characters:
    """One token for each character that occurs in a text.

    Args:
        text: the text.
        size: how many there may be.

    Raises:
        ValueError: if it has more different characters.
    """

    def __init__(self, text: str, size: int) -> None:
        self.characters = sorted(set(text))
        if len(self.characters) > size:
            raise ValueError(
                f"The text has {len(self.characters)} different characters, more than vocabulary={size}. Raise "
                "data.vocabulary, or take data.tokens=byte_pair."
            )

    def encode(self, text: str) -> Tensor:
        """The tokens of a text, all of whose characters are known."""
        places = {character: place for place, character in enumerate(self.characters)}
        return torch.tensor([places[character] for character in text])

    def decode(self, tokens: Tensor) -> str:
        """The text of tokens."""
        return "".join(self.characters[token] for token in tokens.tolist())


class BytePairs:
    """Bytes, and the pairs of tokens that were merged, the most frequent one first, until the vocabulary was full.

    Sennrich, Haddow, Birch, "Neural Machine Translation of Rare Words with Subword Units", ACL 2016,
    https://arxiv.org/abs/1508.07909, on bytes instead of characters, so that every text has tokens.

    Args:
        text: of which pairs are counted.
        size: of the vocabulary, 256 at least.

    Raises:
        ValueError: if the vocabulary is too small for bytes.
    """

    def __init__(self, text: str, size: int) -> None:
        if size < 256:
            raise ValueError(f"vocabulary must be at least 256 for byte_pair, got {size}.")
        words = [(list(word.encode()), count) for word, count in Counter(WORDS.findall(text)).items()]
        self.merges: dict[tuple[int, int], int] = {}
        while len(self.merges) < size - 256:
            pairs: Counter[tuple[int, int]] = Counter()
            for tokens, count in words:
                for pair in pairwise(tokens):
                    pairs[pair] += count
            if not pairs:
                break
            best = max(pairs, key=lambda pair: (pairs[pair], pair))
            self.merges[best] = 256 + len(self.merges)
            words = [(_merged(tokens, best, self.merges[best]), count) for tokens, count in words]

    def encode(self, text: str) -> Tensor:
        """The tokens of a text."""
        known: dict[str, list[int]] = {}
        for word in set(WORDS.findall(text)):
            tokens = list(word.encode())
            while True:
                pairs = [pair for pair in pairwise(tokens) if pair in self.merges]
                if not pairs:
                    break
                first = min(pairs, key=self.merges.__getitem__)
                tokens = _merged(tokens, first, self.merges[first])
            known[word] = tokens
        return torch.tensor([token for word in WORDS.findall(text) for token in known[word]])

    def decode(self, tokens: Tensor) -> str:
        """The text of tokens."""
        spelled = {token: bytes([token]) for token in range(256)}
        for (left, right), token in self.merges.items():
            spelled[token] = spelled[left] + spelled[right]
        return b"".join(spelled[token] for token in tokens.tolist()).decode(errors="replace")


def _merged(tokens: list[int], pair: tuple[int, int], token: int) -> list[int]:
    """Tokens with a pair replaced by one token wherever it occurs, from the left."""
    merged: list[int] = []
    place = 0
    while place < len(tokens):
        if tuple(tokens[place : place + 2]) == pair:
            merged.append(token)
            place += 2
        else:
            merged.append(tokens[place])
            place += 1
    return merged
