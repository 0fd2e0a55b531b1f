"""Attention: the fused kernel is the written-out formula, in value and in gradient, for every kind of mask."""

import math

import pytest
import torch

from meshformer.model import Mask, attend_auto, attend_fused, attend_reference

B, H, T, D = 2, 4, 12, 8


def mask_of(kind: str) -> Mask:
    positions = torch.arange(T)[None]
    packed = torch.tensor([[0] * 5 + [1] * 7, [0] * 9 + [1] * 3])
    padded = torch.tensor([[0] * 12, [0] * 8 + [-1] * 4])
    settings = {
        "causal": dict(causal=True, window=None),
        "bidirectional": dict(causal=False, window=None),
        "window": dict(causal=True, window=3),
        "bidirectional window": dict(causal=False, window=4),
        "packed documents": dict(causal=True, window=None, q_documents_BT=packed, k_documents_BS=packed),
        "padding": dict(causal=False, window=None, q_documents_BT=padded, k_documents_BS=padded),
        "explicit positions": dict(causal=True, window=None, natural=False),
    }[kind]
    return Mask(q_positions_BT=positions, k_positions_BS=positions, **settings)  # pyright: ignore[reportArgumentType]


KINDS = ["causal", "bidirectional", "window", "bidirectional window", "packed documents", "padding", "explicit positions"]


def tensors(kv_heads: int = H) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(B, heads, T, D, requires_grad=True) for heads in (H, kv_heads, kv_heads)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("bias", [False, True])
def test_fused_attention_equals_the_written_out_formula(kind: str, kv_heads: int, bias: bool) -> None:
    added = -torch.rand(1, H, T, T) if bias else None
    results = []
    for attend in (attend_reference, attend_fused):
        qkv = tensors(kv_heads)
        out = attend(*qkv, mask_of(kind), added)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        results.append([out.detach(), *(t.grad for t in qkv)])
    for reference, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, reference, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_reference_attention_equals_the_formula_in_loops(kind: str) -> None:
    q, k, v = (t.detach() for t in tensors())
    mask, out = mask_of(kind), torch.zeros(B, H, T, D)
    for b in range(B):
        for t in range(T):
            seen = [s for s in range(T) if visible(mask, b, t, s)]
            for h in range(H):
                weights = [math.exp(float(q[b, h, t] @ k[b, h, s]) / math.sqrt(D)) for s in seen]
                out[b, h, t] = sum(w * v[b, h, s] for w, s in zip(weights, seen, strict=True)) / sum(weights)
    torch.testing.assert_close(attend_reference(q, k, v, mask), out, atol=1e-5, rtol=1e-5)


def visible(mask: Mask, b: int, t: int, s: int) -> bool:
    documents = mask.q_documents_BT
    return (
        (not mask.causal or s <= t)
        and (mask.window is None or abs(s - t) < mask.window)
        and (documents is None or bool(documents[b, t] == documents[b, s]))
    )


def test_auto_picks_one_of_the_two() -> None:
    q, k, v = tensors()
    torch.testing.assert_close(attend_auto(q, k, v, mask_of("causal")), attend_reference(q, k, v, mask_of("causal")))


def test_dropout_drops_attention_weights_and_keeps_their_mean() -> None:
    torch.manual_seed(1)
    q, k = torch.zeros(1, 1, 64, 8), torch.zeros(1, 1, 64, 8)
    v = torch.ones(1, 1, 64, 8)
    mask = Mask(False, None, torch.arange(64)[None], torch.arange(64)[None])
    for attend in (attend_reference, attend_fused):
        out = torch.stack([attend(q, k, v, mask, None, 0.5).mean() for _ in range(50)])
        assert out.std() > 0.001
        assert abs(out.mean() - 1) < 0.02
