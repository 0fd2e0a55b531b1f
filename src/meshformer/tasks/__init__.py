"""LightningModules: each holds a Transformer and says what its loss is."""

from .base import Task
from .language_modelling import LanguageModelling

__all__ = ["LanguageModelling", "Task"]
