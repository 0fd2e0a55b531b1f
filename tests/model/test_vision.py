"""Images as patches, and the options that pretrained models need."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from meshformer.model import Learned, NoPosition, Transformer, VisionTransformer, parameter_count


def vision(**options) -> VisionTransformer:
    return VisionTransformer(**(dict(image_size=8, patch_size=4, n_layers=2, n_heads=2, d_model=16, colours=3, classes=5) | options)).eval()


def images(batch: int = 2, colours: int = 3) -> torch.Tensor:
    return torch.randn(batch, 8, 8, colours, generator=torch.Generator().manual_seed(0))


def test_patches_times_a_matrix_are_a_convolution() -> None:
    model, x = vision(pooling="mean", position=NoPosition), images()
    kernel = model.embedding.patches.weight.view(16, 3, 4, 4)
    expected = F.conv2d(x.permute(0, 3, 1, 2), kernel, model.embedding.patches.bias, stride=4).flatten(2).transpose(1, 2)
    found = model.embedding(x, None, model.position, torch.arange(4)[None])
    torch.testing.assert_close(found, expected)


def test_logits_and_features_are_those_of_the_pooled_states() -> None:
    for pooling in ("cls", "mean"):
        model, features = vision(pooling=pooling), vision(pooling=pooling, classes=None)
        features.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("head")})
        assert features(images()).shape == (2, 16)
        torch.testing.assert_close(model.head(features(images())), model(images()))


def test_gray_images_need_no_colour_dim() -> None:
    model, x = vision(colours=1), images(colours=1)
    torch.testing.assert_close(model(x[..., 0]), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(2, 8, 12, 3), (2, 4, 4, 3), (2, 8, 8, 1), (2, 8, 8)])
def test_images_of_another_size_are_refused_with_both_sizes(shape) -> None:
    with pytest.raises(ValueError, match="the model was made for 8 × 8 pixels of 3 colours"):
        vision()(torch.zeros(shape))


def test_a_patch_that_does_not_divide_the_image_is_refused() -> None:
    with pytest.raises(ValueError, match="image_size=8 must be divisible by patch_size=3"):
        vision(patch_size=3)


def test_the_same_seed_gives_the_same_vision_model() -> None:
    same = [vision(seed=3).state_dict(), vision(seed=3).state_dict()]
    assert all(torch.equal(same[0][k], same[1][k]) for k in same[0])
    assert not torch.equal(vision(seed=4).embedding.class_token, same[0]["embedding.class_token"])


BASE = dict(vocab_size=17, n_layers=1, n_heads=4, d_model=32, context_length=8)


def test_a_model_without_a_head_returns_the_states_that_a_head_would_read() -> None:
    with_head = Transformer(**BASE, causal=False, position=Learned).eval()
    without = Transformer(**BASE, causal=False, position=Learned, head=False).eval()
    tokens = torch.arange(8)[None]
    torch.testing.assert_close(with_head.head(without(tokens)), with_head(tokens))
    assert parameter_count(without) == parameter_count(with_head), "the head was tied"


def test_options_of_pretrained_models_change_what_they_say() -> None:
    heads = Transformer(**BASE, head_dim=6, n_kv_heads=2).blocks[0].attention
    assert heads.q.weight.shape == (24, 32) and heads.k.weight.shape == (12, 32) and heads.o.weight.shape == (32, 24)
    mixed = Transformer(**BASE, bias=False, attention_bias=True, norm_eps=0.25)
    assert mixed.blocks[0].attention.o.bias is not None and mixed.blocks[0].mlp.up.bias is None
    assert mixed.norm is not None and mixed.norm.eps == mixed.blocks[0].mlp_norm.eps == 0.25
    x = torch.linspace(-3, 3, 32)[None, None]
    mlp, other = (Transformer(**BASE, activation=name).blocks[0].mlp for name in ("gelu", "gelu_tanh"))
    difference = (mlp(x) - other(x)).abs().max()
    assert 1e-6 < difference < 1e-2


def test_the_masked_word_head_needs_a_post_norm_model() -> None:
    with pytest.raises(ValueError, match="head_transform"):
        Transformer(**BASE, head_transform=True)
