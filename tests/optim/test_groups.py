import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from meshformer.config.errors import ConfigError
from meshformer.optim import adamw, decay_groups, muon, sgd, split_matrices


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


def part_of(model: nn.Module, *names: str) -> list[tuple[str, nn.Parameter]]:
    """What a pipeline rank holds."""
    return [(name, p) for name, p in model.named_parameters() if name.startswith(names)]


MAKE = {
    "adamw": lambda pairs, **rest: adamw(pairs, **rest),
    "adamw, not fused": lambda pairs, **rest: adamw(pairs, fused=False, **rest),
    "sgd": lambda pairs, **rest: sgd(pairs, momentum=0.9, **rest),
    "muon": lambda pairs, **rest: muon(pairs, **rest),
}


@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize("part", [("head", "norm"), ("blocks.0.mlp",), ("blocks.0.attention_norm",), ("nothing",)])
def test_groups_are_the_same_in_every_part_of_a_model_and_work_when_empty(make, part):
    """Empty groups take steps, schedules, and a state dict's way there and back."""
    model = network()
    whole = MAKE[make](model.named_parameters())
    pairs, names = part_of(model, *part), [name for name, _ in model.named_parameters()]
    optimizer = MAKE[make](pairs, all_names=names)
    settings = [{k: v for k, v in g.items() if k not in ("params", "param_names")} for g in whole.param_groups]
    assert [{k: v for k, v in g.items() if k not in ("params", "param_names")} for g in optimizer.param_groups] == settings
    assert len(settings) == (3 if make == "muon" else 2)
    for of_part, of_whole in zip(optimizer.param_groups, whole.param_groups, strict=True):
        assert of_part["param_names"] == [name for name in of_whole["param_names"] if name.startswith(part)]
    schedule = LambdaLR(optimizer, lambda step: 1 / (step + 1))
    for _, p in pairs:
        p.grad = torch.ones_like(p)
    optimizer.step()
    schedule.step()
    again = MAKE[make](pairs, all_names=names)
    again.load_state_dict(optimizer.state_dict())
    again.step()
    assert [g["lr"] for g in again.param_groups] == [g["lr"] / 2 for g in whole.param_groups]
    assert [g["param_names"] for g in again.param_groups] == [g["param_names"] for g in optimizer.param_groups]


def test_what_a_part_lacks_is_judged_by_the_whole():
    model = network()
    norms, names = part_of(model, "blocks.0.attention_norm"), [name for name, _ in model.named_parameters()]
    decay_groups(norms, 0.1, ("bias", "mlp.up"), names)
    with pytest.raises(ConfigError, match=r"optimizer\.no_decay=mlp\.up"):
        decay_groups(norms, 0.1, ("bias", "mlp.up"))
    with pytest.raises(ConfigError, match=r"optimizer\.no_decay=embeding.*Did you mean embedding\?"):
        decay_groups(norms, 0.1, ("embeding",), names)
    muon(norms, no_decay=("mlp.up",), all_names=names)
    with pytest.raises(ConfigError, match="optimizer=adamw"):
        muon(norms)
    with pytest.raises(ConfigError, match="optimizer=adamw"):
        muon(norms, all_names=[name for name in names if "blocks" not in name])


def test_a_whole_model_has_both_groups_too():
    decayed, others = decay_groups(nn.Linear(3, 3, bias=False).named_parameters(), 0.1)
    assert names(decayed["params"]) == {"weight"} and others["params"] == []


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
