"""Sampling from a decoder, one token at a time. Shapes: B batch, T time, V vocabulary."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from .cache import KeyValueCache


def filter_logits(logits_BV: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Logits / temperature, with −∞ outside the `top_k` likeliest tokens and outside the nucleus `top_p` (Holtzman et al. 2020: the smallest
    set of tokens whose probabilities sum to at least top_p). The likeliest token is always kept."""
    logits_BV = logits_BV.float() / temperature
    if top_k is not None:
        kth_B1 = logits_BV.topk(min(top_k, logits_BV.shape[-1]), dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, float("-inf"))
    if top_p is not None:
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
        probability_BV = sorted_BV.softmax(dim=-1)
        outside_BV = probability_BV.cumsum(dim=-1) - probability_BV >= top_p  # the mass before this token already suffices
        outside_BV[:, 0] = False
        logits_BV = logits_BV.masked_fill(torch.zeros_like(outside_BV).scatter(-1, order_BV, outside_BV), float("-inf"))
    return logits_BV


def supports_kv_cache(model: Any) -> bool:
    """Whether `generate` can sample from the model: its forward takes a `cache`, and it has a `context_length`."""
    return hasattr(model, "context_length") and "cache" in inspect.signature(model.forward).parameters


@torch.no_grad()
def generate(
    model: Any,
    prompt_BT: Tensor,
    max_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    use_cache: bool = True,
) -> Tensor:
    """Continues text with `model`, a Transformer or another that `supports_kv_cache` accepts.

    Returns the prompt followed by `max_tokens` sampled tokens, (B, T + max_tokens). `temperature=0` is greedy decoding. Dropout is disabled.

    When the context is full, generation continues from its second half with positions starting at 0 again, so no position exceeds the trained
    range. Raises ValueError for an empty prompt.
    """
    if prompt_BT.shape[1] == 0:
        raise ValueError("the prompt is empty: generation needs at least one token to continue from")
    generator = torch.Generator(device=prompt_BT.device).manual_seed(seed)
    was_training = model.training
    model.eval()
    tokens_BT, window_BT, cache = prompt_BT, prompt_BT[:, -model.context_length :], None
    for _ in range(max_tokens):
        if window_BT.shape[1] > model.context_length:
            window_BT, cache = window_BT[:, -(model.context_length // 2 or 1) :], None
        if not use_cache:
            logits_BTV = model(window_BT)
        elif cache is None:
            cache = model.make_cache() if hasattr(model, "make_cache") else KeyValueCache(model.context_length)
            logits_BTV = model(window_BT, cache=cache)
        else:
            logits_BTV = model(window_BT[:, -1:], cache=cache)
        logits_BV = logits_BTV[:, -1]
        if temperature == 0:
            next_B1 = logits_BV.argmax(dim=-1, keepdim=True)
        else:
            probability_BV = filter_logits(logits_BV, temperature, top_k, top_p).softmax(dim=-1)
            next_B1 = torch.multinomial(probability_BV, 1, generator=generator)
        tokens_BT, window_BT = torch.cat((tokens_BT, next_B1), dim=1), torch.cat((window_BT, next_B1), dim=1)
    model.train(was_training)
    return tokens_BT
