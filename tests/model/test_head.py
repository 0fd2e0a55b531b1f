"""The head's own loss is that of its logits, and never holds them all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from harness import run_ranks
from meshformer.model import Head, Transformer, head, head_loss
from meshformer.parallel.tensor import all_reduce_over

N, C, V = 96, 16, 61


def parts(bias: bool = False, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Head, Tensor]:
    torch.manual_seed(0)
    layer = Head(C, V, bias=bias, dtype=dtype)
    targets = torch.randint(V, (4, N // 4))
    targets[:, ::5] = -100
    return torch.randn(4, N // 4, C, dtype=dtype, requires_grad=True), layer, targets


def plain(layer: Head, x: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(layer(x).flatten(0, 1).float(), targets.flatten(), reduction="sum")


def gradients(loss: Tensor, x: Tensor, layer: Head) -> list[Tensor]:
    return list(torch.autograd.grad(loss * 0.25, [x, *layer.parameters()]))


@pytest.mark.parametrize("rows", [1, 16, 32, 128])  # 96 are no multiple of 128
@pytest.mark.parametrize("bias", [False, True])
def test_loss_and_gradients_are_those_of_the_logits(bias: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "AT_ONCE", rows * V)
    x, layer, targets = parts(bias)
    ours, theirs = layer(x, targets), plain(layer, x, targets)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    for mine, other in zip(gradients(ours, x, layer), gradients(theirs, x, layer), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["autocast", "bf16"])
def test_in_bf16_the_loss_is_summed_in_fp32(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "AT_ONCE", 32 * V)
    x, layer, targets = parts(dtype=torch.bfloat16 if kind == "bf16" else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        ours, theirs = layer(x, targets), plain(layer, x, targets)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    for mine, other in zip(gradients(ours, x, layer), gradients(theirs, x, layer), strict=True):
        assert mine.dtype == other.dtype and (mine - other).norm() < 0.004 * other.norm()


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch 2.13 has it")
def test_torchs_own_says_the_same() -> None:
    x, layer, targets = parts()
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=32)
    theirs = F.linear_cross_entropy(x.flatten(0, 1), layer.weight, targets.flatten(), reduction="sum", options=options)
    ours = layer(x, targets)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    for mine, other in zip(gradients(ours, x, layer), gradients(theirs, x, layer), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_the_compiled_form_says_the_same() -> None:
    logits, targets = torch.randn(8, V), torch.randint(V, (8,))
    eager, compiled = (terms(logits.clone(), targets, -100, None, 0) for terms in (head._terms, torch.compile(head._terms, backend="aot_eager")))
    for mine, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(mine, other)


class Largest(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numbers = max(self.numbers, *(x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor)), 0)
        return out


def test_no_tensor_is_as_large_as_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "AT_ONCE", 16 * V)
    x, layer, targets = parts()
    with Largest() as seen:
        layer(x, targets).backward()
    assert seen.numbers == N * C < N * V // 3  # the hidden states
    with Largest() as seen:
        plain(layer, x, targets).backward()
    assert seen.numbers == N * V


def test_nothing_but_the_loss_is_computed_where_no_gradient_is_wanted() -> None:
    x, layer, targets = parts()
    with torch.no_grad():
        torch.testing.assert_close(layer(x, targets), plain(layer, x, targets), rtol=1e-6, atol=0)
    layer.requires_grad_(False)
    (gradient,) = torch.autograd.grad(layer(x, targets), x)
    torch.testing.assert_close(gradient, torch.autograd.grad(plain(layer, x, targets), x)[0])


def test_ignored_targets_alone_give_nothing_whatever_the_logits() -> None:
    x, layer, targets = parts()
    loss = layer(x * float("inf"), torch.full_like(targets, -100))
    assert loss.item() == 0


def test_it_has_one_backward_pass() -> None:
    x, layer, targets = parts()
    loss = layer(x, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="no second backward pass"):
        loss.backward()


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_given_targets_returns_their_loss(tied: bool) -> None:
    model = Transformer(V, 1, 2, C, 8, tie_embeddings=tied)
    tokens, targets = torch.randint(V, (2, 8)), torch.randint(V, (2, 8))
    ours, theirs = model(tokens, targets_BT=targets), F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    names, parameters = zip(*model.named_parameters(), strict=True)
    for name, mine, other in zip(names, *(torch.autograd.grad(loss, parameters) for loss in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def cut_vocabulary(size: int) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    x, layer, targets = parts(bias=True)
    expected_loss = plain(layer, x, targets)
    expected = gradients(expected_loss, x, layer)
    width = -(-V // size)
    weight, bias = (p.detach()[rank * width : (rank + 1) * width].clone().requires_grad_() for p in (layer.weight, layer.bias))
    loss = head_loss(x, weight, bias, targets, combine=all_reduce_over(torch.distributed.group.WORLD), start=rank * width, widest=width)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    of_x, of_weight, of_bias = torch.autograd.grad(loss * 0.25, [x, weight, bias])
    torch.distributed.all_reduce(of_x)
    for mine, other in zip((of_x, of_weight, of_bias), (expected[0], *(p[rank * width : (rank + 1) * width] for p in expected[1:])), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [2, 4])
def test_a_vocabulary_cut_over_ranks_gives_the_same_loss(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Parts of 31 and 30, or of 16 and 13: all must take stretches of one length.
    monkeypatch.setattr(head, "AT_ONCE", 31 * 16 if size == 2 else 16 * 16)
    run_ranks(size, cut_vocabulary, size)
