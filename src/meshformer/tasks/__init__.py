"""LightningModules: each holds a Transformer and says what its loss is."""

from .base import Task
from .classification import Classification, ImageClassification, SequenceClassification, TokenClassification
from .evaluation import Evaluated
from .language_modelling import LanguageModelling, MaskedLanguageModelling
from .sentence_embedding import SentenceEmbedding, embed

__all__ = [
    "Classification", "Evaluated", "ImageClassification", "LanguageModelling", "MaskedLanguageModelling", "SentenceEmbedding",
    "SequenceClassification", "Task", "TokenClassification", "embed",
]  # fmt: skip
