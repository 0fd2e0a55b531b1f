"""The Transformer in plain PyTorch. This room imports nothing else of the project."""

from .attention import Attention, Mask, attend_auto, attend_flex, attend_fused, attend_reference, cast_once
from .block import Block, FeedForward
from .cache import KeyValueCache
from .count import matrix_parameters, parameter_count, training_flops_per_token
from .head import Head, head_loss
from .layout import Plan
from .lora import LoraLinear, add_adapters
from .norm import RMSNorm
from .position import Alibi, Learned, NoPosition, Position, PositionalAttention, Rotary, Sinusoidal, sinusoid
from .sampling import filter_logits, generate, keeps_what_it_read
from .transformer import Embedding, HeadTransform, Transformer
from .vision import PatchEmbedding, VisionTransformer

__all__ = [
    "Alibi", "Attention", "Block", "Embedding", "FeedForward", "Head", "HeadTransform", "KeyValueCache", "Learned", "LoraLinear", "Mask",
    "NoPosition", "PatchEmbedding", "Plan", "Position", "PositionalAttention", "RMSNorm", "Rotary", "Sinusoidal", "Transformer", "VisionTransformer",
    "add_adapters", "attend_auto", "attend_flex", "attend_fused", "attend_reference", "cast_once", "filter_logits", "generate", "head_loss",
    "keeps_what_it_read", "matrix_parameters", "parameter_count", "sinusoid", "training_flops_per_token",
]  # fmt: skip
