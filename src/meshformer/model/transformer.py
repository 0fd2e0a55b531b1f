"""The Transformer: token ids to logits, in plain PyTorch without device meshes, trainers or configuration.

Shapes: B batch, T time, C channels (d_model), V vocabulary.
Read in this order: attention.py (the math), position.py (positional encodings), block.py (one layer), this file (the model).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .attention import Attend, Attention, Mask, attend_auto, keep_fp32, needs_block_mask
from .block import Block, FeedForward, gelu
from .cache import KeyValueCache
from .draw import fill_part, normal, sizes
from .head import Head
from .layout import Plan
from .norm import make_norm
from .position import Position, Rotary
from .settings import feed_forward_width


class Embedding(nn.Module):
    """Token embeddings, optionally with BERT's token-type embeddings and a norm after them. (B, T) → (B, T, C)."""

    def __init__(self, vocab_size: int, d_model: int, token_types: int, norm: nn.Module | None):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, d_model)
        self.types = nn.Embedding(token_types, d_model) if token_types else None
        self.norm = norm

    def forward(self, tokens_BT: Tensor, types_BT: Tensor | None, position: Position, positions_BT: Tensor) -> Tensor:
        x_BTC = position.embed(keep_fp32(self.tokens(tokens_BT)), positions_BT)
        if self.types is not None:
            x_BTC = x_BTC + self.types(torch.zeros_like(tokens_BT) if types_BT is None else types_BT)
        return x_BTC if self.norm is None else self.norm(x_BTC)


class HeadTransform(nn.Module):
    """The layer before the head of BERT's masked-language model: norm(gelu(W x + b)) (Devlin et al. 2019). (B, T, C) → (B, T, C)."""

    def __init__(self, d_model: int, activation: str, norm: nn.Module):
        super().__init__()
        self.activation = activation
        self.dense = nn.Linear(d_model, d_model)
        self.norm = norm

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.norm(gelu(self.dense(x_BTC), self.activation))


