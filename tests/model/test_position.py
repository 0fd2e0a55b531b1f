"""Each positional encoding against a formula written independently of it, and what each promises about order and length."""

import math

import pytest
import torch

from meshformer.model import Alibi, Learned, NoPosition, PositionalAttention, Rotary, Sinusoidal, Transformer

KINDS = {
    "sinusoidal": Sinusoidal,
    "learned": Learned,
    "rotary": Rotary,
    "alibi": Alibi,
    "positional_attention": PositionalAttention,
    "none": NoPosition,
}
C, H, D, T = 16, 4, 4, 10
POSITIONS = torch.arange(T)[None]


def make(kind: str, **options):
    return KINDS[kind](d_model=C, n_heads=H, head_dim=D, context_length=T, **options)


def test_sinusoidal_is_vaswani_section_3_5() -> None:
    encoding = make("sinusoidal").embed(torch.zeros(1, T, C), POSITIONS)[0]
    for i in range(T):
        for j in range(C // 2):
            angle = i / 10000 ** (2 * j / C)
            assert encoding[i, 2 * j] == pytest.approx(math.sin(angle), abs=1e-6)
            assert encoding[i, 2 * j + 1] == pytest.approx(math.cos(angle), abs=1e-6)


def test_sine_only_form() -> None:
    encoding = make("sinusoidal", sine_only=True).embed(torch.zeros(1, T, C), POSITIONS)[0]
    for i in range(T):
        for j in range(C):
            assert encoding[i, j] == pytest.approx(math.sin(i / 10000 ** (2 * j / C)), abs=1e-6)


def test_learned_adds_row_i_of_its_table() -> None:
    position = make("learned")
    x = torch.randn(2, T, C)
    torch.testing.assert_close(position.embed(x, POSITIONS), x + position.table.weight[None])


def test_rotary_rotates_pairs_as_complex_numbers() -> None:
    position = make("rotary")
    q = torch.randn(2, H, T, D)
    rotated, _ = position.encode(q, q, q, position.tables(POSITIONS))
    as_complex = torch.complex(q[..., : D // 2], q[..., D // 2 :])
    theta = 10000.0 ** (-2 * torch.arange(D // 2) / D)
    expected = as_complex * torch.exp(1j * torch.arange(T)[:, None] * theta)
    torch.testing.assert_close(rotated, torch.cat((expected.real, expected.imag), dim=-1), atol=1e-6, rtol=1e-5)


def test_rotary_scores_depend_on_distance_alone() -> None:
    position = make("rotary")
    q, k = torch.randn(1, H, 1, D).expand(1, H, T, D), torch.randn(1, H, 1, D).expand(1, H, T, D)
    q, k = position.encode(q, k, k, position.tables(POSITIONS))
    scores = q @ k.transpose(-2, -1)
    torch.testing.assert_close(scores[..., 1:, 1:], scores[..., :-1, :-1], atol=1e-5, rtol=1e-4)


def test_rotary_refuses_an_odd_head_size() -> None:
    with pytest.raises(ValueError, match="even"):
        Rotary(d_model=9, n_heads=3, head_dim=3, context_length=4)


def test_alibi_bias_is_minus_slope_times_distance() -> None:
    bias = make("alibi").bias(POSITIONS, POSITIONS)[0]
    for h in range(H):
        slope = 2 ** (-8 * (h + 1) / H)
        for i in range(T):
            for j in range(T):
                assert bias[h, i, j] == pytest.approx(-slope * abs(i - j), abs=1e-6)


def test_positional_attention_is_softmax_of_queries_against_positions() -> None:
    torch.manual_seed(0)
    model = Transformer(11, 1, H, C, T, position=PositionalAttention, qk_norm=False, causal=False, bias=False)
    attention, x = model.blocks[0].attention, torch.randn(1, T, C)
    P = torch.tensor(
        [
            [math.sin(i / 10000 ** (2 * (j // 2) / D)) if j % 2 == 0 else math.cos(i / 10000 ** (2 * (j // 2) / D)) for j in range(D)]
            for i in range(T)
        ]
    )
    q = (x @ attention.q.weight.T).view(1, T, H, D).transpose(1, 2)
    v = (x @ attention.v.weight.T).view(1, T, H, D).transpose(1, 2)
    expected = (torch.softmax(q @ P.T / math.sqrt(D), dim=-1) @ v).transpose(1, 2).reshape(1, T, C) @ attention.o.weight.T
    from meshformer.model import Mask

    out = attention(x, Mask(False, None, POSITIONS, POSITIONS), model.position, model.position.tables(POSITIONS), None)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    assert attention.k is None, "positions replace the keys: no key projection may be left untrained"


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_bidirectional_model_sees_order_only_through_its_encoding(kind: str) -> None:
    torch.manual_seed(0)
    model = Transformer(11, 2, H, C, T, position=KINDS[kind], causal=False)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    tokens = torch.arange(T)[None] % 11
    order = torch.randperm(T, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        out, shuffled = model(tokens)[:, order], model(tokens[:, order])
    blind = torch.allclose(out, shuffled, atol=1e-5)
    assert blind == (kind == "none")
