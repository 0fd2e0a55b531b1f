"""An encoder of speech: convolutions make tokens of log-mel frames, and Transformer blocks read them from both sides.

Shapes: B batch, F frames, M mel bands, T tokens (F / subsampling), C channels (d_model), V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attend, attend_auto, keep_fp32
from .draw import normal
from .position import Position, Rotary
from .transformer import Transformer


class SpeechEmbedding(nn.Module):
    """Two convolutions over time with GELU, of strides whose product is `subsampling`, and positions. (B, F, M) → (B, T, C).

    With `subsampling=2` these are Whisper's (Radford et al. 2022): kernels of 3, strides of 1 and 2. With 4, kernels of 5, strides of 2 and 2.
    Frames of padding are set to 0 before each convolution, as the convolution itself pads a clip, so a clip's tokens do not depend on its batch.
    """

    def __init__(self, mels: int, d_model: int, subsampling: int):
        super().__init__()
        if subsampling not in (2, 4):
            raise ValueError(f"subsampling must be 2 or 4, not {subsampling}")
        kernel = 3 if subsampling == 2 else 5
        self.subsampling = subsampling
        self.conv1 = nn.Conv1d(mels, d_model, kernel, stride=subsampling // 2, padding=kernel // 2)
        self.conv2 = nn.Conv1d(d_model, d_model, kernel, stride=2, padding=kernel // 2)

    def forward(self, features_BFM: Tensor, documents_BT: Tensor | None, position: Position, positions_BT: Tensor) -> Tensor:
        x_BMF = features_BFM.transpose(1, 2).to(self.conv1.weight.dtype)
        real_B1T = None if documents_BT is None else (documents_BT >= 0)[:, None]
        if real_B1T is not None:
            x_BMF = x_BMF * real_B1T.repeat_interleave(self.subsampling, dim=2)
        x_BCF = F.gelu(self.conv1(x_BMF))
        if real_B1T is not None:
            x_BCF = x_BCF * real_B1T.repeat_interleave(2, dim=2)
        x_BTC = F.gelu(self.conv2(x_BCF)).transpose(1, 2)
        return position.embed(keep_fp32(x_BTC), positions_BT)


class SpeechTransformer(Transformer):
    """A Transformer encoder of log-mel features (B, F, M). `forward(features)` returns logits (B, T, V + 1) over `vocab_size` characters (or
    pieces) and, last, the blank of CTC (Graves et al. 2006); hidden states (B, T, C) with `head=False`.

    `documents_BT`, negative for padding, keeps padding out. `mels` and `subsampling`: see `SpeechEmbedding`. The other options are Transformer's.
    Context parallelism is not supported.
    """

    reads = "speech"
    plan = replace(Transformer.plan, attention=None)

    def __init__(
        self,
        mels: int,
        subsampling: int,
        n_layers: int,
        n_heads: int,
        d_model: int,
        context_length: int,
        vocab_size: int | None = None,
        d_ff: int | None = None,
        attention: Attend = attend_auto,
        position: Callable[..., Position] = Rotary,
        norm: Literal["rms", "layer"] = "rms",
        norm_eps: float | None = None,
        activation: Literal["gelu", "gelu_tanh", "relu2", "swiglu"] = "gelu",
        bias: bool = False,
        qk_norm: bool = True,
        dropout: float = 0.0,
        init_std: float = 0.02,
        zero_init: bool = False,
        head: bool = True,
        seed: int = 0,
    ):
        if head and vocab_size is None:
            raise ValueError("a head needs vocab_size, the number of characters")
        classes = (vocab_size or 0) + 1
        super().__init__(
            vocab_size=classes,
            n_layers=n_layers,
            n_heads=n_heads,
            d_model=d_model,
            context_length=context_length,
            d_ff=d_ff,
            causal=False,
            attention=attention,
            position=position,
            norm=norm,
            norm_eps=norm_eps,
            activation=activation,
            bias=bias,
            qk_norm=qk_norm,
            dropout=dropout,
            tie_embeddings=False,
            init_std=init_std,
            zero_init=zero_init,
            head=head,
            head_bias=head,
        )
        self.mels, self.subsampling = mels, subsampling
        block: Any
        for block in self.blocks:
            block.attention.k.bias = None  # as in Whisper: it would add the same to all scores of a query
        self.embedding: Any = SpeechEmbedding(mels, d_model, subsampling)
        if not self.embedding.conv1.weight.is_meta:
            self.initialise(seed)

    def forward(self, features: Tensor, *, documents_BT: Tensor | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Logits (B, T, V + 1) or hidden states (B, T, C). ValueError where F does not divide by `subsampling`, or for other features."""
        _, F, M = features.shape
        if F % self.subsampling or self.mels != M:
            raise ValueError(f"the features have {F} frames of {M} bands, and the model reads multiples of {self.subsampling} of {self.mels}")
        # The embedding receives the documents where that of texts receives token types.
        return super().forward(features, documents_BT=documents_BT, token_types_BT=documents_BT, length=F // self.subsampling)

    def initial_value(self, name: str, shape: torch.Size, seed: int, part: Sequence[slice] | None = None) -> Tensor:
        """As for `Transformer`; convolutions start at N(0, 1/fan_in)."""
        if len(shape) == 3 and not name.endswith("bias"):
            return normal(shape, 1 / math.sqrt(shape[1] * shape[2]), f"{seed}/{name}", part)
        return super().initial_value(name, shape, seed, part)
