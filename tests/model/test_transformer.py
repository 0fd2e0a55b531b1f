"""The whole model: causality, packing, caching, initialisation, counts; for every encoding and the main options."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from meshformer.model import (
    Alibi,
    KeyValueCache,
    Learned,
    NoPosition,
    PositionalAttention,
    Rotary,
    Sinusoidal,
    Transformer,
    attend_fused,
    attend_reference,
    filter_logits,
    generate,
    parameter_count,
    training_flops_per_token,
)  # fmt: skip

POSITIONS = [Sinusoidal, Learned, Rotary, Alibi, PositionalAttention, NoPosition]
V, T = 17, 12


def model_with(**options) -> Transformer:
    settings = dict(vocab_size=V, n_layers=2, n_heads=4, d_model=32, context_length=T) | options
    return Transformer(**settings).eval()  # pyright: ignore[reportArgumentType]


def tokens(batch: int = 2, length: int = T) -> torch.Tensor:
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(0))


OPTIONS = [
    {}, {"n_kv_heads": 2}, {"norm": "layer", "bias": True, "activation": "gelu"}, {"activation": "swiglu"}, {"activation": "relu2"}, {"window": 4},
    {"norm_position": "post"}, {"tie_embeddings": False, "qk_norm": False}, {"embedding_norm": True, "token_types": 2},
    {"attention": attend_reference},
]  # fmt: skip


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("options", OPTIONS)
def test_no_future_token_changes_a_past_logit(position, options) -> None:
    model, x = model_with(position=position, **options), tokens()
    with torch.no_grad():
        before = model(x)
        for cut in (1, 5, T - 1):
            y = x.clone()
            y[:, cut:] = (y[:, cut:] + 1) % V
            after = model(y)
            torch.testing.assert_close(after[:, :cut], before[:, :cut], atol=0, rtol=0)
            assert not torch.allclose(after[:, cut:], before[:, cut:])


def test_an_encoder_sees_the_future() -> None:
    model, x = model_with(causal=False), tokens()
    y = x.clone()
    y[:, -1] = (y[:, -1] + 1) % V
    assert not torch.allclose(model(x)[:, 0], model(y)[:, 0])


def test_a_window_of_w_layers_l_reaches_back_w_minus_1_times_l() -> None:
    model, x = model_with(window=3, n_layers=2), tokens()
    last = model(x)[:, -1]
    reach = 2 * (3 - 1)
    for distance in range(1, T):
        y = x.clone()
        y[:, -1 - distance] = (y[:, -1 - distance] + 1) % V
        assert torch.equal(model(y)[:, -1], last) == (distance > reach)


@pytest.mark.parametrize("position", POSITIONS)
def test_packed_documents_equal_separate_ones(position) -> None:
    model, x = model_with(position=position), tokens(1)
    first, second = x[:, :5], x[:, 5:]
    documents = torch.tensor([[0] * 5 + [1] * (T - 5)])
    positions = torch.tensor([[*range(5), *range(T - 5)]])
    with torch.no_grad():
        packed = model(x, positions_BT=positions, documents_BT=documents)
        torch.testing.assert_close(packed[:, :5], model(first), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(packed[:, 5:], model(second), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", [attend_reference, attend_fused])
def test_padding_changes_no_real_token_of_an_encoder(attention) -> None:
    model, x = model_with(causal=False, attention=attention), tokens(1, 8)
    padded = torch.cat((x, torch.zeros(1, 4, dtype=torch.long)), dim=1)
    documents = torch.tensor([[0] * 8 + [-1] * 4])
    with torch.no_grad():
        torch.testing.assert_close(model(padded, documents_BT=documents)[:, :8], model(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("options", [{}, {"n_kv_heads": 2}, {"window": 4}])
def test_cached_logits_equal_uncached_ones(position, options) -> None:
    model, x = model_with(position=position, **options), tokens()
    cache = KeyValueCache(T)
    with torch.no_grad():
        pieces = [model(x[:, a:b], cache=cache) for a, b in ((0, 4), (4, 5), (5, 9), (9, T))]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(x), atol=1e-5, rtol=1e-4)


def test_a_full_cache_says_so() -> None:
    with pytest.raises(ValueError, match="holds 3 tokens"):
        model_with()(tokens(), cache=KeyValueCache(3))


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 0.9}, {"top_k": 3}, {"top_p": 0.7}])
def test_generation_is_the_same_with_and_without_cache_and_repeats_by_seed(settings) -> None:
    model, prompt = model_with(), tokens(2, 3)
    cached = generate(model, prompt, 20, seed=1, **settings)  # 3 + 20 tokens overrun the context of 12: the window moves
    assert torch.equal(cached, generate(model, prompt, 20, seed=1, use_cache=False, **settings))
    assert torch.equal(cached[:, :3], prompt)
    assert cached.shape == (2, 23)
    if settings.get("temperature") != 0:
        assert not torch.equal(cached, generate(model, prompt, 20, seed=2, **settings))


def test_top_k_and_top_p_keep_the_likeliest() -> None:
    logits = torch.tensor([[math.log(p) for p in (0.5, 0.25, 0.15, 0.1)]])
    kept = lambda **k: torch.isfinite(filter_logits(logits, **k))[0].tolist()  # noqa: E731
    assert kept(top_k=2) == [True, True, False, False]
    assert kept(top_p=0.5) == [True, False, False, False]
    assert kept(top_p=0.51) == [True, True, False, False]
    assert kept(top_p=0.0001) == [True, False, False, False]
    torch.testing.assert_close(filter_logits(logits, temperature=2.0), logits / 2)


def test_every_parameter_is_a_function_of_seed_and_name() -> None:
    small, deep = model_with(n_layers=1, seed=3), model_with(n_layers=1, seed=3, tie_embeddings=False)
    for name, p in small.named_parameters():
        assert torch.equal(p, dict(deep.named_parameters())[name]), name
    other = model_with(n_layers=1, seed=4)
    assert not torch.equal(small.blocks[0].attention.q.weight, other.blocks[0].attention.q.weight)
    torch.manual_seed(99)  # the global generator plays no part
    assert torch.equal(model_with(n_layers=1, seed=3).head.weight, small.head.weight)


def test_meta_construction_then_initialise_equals_direct_construction() -> None:
    with torch.device("meta"):
        model = model_with(seed=5)
    model.to_empty(device="cpu")
    model.tie_weights()
    model.initialise(5)
    torch.testing.assert_close(model(tokens()), model_with(seed=5)(tokens()), atol=0, rtol=0)


def test_tied_embeddings_are_one_parameter() -> None:
    tied, untied = model_with(), model_with(tie_embeddings=False)
    assert tied.head.weight is tied.embedding.tokens.weight
    assert parameter_count(untied) - parameter_count(tied) == V * 32


def test_parameter_count_by_hand() -> None:
    model = model_with(position=Learned, qk_norm=False)
    C = 32
    by_hand = V * C + T * C + 2 * (4 * C * C + 2 * C * 4 * C + 2 * C) + C
    assert parameter_count(model) == by_hand
    assert parameter_count(model, embeddings=False) == by_hand - V * C - T * C


@pytest.mark.parametrize(
    "options", [{}, {"n_kv_heads": 2}, {"activation": "swiglu"}, {"tie_embeddings": False}, {"position": PositionalAttention}]
)
def test_training_flops_equal_the_flop_counter(options) -> None:
    model, x = model_with(attention=attend_reference, **options).train(), tokens()
    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
    assert counter.get_total_flops() == training_flops_per_token(model, T) * x.numel()


@pytest.mark.parametrize(
    ("options", "words"),
    [({"n_heads": 5}, "divisible"), ({"n_kv_heads": 3}, "divisible"), ({"norm": "rsm"}, "rms"), ({"activation": "glu"}, "swiglu")],
)
def test_impossible_shapes_are_named(options, words) -> None:
    with pytest.raises(ValueError, match=words):
        model_with(**options)


def test_the_device_context_does_not_change_the_first_weights():
    settings = dict(vocab_size=20, n_layers=1, n_heads=2, d_model=16, context_length=8)
    with torch.device("cpu"):
        inside = Transformer(**settings)
    assert all(torch.equal(a, b) for a, b in zip(inside.parameters(), Transformer(**settings).parameters(), strict=True))
    assert inside.initial_value("blocks.0.mlp.up.weight", torch.Size((4, 4)), 0).device.type == "cpu"
    with torch.device("meta"):  # a default device other than the CPU, as torch.device("cuda") is
        assert inside.initial_value("blocks.0.mlp.up.weight", torch.Size((4, 4)), 0).device.type == "cpu"
