"""LightningModules: a model, its loss and its metrics."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import Task as Task
    from .classification import Classification as Classification
    from .classification import ImageClassification as ImageClassification
    from .classification import SequenceClassification as SequenceClassification
    from .classification import TokenClassification as TokenClassification
    from .evaluation import Evaluated as Evaluated
    from .language_modelling import LanguageModelling as LanguageModelling
    from .language_modelling import MaskedLanguageModelling as MaskedLanguageModelling
    from .plain import PlainTask as PlainTask
    from .sentence_embedding import SentenceEmbedding as SentenceEmbedding
    from .sentence_embedding import embed as embed
    from .speech_recognition import SpeechRecognition as SpeechRecognition
    from .speech_recognition import transcribe as transcribe

# Module -> the names above that it defines. A module is imported when one of its names is first used, so the checks that run before a job
# starts can import this package without loading torch.
_HOME = {
    "base": ("Task",),
    "classification": ("Classification", "ImageClassification", "SequenceClassification", "TokenClassification"),
    "evaluation": ("Evaluated",),
    "language_modelling": ("LanguageModelling", "MaskedLanguageModelling"),
    "plain": ("PlainTask",),
    "sentence_embedding": ("SentenceEmbedding", "embed"),
    "speech_recognition": ("SpeechRecognition", "transcribe"),
}  # fmt: skip


def __getattr__(name: str) -> Any:
    module = next((module for module, names in _HOME.items() if name in names), None)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{module}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *(name for names in _HOME.values() for name in names)})
