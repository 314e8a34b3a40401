"""Translation with fairseq: its models, criterion, batches and beam search, under any strategy of Lightning.

>>> from recipes.translation import RawText, Translation, TranslationData
"""

from recipes.translation.data import TranslationData
from recipes.translation.module import Translation
from recipes.translation.text import RawText

__all__ = ["RawText", "Translation", "TranslationData"]
