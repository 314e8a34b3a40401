"""Language modelling: a small GPT of this project's own, and a data module for any text file."""

from recipes.text.data import TextFile
from recipes.text.gpt import LanguageModel

__all__ = ["LanguageModel", "TextFile"]
