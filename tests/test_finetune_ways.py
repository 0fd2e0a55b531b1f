"""Frozen layers, adapters, and rates by layer: the same in every layout, and what is saved of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from harness import run_ranks
from jobs import run_tiny, tiny_config
from meshformer.checkpoint.find import latest_checkpoint
from meshformer.checkpoint.optimizer import complete_groups
from meshformer.checkpoint.read import read_tensors
from meshformer.checkpoint.weights import is_adapter, load_adapters, load_weights
from meshformer.config.errors import ConfigError
from meshformer.huggingface import load_pretrained
from meshformer.job.build import build_model
from meshformer.job.evaluate import load_run
from meshformer.job.export import export
from meshformer.model.lora import ADAPTERS
from meshformer.optim import sgd
from meshformer.optim.groups import LayerRates
from test_parity import References, check_equal, references  # noqa: F401

SHAPE = ["model.zero_init=false", "model.n_kv_heads=2"]
SAVED = ["~callbacks.nonfinite", "optimizer=adamw", "optimizer.lr=1e-2", "schedule=constant"]
LORA = ["stage.lora.rank=3", "stage.lora.alpha=6", "stage.lora.targets=[q,v,o,up,down]"]
WAYS = {
    "lora": [*LORA, "trainer.gradient_clip_val=0.08", "optimizer.lr=4"],
    "frozen": ["stage.freeze=[embedding.*,'blocks.[0].*']", "trainer.gradient_clip_val=0.1"],
    "drawn anew": ["stage.reinit=['blocks.1.*',norm.*,head.*]", "trainer.gradient_clip_val=0.1"],
    "by layer": ["stage.layer_decay=0.8", "stage.head_lr_scale=1.5", "stage.unfreeze_every=3"],
}


def finetune(folder: Path, *overrides: str) -> list[str]:
    return ["stage=finetune", f"stage.init_from={folder / 'base'}", "stage.lr_scale=1", "model.tie_embeddings=false", *overrides]


@pytest.fixture(scope="module")
def base(references: References) -> Path:  # noqa: F811
    """A folder with a run in it, ten steps old."""
    run_ranks(1, run_tiny, references.folder, "base", *SAVED, "trainer.max_steps=10", *SHAPE, "model.tie_embeddings=false")
    return references.folder


# Frozen layers with fsdp and pipeline are in test_parity.py.
CASES = [("lora", layout) for layout in ("ddp", "fsdp", "tensor", "pipeline")]
CASES += [("frozen", "ddp"), ("frozen", "tensor"), ("by layer", "fsdp"), ("by layer", "pipeline"), ("drawn anew", "pipeline")]


@pytest.mark.parametrize(("way", "layout"), CASES)
def test_way_equals_one_process(references: References, base: Path, way: str, layout: str) -> None:  # noqa: F811
    check_equal(references, 2, [f"strategy={layout}", *finetune(base, *WAYS[way])])


def test_what_is_drawn_anew_is_what_training_from_scratch_starts_with(base: Path) -> None:
    config = config_of(base / "base")
    fresh, model = build_model(config), build_model(config)
    load_weights(model, latest_checkpoint(base / "base"), reinit=["blocks.1.*", "norm.*"])
    saved = read_tensors(latest_checkpoint(base / "base"), "model.")
    start = dict(fresh.named_parameters())
    for name, p in model.named_parameters():
        assert torch.equal(p, start[name] if name.startswith(("blocks.1.", "norm.")) else saved[f"model.{name}"]), name
    load_weights(fresh, latest_checkpoint(base / "base"), reinit=["*"])
    assert all(torch.equal(p, build_model(config).state_dict()[name]) for name, p in fresh.named_parameters())


@pytest.fixture(scope="module")
def tuned(base: Path) -> Path:
    """A run that trains adapters, stopped after two steps on two tensor-parallel ranks and continued to the fourth in one process."""
    command = finetune(base, *LORA, *SAVED, *SHAPE)
    run_ranks(2, run_tiny, base, "tuned", *command, "trainer.max_steps=2", "strategy=tensor", "trainer.devices=2")
    run_ranks(1, resumed, base, "tuned", *command, "trainer.max_steps=4")
    run_ranks(1, run_tiny, base, "at-once", *command, "trainer.max_steps=4")
    return base / "tuned"


def resumed(*arguments: Any) -> Any:
    return run_tiny(*arguments, resume=True)


def config_of(run: Path) -> dict[str, Any]:
    return yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))


def test_a_run_that_trains_adapters_continues_in_another_layout_and_changes_nothing_else(tuned: Path) -> None:
    runs = (tuned, tuned.parent / "at-once", tuned.parent / "base")
    mine, other, start = (read_tensors(latest_checkpoint(run), "model.") for run in runs)
    adapters = [name for name in mine if is_adapter(name)]
    assert len(adapters) == 2 * 5 * 2 and all(mine[name].norm() > 0 for name in adapters)
    for name, x in mine.items():
        torch.testing.assert_close(x, other[name], atol=2e-5, rtol=0)
        assert name in adapters or torch.equal(x, start[name]), name


def test_adapters_merged_and_adapters_alone_give_the_same_logits(tuned: Path, tmp_path: Path) -> None:
    tokens_BT = torch.arange(12).view(2, 6) % 11
    trained = load_run(config_of(tuned), tuned)[0]
    checkpoint = latest_checkpoint(tuned)
    export(checkpoint, tmp_path / "merged.safetensors", "safetensors")
    export(checkpoint, tmp_path / "small.safetensors", "adapter")
    alone = build_model(config_of(tuned.parent / "base"))
    load_weights(alone, latest_checkpoint(tuned.parent / "base"))
    before = alone(tokens_BT)
    load_adapters(alone, tmp_path / "small.safetensors")
    wanted = trained(tokens_BT)
    for model in (load_pretrained(tuned), load_pretrained(tmp_path / "merged.safetensors"), alone):
        torch.testing.assert_close(model(tokens_BT), wanted, atol=1e-5, rtol=0)
    assert (before - wanted).abs().max() > 1e-3
    assert (tmp_path / "small.safetensors").stat().st_size < 0.7 * (tmp_path / "merged.safetensors").stat().st_size
    with pytest.raises(ConfigError, match="trained no adapters"):
        export(latest_checkpoint(tuned.parent / "base"), tmp_path / "x.safetensors", "adapter")


@pytest.mark.parametrize("rank", [None, 5])
def test_adapters_are_not_left_behind_by_fine_tuning_from_their_run(tuned: Path, rank: int | None) -> None:
    config = config_of(tuned)
    config["stage"]["lora"]["rank"] = rank
    with pytest.raises(ConfigError, match=r"lora_A: .*Merge that run's adapters first \(meshformer export format=safetensors\)"):
        load_weights(build_model(config), latest_checkpoint(tuned), new=ADAPTERS, reinit=())


def test_rates_fall_from_the_top_and_the_groups_are_those_of_the_whole_model_in_every_part() -> None:
    names = [
        "embedding.tokens.weight",
        "blocks.0.mlp.up.weight",
        "blocks.0.norm.weight",
        "blocks.1.mlp.up.weight",
        "norm.weight",
        "head.weight",
    ]
    named = [(name, torch.nn.Parameter(torch.ones(2, 2))) for name in names]
    make = LayerRates(0.5, 3.0, 10).of(partial(sgd, lr=1.0))
    whole, part = make(named), make(named[3:], all_names=names)
    rates = {name: group["lr"] for group in whole.param_groups for name in group["param_names"]}
    assert rates == dict(zip(names, [0.125, 0.25, 0.25, 0.5, 1.0, 3.0], strict=True))
    key = [(group["lr"], group["weight_decay"], group["first_step"]) for group in whole.param_groups]
    assert key == [(group["lr"], group["weight_decay"], group["first_step"]) for group in part.param_groups]
    assert {group["first_step"] for group in whole.param_groups} == {0, 10, 20, 30}
    joined = complete_groups([make(named[:3], all_names=names).state_dict()["param_groups"], part.state_dict()["param_groups"]], names)
    assert joined == whole.state_dict()["param_groups"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+stage.freeze=[blocks.0.blok.*]"], "no parameter has such a name.*blocks"),
        (["+stage.reinit=[blocks.1.blok.*]"], "stage.reinit=.*no parameter has such a name"),
        (["+stage.lora.rank=2", "+stage.lora.targets=[query]"], "no linear layer in the blocks is called query.*: they are down, k, o, q"),
    ],
)
def test_patterns_that_fit_nothing_are_refused(base: Path, overrides: list[str], message: str) -> None:
    config = tiny_config(base, "model.vocab_size=11", *overrides)
    with pytest.raises(ConfigError, match=message):
        build_model(config)
