"""The Transformer in plain PyTorch. This package imports no other part of the project except compat/."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attention import Attention as Attention
    from .attention import Mask as Mask
    from .attention import attend_auto as attend_auto
    from .attention import attend_flex as attend_flex
    from .attention import attend_fused as attend_fused
    from .attention import attend_reference as attend_reference
    from .attention import cast_once as cast_once
    from .block import Block as Block
    from .block import FeedForward as FeedForward
    from .cache import KeyValueCache as KeyValueCache
    from .count import matrix_parameters as matrix_parameters
    from .count import parameter_count as parameter_count
    from .count import training_flops_per_token as training_flops_per_token
    from .head import Head as Head
    from .head import head_loss as head_loss
    from .layout import Plan as Plan
    from .lora import LoraLinear as LoraLinear
    from .lora import add_adapters as add_adapters
    from .norm import RMSNorm as RMSNorm
    from .position import Alibi as Alibi
    from .position import Learned as Learned
    from .position import NoPosition as NoPosition
    from .position import Position as Position
    from .position import PositionalAttention as PositionalAttention
    from .position import Rotary as Rotary
    from .position import Sinusoidal as Sinusoidal
    from .position import sinusoid as sinusoid
    from .sampling import filter_logits as filter_logits
    from .sampling import generate as generate
    from .sampling import supports_kv_cache as supports_kv_cache
    from .speech import SpeechEmbedding as SpeechEmbedding
    from .speech import SpeechTransformer as SpeechTransformer
    from .transformer import Embedding as Embedding
    from .transformer import HeadTransform as HeadTransform
    from .transformer import Transformer as Transformer
    from .vision import PatchEmbedding as PatchEmbedding
    from .vision import VisionTransformer as VisionTransformer

# Module -> the names above that it defines. A module is imported when one of its names is first used, so the checks that run before a job
# starts can import this package without loading torch.
_HOME = {
    "attention": ("Attention", "Mask", "attend_auto", "attend_flex", "attend_fused", "attend_reference", "cast_once"),
    "block": ("Block", "FeedForward"),
    "cache": ("KeyValueCache",),
    "count": ("matrix_parameters", "parameter_count", "training_flops_per_token"),
    "head": ("Head", "head_loss"),
    "layout": ("Plan",),
    "lora": ("LoraLinear", "add_adapters"),
    "norm": ("RMSNorm",),
    "position": ("Alibi", "Learned", "NoPosition", "Position", "PositionalAttention", "Rotary", "Sinusoidal", "sinusoid"),
    "sampling": ("filter_logits", "generate", "supports_kv_cache"),
    "speech": ("SpeechEmbedding", "SpeechTransformer"),
    "transformer": ("Embedding", "HeadTransform", "Transformer"),
    "vision": ("PatchEmbedding", "VisionTransformer"),
}  # fmt: skip


def __getattr__(name: str) -> Any:
    module = next((module for module, names in _HOME.items() if name in names), None)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{module}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *(name for names in _HOME.values() for name in names)})
