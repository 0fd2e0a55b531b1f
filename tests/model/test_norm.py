"""Norms: ours is torch's, in value and in gradient, and stays finite where there is nothing to normalise."""

import pytest
import torch
from torch import nn

from meshformer.model import RMSNorm, Transformer, cast_once
from meshformer.model.norm import make_norm


@pytest.mark.parametrize("bias", [False, True])
def test_layer_norm_takes_a_gain_of_less_precision_than_its_input(bias: bool):
    torch.manual_seed(0)
    x, norm, wide = torch.randn(3, 5, 8), make_norm("layer", 8, bias), nn.LayerNorm(8, bias=bias)
    for p, q in zip(norm.parameters(), wide.parameters(), strict=True):
        q.data.copy_(p.data.normal_().bfloat16())
    assert torch.equal(norm.bfloat16()(x), wide(x))
    assert norm(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("eps", [None, 1e-6, 0.1])
def test_rms_norm_is_the_formula(dtype: torch.dtype, tolerance: float, eps: float | None):
    torch.manual_seed(0)
    gain = torch.randn(8)
    own, ours = torch.randn(3, 5, 8, dtype=torch.float64).to(dtype), RMSNorm(8, eps=eps)
    x, y = own.clone().requires_grad_(True), own.double().requires_grad_(True)
    ours.weight.data.copy_(gain)
    weight = gain.double().requires_grad_(True)
    expected = y / (y.pow(2).mean(-1, keepdim=True) + (eps or torch.finfo(torch.promote_types(dtype, torch.float32)).eps)).sqrt() * weight
    found = ours(x)
    assert found.dtype == dtype
    upstream = torch.randn_like(expected)
    expected.backward(upstream)
    found.backward(upstream.to(dtype))
    assert x.grad is not None and y.grad is not None and weight.grad is not None and ours.weight.grad is not None
    for a, b in ((found, expected), (x.grad, y.grad), (ours.weight.grad, weight.grad)):
        assert torch.allclose(a.double(), b, atol=tolerance * b.abs().max().item(), rtol=0)


def test_layer_norms_kernel_has_the_gradient_of_the_formula(monkeypatch: pytest.MonkeyPatch):
    norm = RMSNorm(8, eps=1e-3).double()
    norm.weight.data.normal_()
    x = torch.randn(4, 3, 8, dtype=torch.float64).transpose(0, 1).requires_grad_(True)  # not contiguous, as queries are
    assert torch.autograd.gradcheck(norm, (x,))
    found = torch.autograd.grad(norm(x).sin().sum(), (x, norm.weight))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for a, b in zip(found, torch.autograd.grad(norm(x).sin().sum(), (x, norm.weight)), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("gain", "x"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)])
def test_gradients_have_the_types_of_what_they_belong_to(gain: torch.dtype, x: torch.dtype):
    norm, given = RMSNorm(8).to(gain), torch.randn(2, 8, dtype=x, requires_grad=True)
    norm(given).sum().backward()
    assert norm.weight.grad is not None and norm.weight.grad.dtype == gain
    assert given.grad is not None and given.grad.dtype == x


def test_a_row_of_zeros_has_a_finite_norm_and_gradient():
    x = torch.zeros(2, 8, requires_grad=True)
    out = RMSNorm(8)(x)
    out.sum().backward()
    assert (out == 0).all() and x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("settings", [((8,), {}), ((8,), {"eps": 0.1}), ((5, 8), {}), ((8,), {"elementwise_affine": False})])
def test_ours_is_torchs(settings):
    shape, more = settings
    x = torch.randn(3, 5, 8)
    assert torch.allclose(RMSNorm(shape, **more)(x), nn.RMSNorm(shape, **more)(x), atol=1e-6)


def test_a_model_runs_without_numbers():
    with torch.device("meta"):
        assert Transformer(8, 1, 2, 16, 4)(torch.zeros(2, 4, dtype=torch.long)).shape == (2, 4, 8)


def test_kinds_and_their_eps():
    assert isinstance(make_norm("rms", 4, bias=False), nn.RMSNorm)
    assert make_norm("layer", 4, bias=True).eps == 1e-5 and make_norm("rms", 4, bias=True, eps=0.5).eps == 0.5
    with pytest.raises(ValueError, match="batch"):
        make_norm("batch", 4, bias=False)


def test_autocast_casts_an_input_once():
    x = torch.randn(2, 4)
    assert cast_once(x) is x
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cast_once(x).dtype == torch.bfloat16
        assert cast_once(cast_once(x)) is not None and cast_once(x.bfloat16()).dtype == torch.bfloat16
