"""A Plan says of every module how it is cut, by the first pattern that fits; blocks, ties and what no pattern fits are found by name."""

import pytest
import torch
from torch import nn

from meshformer.model import Plan, Transformer, VisionTransformer
from meshformer.model.layout import STYLES, blocks_name, blocks_of, plan_of, retie, ties, uncovered


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.tok, self.out = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.out.weight = self.tok.weight
        self.few, self.h = nn.ModuleList([nn.Linear(4, 4)]), nn.ModuleList(nn.Linear(4, 4) for _ in range(3))


def test_the_first_pattern_that_fits_counts_and_replicated_holds_inside():
    plan = Plan(tensor={"a.b": "columns", "a*": "replicated", "c": "rows"})
    assert plan.style("a.b") == "columns" and plan.style("a.d") == "replicated"
    assert Plan(tensor={"a": "replicated"}).style("a.b.c") == "replicated"
    assert plan.style("c.inside") is None, "a style other than replicated is that of the module alone"


def test_the_words_of_transformers_are_understood_and_others_refused():
    plan = Plan(tensor={"q": "colwise", "o": "rowwise", "n": "sequence_parallel", "head": "colwise_gather_output"})
    assert list(plan.tensor.values()) == ["columns", "rows", "sequence", "vocabulary"]
    with pytest.raises(ValueError, match=r"'colums': use one of columns, rows"):
        Plan(tensor={"q": "colums"})


def test_blocks_are_the_plans_or_the_longest_list():
    net = Net()
    assert blocks_name(net) == "h" and len(blocks_of(net)) == 3
    net.plan = Plan(blocks="few")
    assert blocks_name(net) == "few"
    assert blocks_name(nn.Linear(2, 2)) is None and blocks_of(nn.Linear(2, 2)) == []


def test_ties_are_found_and_made_again():
    net = Net()
    assert ties(net) == {"out.weight": "tok.weight"}
    net.out.weight = nn.Parameter(torch.zeros(5, 4))
    retie(net, {"out.weight": "tok.weight"})
    assert net.out.weight is net.tok.weight


def test_a_parameter_that_no_pattern_fits_is_named():
    net = Net()
    assert uncovered(net, Plan(tensor={"tok": "vocabulary", "out": "vocabulary", "h.*": "columns"})) == ["few.0.weight", "few.0.bias"]


@pytest.mark.parametrize(
    "model",
    [
        Transformer(8, 2, 2, 16, 8, activation="swiglu", bias=True, n_kv_heads=1),
        Transformer(8, 2, 2, 16, 8, norm_position="post", activation="gelu", head_transform=True, head_bias=True, embedding_norm=True, token_types=2),
        VisionTransformer(8, 4, 2, 2, 16, classes=3),
    ],
)
def test_our_models_plans_cover_every_parameter(model: nn.Module):
    plan = plan_of(model)
    assert plan is not None and uncovered(model, plan) == [] and set(plan.tensor.values()) <= set(STYLES)


@pytest.mark.parametrize(("axis", "lacks"), [("tensor", "`tensor`"), ("pipeline", "`embed` and `head`"), ("context", "`attention`")])
def test_a_plan_says_what_an_axis_lacks(axis: str, lacks: str):
    assert (Plan().lacks(axis) or "").startswith(lacks) and Transformer.plan.lacks(axis) is None
