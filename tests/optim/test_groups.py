import pytest
import torch
from torch import nn

from meshformer.config.errors import ConfigError
from meshformer.optim import adamw, decay_groups, sgd, split_matrices


def network() -> nn.Module:
    """The names of `Transformer`, without its code."""
    block = lambda: nn.ModuleDict(  # noqa: E731
        {
            "attention_norm": nn.LayerNorm(8),
            "attention": nn.ModuleDict({name: nn.Linear(8, 8) for name in "qkvo"}),
            "mlp": nn.ModuleDict({"up": nn.Linear(8, 32, bias=False), "down": nn.Linear(32, 8, bias=False)}),
        }
    )
    model = nn.ModuleDict(
        {
            "embedding": nn.ModuleDict({"tokens": nn.Embedding(11, 8), "position": nn.Embedding(16, 8)}),
            "blocks": nn.ModuleList([block(), block()]),
            "norm": nn.RMSNorm(8),
            "head": nn.Linear(8, 11, bias=False),
        }
    )
    model["head"].weight = model["embedding"]["tokens"].weight
    return model


def names(pairs):
    return {name for name, _ in pairs}


def test_decay_is_decided_by_name_and_every_parameter_is_in_one_group():
    model = network()
    decayed, others = decay_groups(model.named_parameters(), 0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert "blocks.0.mlp.up.weight" in names(decayed["params"]) and "embedding.tokens.weight" in names(decayed["params"])
    assert all("norm" in n or n.endswith("bias") or "position" in n for n in names(others["params"]))
    assert {"embedding.position.weight", "norm.weight", "blocks.1.attention.q.bias"} <= names(others["params"])
    everything = [id(p) for group in (decayed, others) for _, p in group["params"]]
    assert sorted(everything) == sorted({id(p) for p in model.parameters()})


def test_a_tied_parameter_counts_once_under_its_first_name():
    pairs = list(network().named_parameters(remove_duplicate=False))
    assert {"embedding.tokens.weight", "head.weight"} <= names(pairs)
    (decayed, _) = decay_groups(pairs, 0.1)
    assert "embedding.tokens.weight" in names(decayed["params"]) and "head.weight" not in names(decayed["params"])


def test_optimizers_know_their_names():
    for optimizer in (adamw(network().named_parameters()), sgd(network().named_parameters())):
        assert [("norm.weight" in group["param_names"]) for group in optimizer.state_dict()["param_groups"]] == [False, True]


def test_frozen_parameters_are_in_no_group_and_all_frozen_is_an_error():
    model = network()
    model["blocks"][0].requires_grad_(False)
    grouped = [name for group in decay_groups(model.named_parameters(), 0.1) for name in names(group["params"])]
    assert grouped and not any(name.startswith("blocks.0.") for name in grouped)
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="all are frozen"):
        decay_groups(model.named_parameters(), 0.1)


def test_an_empty_group_is_left_out():
    assert len(decay_groups(nn.Linear(3, 3, bias=False).named_parameters(), 0.1)) == 1


def test_a_pattern_that_fits_nothing_is_an_error_with_a_suggestion():
    with pytest.raises(ConfigError, match=r"optimizer\.no_decay=embeding.*Did you mean embedding\?"):
        decay_groups(network().named_parameters(), 0.1, ("bias", "embeding"))


def test_matrices_are_the_hidden_2d_weights():
    matrices, others = split_matrices(network().named_parameters())
    assert names(matrices) == {
        f"blocks.{i}.{m}.weight" for i in (0, 1) for m in ("mlp.up", "mlp.down", *(f"attention.{n}" for n in "qkvo"))
    }
    assert {"embedding.tokens.weight", "embedding.position.weight", "norm.weight"} <= names(others)
    assert len(matrices) + len(others) == len(list(network().named_parameters()))


def test_a_prefix_such_as_lightnings_changes_nothing():
    pairs = [(f"model.{name}", parameter) for name, parameter in network().named_parameters()]
    assert len(split_matrices(pairs)[0]) == 12


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (adamw, {"lr": -1.0}, "optimizer.lr=-1.0"),
        (adamw, {"betas": [0.9, 1.0]}, "optimizer.betas"),
        (adamw, {"fused": "maybe"}, "optimizer.fused=maybe"),
        (sgd, {"nesterov": True}, "optimizer.nesterov=True"),
        (sgd, {"momentum": 1.5}, "optimizer.momentum=1.5"),
    ],
)
def test_impossible_settings_name_key_and_value(make, settings, message):
    with pytest.raises(ConfigError, match=message):
        make(network().named_parameters(), **settings)


def test_adamw_equals_torchs_and_can_be_clipped_under_16_mixed():
    torch.manual_seed(0)
    ours, theirs = nn.Linear(6, 6), nn.Linear(6, 6)
    theirs.load_state_dict(ours.state_dict())
    mine = adamw(ours.named_parameters(), lr=1e-2, weight_decay=0.1)
    reference = torch.optim.AdamW(
        [{"params": [theirs.weight], "weight_decay": 0.1}, {"params": [theirs.bias], "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.9, 0.95),
        foreach=False,
    )
    for _ in range(5):
        x = torch.randn(4, 6)
        for model, optimizer in ((ours, mine), (theirs, reference)):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.bias, theirs.bias, rtol=0, atol=1e-6)
    assert mine.defaults["fused"] is True and not mine._step_supports_amp_scaling
