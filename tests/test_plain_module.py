"""A module in plain PyTorch with names of its own is trained like ours: Muon and rates by layer find its blocks, and nothing is recommended that
it cannot do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from jobs import PLAIN_PLAN, TINY, PlainNet, text_file
from meshformer.cli import main
from meshformer.command.compose import compose
from meshformer.config import ConfigError
from meshformer.job.build import build_model, build_task
from meshformer.model import LoraLinear, Transformer, VisionTransformer, add_adapters, supports_kv_cache
from meshformer.model.lora import adaptable
from meshformer.optim import muon
from meshformer.optim.groups import LayerRates
from meshformer.tasks import LanguageModelling, SequenceClassification

HIDDEN = {f"body.h.{i}.{name}.weight" for i in (0, 1) for name in ("mix", "up", "down")}
TOKENS = torch.arange(8).view(2, 4)


def words(folder: Path, *overrides: str) -> list[str]:
    text = folder / "text.txt"
    text = text if text.is_file() else text_file(folder)
    tiny = [o for o in TINY if not o.startswith("model")]
    own = ["~model", "+model={_target_: jobs.PlainNet}", "allow=[jobs]", "optimizer=muon", "trainer.max_steps=3"]
    return [*tiny, f"data.files=[{text}]", f"paths.data={folder}/cache", f"paths.runs={folder}/runs", *own, *overrides]


# --- a run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    assert main(["train", *words(folder, f"hydra.run.dir={folder}/run")]) == 0
    return folder / "run"


def test_a_plain_module_trains_with_muon_and_the_summary_recommends_what_it_can_do(run: Path, tmp_path: Path, capfd: Any) -> None:
    assert main(["train", *words(tmp_path, "+callbacks.samples={_target_: meshformer.callbacks.Samples}", f"hydra.run.dir={tmp_path}/a")]) == 0
    told = capfd.readouterr().out
    assert "meshformer evaluate" in told and "generate" not in told
    assert not (tmp_path / "a" / "samples").exists()
    assert main(["evaluate", f"run={run}", "allow=[jobs]"]) == 0


def test_generate_says_in_one_sentence_why_it_cannot_continue_such_a_run(run: Path, capfd: Any) -> None:
    assert main(["generate", f"run={run}", "allow=[jobs]"]) == 2
    error = capfd.readouterr().err
    assert error.startswith(f"error: run={run}: its model, jobs.PlainNet, cannot continue a text: its forward takes no `cache`")


def test_only_a_model_that_supports_kv_cache_can_continue_a_text() -> None:
    assert supports_kv_cache(Transformer(7, 1, 1, 8, 4)) and not supports_kv_cache(PlainNet())
    assert not supports_kv_cache(VisionTransformer(4, 2, 1, 1, 8, classes=2))


# --- its blocks


def optimizer_of(tmp_path: Path, *overrides: str) -> torch.optim.Optimizer:
    task: Any = build_task(compose(words(tmp_path, *overrides)), 3)
    task.configure_model()
    made = task.configure_optimizers()
    return made["optimizer"]


def test_muon_takes_the_matrices_of_the_longest_list_of_modules(tmp_path: Path) -> None:
    groups = optimizer_of(tmp_path).param_groups
    assert set(groups[0]["param_names"]) == HIDDEN and groups[0]["method"] == "muon"


def test_muon_is_refused_for_a_model_without_a_list_of_modules() -> None:
    with pytest.raises(ConfigError, match="Muon found no 2-D weight below `blocks` to train"):
        muon(nn.Linear(3, 3).named_parameters(), blocks=None)


def test_muon_takes_of_a_part_what_it_takes_of_the_whole() -> None:
    named = list(PlainNet().named_parameters())
    part = muon(named[-1:], all_names=[name for name, _ in named], blocks="body.h")
    assert part.param_groups[0]["param_names"] == [] and part.param_groups[1]["param_names"] == ["out.weight"]
    with pytest.raises(ConfigError, match="Muon found no"):
        muon(named[-1:], all_names=[name for name, _ in named])


def test_rates_by_layer_count_from_the_top_of_any_model() -> None:
    named = [(name, p) for name, p in PlainNet().named_parameters() if p.ndim == 2]
    optimizer = LayerRates(0.5).of(lambda pairs: torch.optim.SGD([{"params": list(pairs)}], lr=1.0))(named, blocks="body.h")
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["param_names"]}
    assert rates == {"tok.weight": 0.125, "out.weight": 1.0} | {name: 0.25 if ".0." in name else 0.5 for name in HIDDEN}


def test_adapters_are_put_into_the_blocks_of_any_model() -> None:
    model: Any = PlainNet()
    model.initial_value = lambda name, shape, seed: torch.ones(shape)
    assert adaptable(model) == ["down", "mix", "up"]
    add_adapters(model, 2, 4.0, ["mix"], seed=0)
    assert {name for name, m in model.named_modules() if isinstance(m, LoraLinear)} == {"body.h.0.mix", "body.h.1.mix"}


# --- a plan from the configuration


def test_a_plan_in_the_configuration_is_the_models(tmp_path: Path) -> None:
    config = compose(words(tmp_path, "+model.plan={blocks: body.h, embed: [tok]}"))
    model = build_model(config)
    assert (model.plan.blocks, model.plan.embed) == ("body.h", ["tok"]) and config["model"]["plan"]["blocks"] == "body.h"
    assert build_model(compose(words(tmp_path, "+model.plan=jobs.PLAIN_PLAN"))).plan.blocks == PLAIN_PLAN.blocks


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        ({"tensor": {"tok": "colums"}}, r"model\.plan: Plan\.tensor\['tok'\]='colums': use one of columns"),
        ({"blcks": "h"}, r"model\.plan: .*blcks"),
        ("jobs.PlainNet", r"model\.plan=jobs\.PlainNet: is no Plan, but type"),
        ("jobs.NO_PLAN", r"model\.plan=jobs\.NO_PLAN: there is no such plan"),
        ("os.path", r"model\.plan=os\.path: is not on the list"),
    ],
)
def test_a_plan_that_says_nothing_sensible_is_refused(tmp_path: Path, plan: Any, told: str) -> None:
    config = compose(words(tmp_path))
    config["model"]["plan"] = plan
    with pytest.raises(ConfigError, match=told):
        build_model(config)


# --- what its forward is called with


def task_of(forward: Any, kind: Any = LanguageModelling) -> Any:
    class Net(nn.Module):
        pass

    Net.forward = forward  # pyright: ignore[reportAttributeAccessIssue]
    task = kind(model=Net)
    task.configure_model()
    return task


BATCH = {"tokens": TOKENS, "targets": TOKENS}
FULL = {**BATCH, "positions": TOKENS % 3, "documents": TOKENS // 5}


def test_the_first_parameter_takes_the_tokens_and_usual_names_the_rest() -> None:
    arguments = task_of(lambda self, ids, position_ids=None, *, documents=None: ids).arguments(FULL, "train")
    assert list(arguments) == ["ids", "position_ids", "documents"]
    assert all(x is FULL[name] for x, name in zip(arguments.values(), ("tokens", "positions", "documents"), strict=True))


def test_what_a_batch_does_not_hold_is_left_to_the_model() -> None:
    assert list(task_of(lambda self, ids, pos=7: ids).arguments(BATCH, "train")) == ["ids"]
    assert list(task_of(lambda self, **all: all).arguments(FULL, "train")) == ["tokens_BT", "positions_BT", "documents_BT"]


def test_positions_that_a_model_requires_are_the_natural_ones() -> None:
    arguments = task_of(lambda self, x, pos: x).arguments(BATCH, "train")
    assert arguments["pos"].tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("forward", "kind", "told"),
    [
        (lambda self, ids, documents: ids, LanguageModelling, "its forward takes ids, documents, and the batches hold positions"),
        (lambda self, ids, pos: ids, LanguageModelling, "its forward takes ids, pos, and the batches hold documents"),
        (lambda self, ids: ids, SequenceClassification, "the batches hold documents, which would go to documents_BT or documents"),
        (lambda self, ids, pos, documents, extra: ids, LanguageModelling, "nothing of a batch goes to extra"),
    ],
)
def test_what_a_batch_holds_is_not_left_out_silently(forward: Any, kind: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        task_of(forward, kind).arguments(FULL, "train")


def test_a_models_signature_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of(lambda self, ids: ids)
    task.arguments(BATCH, "train")
    monkeypatch.setattr("inspect.signature", lambda *_: pytest.fail("read again"))
    task.arguments(BATCH, "val")