class Transformer(nn.Module):
    """Decoder (`causal=True`) or encoder (`causal=False`) of `n_layers` equal blocks.

    `attention` is a kernel from attention.py; `position` builds the positional encoding from (d_model, n_heads, head_dim, context_length): a
    class of position.py or a `functools.partial` of one. Defaults for None: `d_ff` depends on the activation (`feed_forward_width`),
    `n_kv_heads` = `n_heads`, `head_dim` = d_model / n_heads, `norm_eps` = `usual_eps`, `attention_bias` (of q, k, v, o) = `bias` (of all linear
    layers and norms except the head). `head=False`: an encoder that returns hidden states (B, T, C). `outputs`: the width of the head, if not
    the vocabulary (classes). `head_bias` and `head_transform` make the head of BERT's masked-language model. `initialise` draws every
    parameter from `seed` and its name. `plan` declares how the model can be sharded.
    Raises ValueError for settings that contradict each other.
    """

    # Plain values, because the checks read them from this source file before torch is imported.
    reads = "tokens"  # what a batch must hold
    usual_settings = True  # settings mean what conf/model/custom.yaml says, so they are checked
    one_graph = True  # torch.compile finds no graph break in a block
    plan = Plan(
        blocks="blocks",
        tensor={
            "embedding.tokens": "vocabulary",
            "embedding*": "replicated",
            "position*": "replicated",
            "blocks.*.attention.[qkv]": "columns",
            "blocks.*.attention.[qk]_norm": "heads",
            "blocks.*.attention.o": "rows",
            "blocks.*.mlp.gate": "columns",
            "blocks.*.mlp.up": "columns",
            "blocks.*.mlp.down": "rows",
            "blocks.*.attention_norm": "sequence",
            "blocks.*.mlp_norm": "sequence",
            "norm": "sequence",
            "norm.dense": "sequence",
            "norm.norm": "sequence",
            "head": "vocabulary",
        },
        gather=("blocks.*.attention", "blocks.*.mlp"),
        embed=("embedding", "position.table"),
        head=("norm", "head"),
        attention="blocks.*.attention.attend",
        mask="make_mask",
        per_head=("position",),
        divides=("n_heads", "n_kv_heads"),
    )

    def __init__(
        self,
        vocab_size: int,
        n_layers: int,
        n_heads: int,
        d_model: int,
        context_length: int,
        n_kv_heads: int | None = None,
        d_ff: int | None = None,
        causal: bool = True,
        window: int | None = None,
        attention: Attend = attend_auto,
        position: Callable[..., Position] = Rotary,
        norm: Literal["rms", "layer"] = "rms",
        norm_position: Literal["pre", "post"] = "pre",
        activation: Literal["gelu", "gelu_tanh", "relu2", "swiglu"] = "gelu",
        bias: bool = False,
        qk_norm: bool = True,
        dropout: float = 0.0,
        tie_embeddings: bool = True,
        embedding_norm: bool = False,
        token_types: int = 0,
        init_std: float = 0.02,
        zero_init: bool = False,
        head_dim: int | None = None,
        norm_eps: float | None = None,
        attention_bias: bool | None = None,
        head: bool = True,
        head_bias: bool = False,
        head_transform: bool = False,
        outputs: int | None = None,
        seed: int = 0,
    ):
        super().__init__()
        if head_transform and (norm_position == "pre" or not head or activation not in ("gelu", "gelu_tanh")):
            raise ValueError("head_transform is BERT's: it takes norm_position='post', a head, and activation 'gelu' or 'gelu_tanh'")
        n_kv_heads = n_kv_heads or n_heads
        head_dim = _head_size(d_model, n_heads, n_kv_heads, head_dim)
        self.vocab_size, self.d_model, self.n_layers, self.n_heads, self.n_kv_heads = vocab_size, d_model, n_layers, n_heads, n_kv_heads
        self.context_length, self.causal, self.window = context_length, causal, window
        self.tie_embeddings, self.init_std, self.zero_init = tie_embeddings and head, init_std, zero_init
        new_norm = partial(make_norm, norm, d_model, bias, norm_eps)

        self.embedding = Embedding(vocab_size, d_model, token_types, new_norm() if embedding_norm else None)
        self.position = position(d_model=d_model, n_heads=n_heads, head_dim=head_dim, context_length=context_length)
        options = dict(attend=attention, keys=self.position.uses_keys, qk_norm=qk_norm, dropout=dropout, head_dim=head_dim)
        attention_bias, d_ff = bias if attention_bias is None else attention_bias, d_ff or feed_forward_width(d_model, activation)
        new_attention = partial(Attention, d_model, n_heads, n_kv_heads, bias=attention_bias, **options)
        self.blocks = nn.ModuleList(
            Block(new_attention(layer), FeedForward(d_model, d_ff, activation, bias), norm, norm_position, dropout, d_model, bias, norm_eps)
            for layer in range(n_layers)
        )
        # Post-norm blocks already end with a norm.
        self.norm = HeadTransform(d_model, activation, new_norm()) if head_transform else new_norm() if norm_position == "pre" else None
        if outputs is not None and tie_embeddings:
            raise ValueError(f"outputs={outputs} asks for a head of its own, and tie_embeddings=True for the embedding's matrix")
        self.head = Head(d_model, outputs or vocab_size, bias=head_bias) if head else None
        self.tie_weights()
        if not self.embedding.tokens.weight.is_meta:
            self.initialise(seed)

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        token_types_BT: Tensor | None = None,
        cache: KeyValueCache | None = None,
        length: int | None = None,
        targets_BT: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, V), or hidden states (B, T, C) without a head; with `targets_BT` (B, T) the summed cross-entropy, a scalar, computed
        without storing all logits (head.py). Targets of −100 are ignored.

        `positions_BT`: default 0, 1, 2, …, continued after the cached tokens. `documents_BT`: any integers; a token attends to its own document
        only, which keeps packed texts apart, and padding is masked by giving it a number of its own. `length`: T where the second dimension
        of the input is not (images).
        """
        T, natural = length or tokens_BT.shape[1], positions_BT is None and cache is None
        if positions_BT is None:
            start = cache.length if cache is not None else 0
            positions_BT = torch.arange(start, start + T, device=tokens_BT.device)[None]
        mask, tables = self.make_mask(positions_BT, documents_BT, natural, cache), self.position.tables(positions_BT)

        x_BTC = self.embedding(tokens_BT, token_types_BT, self.position, positions_BT)
        mask, bias = self._add_scores(mask, x_BTC, cache)
        for block in self.blocks:
            x_BTC = block(x_BTC, mask, self.position, tables, bias, cache)
        if cache is not None:
            cache.advance(positions_BT, documents_BT)
        if self.norm is not None:
            x_BTC = self.norm(x_BTC)
        if self.head is None:
            return x_BTC
        return self.head(x_BTC) if targets_BT is None else self.head(x_BTC, targets=targets_BT)

    def make_mask(self, positions_BT: Tensor, documents_BT: Tensor | None, natural: bool, cache: KeyValueCache | None) -> Mask:
        """The mask over these tokens and the cached ones. Context parallelism wraps this method to add the keys of all ranks."""
        k_positions_BS, k_documents_BS = positions_BT, documents_BT
        if cache is not None:
            k_positions_BS, k_documents_BS = cache.seen_positions(positions_BT), cache.seen_documents(documents_BT)
        return Mask(self.causal, self.window, positions_BT, k_positions_BS, natural, documents_BT, k_documents_BS)

    def _add_scores(self, mask: Mask, x_BTC: Tensor, cache: KeyValueCache | None) -> tuple[Mask, Tensor | None]:
        """(mask, bias) for all layers: a block mask with ALiBi slopes where the kernel is flex, else the bias tensor of the positional encoding."""
        layer: Any = next((block.attention for block in self.blocks if isinstance(block, Block)), None)  # a pipeline stage may lack the first blocks
        slopes_H = None if self.position.has_own_bias else self.position.slopes(x_BTC.device)
        fits = cache is None and not (layer is not None and layer.dropout and self.training)
        if layer is not None and fits and needs_block_mask(layer.attend, mask, slopes_H, x_BTC, layer.head_dim):
            mask = mask.with_blocks(slopes_H)
            if not self.position.has_own_bias:
                return mask, None
        return mask, self.position.bias(mask.q_positions_BT, mask.k_positions_BS)

    def tie_weights(self) -> None:
        """Makes embedding and head one matrix (Press & Wolf 2017) if `tie_embeddings` is set."""
        if self.tie_embeddings and self.head is not None:
            self.head.weight = self.embedding.tokens.weight

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Initialises every parameter in place. The same seed gives the same weights in every layout."""
        for name, parameter in self.named_parameters():
            shape = parameter.shape
            fill_part(parameter, [slice(None)] * len(shape), shape, partial(self.initial_value, name, shape, seed))

    def initial_value(self, name: str, shape: torch.Size, seed: int, part: Sequence[slice] | None = None) -> Tensor:
        """The initial value of the parameter `name` with the full `shape`, or the slices `part` of it. It depends on (seed, name) only, not on
        creation order or layout. An override may omit the argument `part`; each rank then draws full parameters.

        Gains start at 1, biases at 0, embeddings at N(0, `init_std`²), matrices at N(0, 1/fan_in). The two matrices of a block that write to the
        residual stream are divided by √(2·layers), so that its variance does not grow with depth (Radford et al. 2019), or start at 0 with
        `zero_init`: every block is then the identity at first (Zhang et al. 2019), which lowered the loss on Shakespeare by 0.04 after 300 steps.
        """
        size = sizes(shape, part)
        if len(shape) == 1:
            return torch.zeros(size) if name.endswith("bias") else torch.ones(size)
        writes_to_residual = name.endswith(("attention.o.weight", "mlp.down.weight"))
        if name.endswith("lora_B") or (writes_to_residual and self.zero_init):
            return torch.zeros(size)
        std = self.init_std if name.startswith(("embedding", "position", "head")) else 1 / math.sqrt(shape[1])
        if writes_to_residual:
            std /= math.sqrt(2 * self.n_layers)
        return normal(shape, std, f"{seed}/{name}", part)


def _head_size(d_model: int, n_heads: int, n_kv_heads: int, head_dim: int | None) -> int:
    if d_model % n_heads and head_dim is None:
        raise ValueError(f"d_model={d_model} must be divisible by n_heads={n_heads}")
    if n_heads % n_kv_heads:
        raise ValueError(f"n_heads={n_heads} must be divisible by n_kv_heads={n_kv_heads}")
    return head_dim or d_model // n_heads
