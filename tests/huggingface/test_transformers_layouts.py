"""Models of the transformers library train to the loss of one process in every layout that transformers declares a plan for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import jobs
from harness import run_ranks
from jobs import run_labelled, run_tiny, text_file
from layouts import params
from small_transformers import CONFIGS, LM

DATA_PARALLEL = {
    "ddp": (2, ["strategy=ddp"]),
    "fsdp": (2, ["strategy=fsdp"]),
    "hsdp": (4, ["strategy=hsdp"]),
}
LAYOUTS = {
    **DATA_PARALLEL,
    "tensor": (2, ["strategy=tensor"]),
    "tensor, whole sequences": (2, ["strategy=tensor", "strategy.sequence_parallel=false"]),
    "pipeline": (2, ["strategy=pipeline"]),
    "interleaved": (2, ["strategy=pipeline", "strategy.schedule=interleaved_1f1b"]),
    "fsdp_tensor": (4, ["strategy=fsdp_tensor"]),
    "tensor_pipeline": (4, ["strategy=tensor_pipeline"]),
    "checkpointed": (2, ["strategy=fsdp", "strategy.activation_checkpointing=full"]),
    "one process, checkpointed": (1, ["strategy.activation_checkpointing=selective"]),
    "one process, accumulated": (1, ["trainer.accumulate_grad_batches=2"]),
}
CASES = [
    *(("llama", layout) for layout in LAYOUTS),
    *(("qwen3", layout) for layout in ("fsdp", "tensor", "tensor, whole sequences", "pipeline")),
    *(("qwen3_moe", layout) for layout in ("fsdp", "pipeline")),
    *(("mistral", layout) for layout in ("tensor", "pipeline")),
    *(("llama_tied", layout) for layout in ("fsdp", "tensor", "pipeline")),
    *(("gpt_neox", layout) for layout in ("tensor", "pipeline")),
    *((name, layout) for name in ("gpt2", "bert") for layout in DATA_PARALLEL),
]
# What the other cases cover too, one layout of one model each: `-m slow`.
REPEATED = {
    ("llama", "hsdp"), ("llama", "fsdp_tensor"), ("llama", "tensor_pipeline"), ("llama", "interleaved"), ("qwen3", "fsdp"),
    ("qwen3", "tensor, whole sequences"), ("mistral", "pipeline"),
    ("llama", "tensor, whole sequences"), ("llama_tied", "fsdp"), ("llama_tied", "tensor"), ("gpt_neox", "pipeline"), ("gpt2", "ddp"),
    ("gpt2", "hsdp"), ("bert", "ddp"), ("bert", "hsdp"),
}  # fmt: skip
GPT2_PLAN = "+model.plan={blocks: net.transformer.h, embed: [net.transformer.wte, net.transformer.wpe], head: [net.transformer.ln_f, net.lm_head]}"
OTHERS: dict[str, tuple[str, int, list[str], list[str]]] = {  # model, processes, what the run is, its layout
    "a plan of the user's": ("gpt2", 2, [GPT2_PLAN], ["strategy=pipeline"]),
    "texts judged, tensor": ("llama", 2, ["task=sequence_classification", "data.label_column=label"], ["strategy=tensor"]),
    "texts judged, pipeline": ("llama", 2, ["task=sequence_classification", "data.label_column=label"], ["strategy=pipeline"]),
    "texts judged by their first token": ("bert", 2, ["task=sequence_classification", "data.label_column=label"], ["strategy=ddp"]),
    "words judged": ("bert", 2, ["task=token_classification", "data.label_column=tags"], ["strategy=fsdp"]),
    "pairs": ("bert", 2, ["task=sentence_embedding", "task.group=4", "data.pair_column=other"], ["strategy=ddp"]),
    "packed texts": ("llama", 2, ["data.packing=true"], ["strategy=pipeline"]),
    "a window, tensor and pipeline": ("mistral", 4, [], ["strategy=tensor_pipeline"]),
}
TOLERANCE = 5e-6


def rows_of(folder: Path, model: str, name: str, overrides: list[str]) -> list[dict[str, Any]]:
    jobs.TINY[:] = [setting for setting in jobs.TINY if not setting.startswith("model")]
    task = ["task=masked_language_modelling"] if model == "bert" and not any(o.startswith("task=") for o in overrides) else []
    run = run_labelled if any(o.startswith(("data.label", "data.pair", "data.packing")) for o in overrides) else run_tiny
    return run(folder, name, *LM, *task, f"model.config={folder}/{model}.json", *overrides)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("transformers")
    text_file(made)
    for name, config in CONFIGS.items():
        (made / f"{name}.json").write_text(json.dumps(config), encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def references(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {}


@pytest.mark.parametrize(("model", "layout"), [pytest.param(*case, marks=[pytest.mark.slow] * (case in REPEATED)) for case in CASES])
def test_every_layout_trains_it_to_the_loss_of_one_process(folder: Path, references: dict[str, Any], model: str, layout: str) -> None:
    if model not in references:
        (references[model],) = run_ranks(1, rows_of, folder, model, f"{model}_one", [])
    rows, (processes, overrides) = references[model], LAYOUTS[layout]
    assert rows[-1]["train/loss"] < rows[0]["train/loss"] - 0.05
    name = f"{model}_{layout.replace(' ', '_')}"
    ours = run_ranks(processes, rows_of, folder, model, name, [*overrides, f"trainer.devices={processes}"], timeout=240)[0]
    assert [row["step"] for row in ours] == [row["step"] for row in rows]
    for a, b in zip(ours, rows, strict=True):
        assert abs(a["train/loss"] - b["train/loss"]) < TOLERANCE
        assert abs(a["train/grad_norm"] / b["train/grad_norm"] - 1) < TOLERANCE


@pytest.mark.parametrize("name", params(OTHERS, ["a window, tensor and pipeline", "pairs", "texts judged, pipeline"]))
def test_other_tasks_and_plans_train_to_the_loss_of_one_process(folder: Path, name: str) -> None:
    model, processes, what, layout = OTHERS[name]
    (rows,) = run_ranks(1, rows_of, folder, model, f"{name}, one", what)
    ours = run_ranks(processes, rows_of, folder, model, name, [*what, *layout, f"trainer.devices={processes}"], timeout=240)[0]
    assert rows[0]["train/loss"] != rows[-1]["train/loss"] and len(ours) == len(rows) == 6
    for a, b in zip(ours, rows, strict=True):
        assert abs(a["train/loss"] - b["train/loss"]) < TOLERANCE
        assert abs(a["train/grad_norm"] / b["train/grad_norm"] - 1) < TOLERANCE


def test_bf16_stays_close_to_fp32_and_is_another_computation(folder: Path) -> None:
    runs = {}
    for precision, layout in (("32-true", "single"), ("bf16-mixed", "fsdp")):
        ranks = 1 if layout == "single" else 2
        overrides = [f"strategy={layout}", f"trainer.devices={ranks}", f"trainer.precision={precision}"]
        runs[precision] = run_ranks(ranks, rows_of, folder, "llama", f"in {precision}", overrides)[0]
    differences = [abs(a["train/loss"] - b["train/loss"]) for a, b in zip(*runs.values(), strict=True)]
    assert 1e-6 < max(differences) < 2e-2


@pytest.mark.slow
def test_compiled_blocks_train_to_the_same_loss(folder: Path) -> None:
    both = ("trainer.compile=false", "trainer.compile=true")
    plain, compiled = (run_ranks(1, rows_of, folder, "llama", name, [name], timeout=500)[0] for name in both)
    assert all(abs(a["train/loss"] - b["train/loss"]) < 1e-5 for a, b in zip(plain, compiled, strict=True))
