"""The average of the weights: by the formula, in every layout, without touching training, and what everything that loads a run gets."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from harness import run_ranks
from jobs import run_tiny, tiny_config
from meshformer import callbacks
from meshformer.checkpoint.find import latest_checkpoint
from meshformer.checkpoint.read import read_tensors
from meshformer.checkpoint.weights import load_weights
from meshformer.config.errors import ConfigError
from meshformer.huggingface import load_pretrained
from meshformer.job.build import build_callbacks, build_model
from meshformer.job.export import export
from meshformer.record.metrics_csv import read_metrics
from meshformer.runs import load_model

STEPS, DECAY = 6, 0.9
RUN = [
    "optimizer=sgd", "optimizer.lr=0.3", "schedule=constant", "trainer.val_check_interval=3", "callbacks.checkpoint.every_n_steps=1",
    "callbacks.checkpoint.keep_last=0",
]  # fmt: skip
EMA = [*RUN, f"callbacks.ema.decay={DECAY}"]
resumed = partial(run_tiny, resume=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds two runs of one process: `averaged`, and `plain` without."""
    folder = tmp_path_factory.mktemp("ema")
    for name, settings in (("plain", RUN), ("averaged", EMA)):
        run_ranks(1, run_tiny, folder, name, *settings, f"trainer.max_steps={STEPS}")
    return folder


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return read_metrics(folder / name / "metrics.csv")


def averages(folder: Path, name: str, step: int = STEPS) -> dict[str, torch.Tensor]:
    return read_tensors(folder / name / "checkpoints" / f"step-{step:08d}", "average.")


def test_average_is_that_of_the_formula(folder: Path) -> None:
    start = build_model(yaml.safe_load((folder / "averaged" / "config.yaml").read_text()))
    expected = {name: p.detach().clone() for name, p in start.named_parameters()}
    for step in range(1, STEPS + 1):
        weights = read_tensors(folder / "averaged" / "checkpoints" / f"step-{step:08d}", "model.")
        beta = min(DECAY, (1 + step) / (10 + step))
        expected = {name: beta * a + (1 - beta) * weights[f"model.{name}"] for name, a in expected.items()}
    found = averages(folder, "averaged")
    assert found.keys() == {f"average.{name}" for name in expected}
    for name, a in expected.items():
        torch.testing.assert_close(found[f"average.{name}"], a, atol=1e-6, rtol=1e-5)


def test_training_is_as_without_it(folder: Path) -> None:
    plain, averaged = rows(folder, "plain"), rows(folder, "averaged")
    assert [r["train/loss"] for r in averaged] == [r["train/loss"] for r in plain]
    assert [r["val/loss"] for r in averaged if "val/loss" in r] != [r["val/loss"] for r in plain if "val/loss" in r]


LAYOUTS = ["ddp", "fsdp", "tensor", "pipeline"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_keeps_the_same_and_another_goes_on_with_it(folder: Path, layout: str) -> None:
    two = [
        f"strategy={layout}",
        "trainer.devices=2",
        "callbacks.checkpoint.every_n_steps=4",
    ]  # no save between a validation and the next step
    run_ranks(1, run_tiny, folder, layout, *EMA, "trainer.max_steps=2")
    run_ranks(2, resumed, folder, layout, *EMA, *two, "trainer.max_steps=4")
    run_ranks(1, resumed, folder, layout, *EMA, f"trainer.max_steps={STEPS}")
    for mine, other in zip(rows(folder, layout), rows(folder, "averaged"), strict=True):  # last steps were validated as well
        assert [mine[k] for k in other if "loss" in k] == pytest.approx([other[k] for k in other if "loss" in k], abs=5e-6)
    for name, a in averages(folder, "averaged").items():
        torch.testing.assert_close(averages(folder, layout)[name], a, atol=5e-6, rtol=1e-5)


def test_what_loads_the_run_gets_the_average(folder: Path, tmp_path: Path) -> None:
    found, run = averages(folder, "averaged"), folder / "averaged"
    export(latest_checkpoint(run), tmp_path / "weights.safetensors", "safetensors")
    for model in (load_model(run).model, load_pretrained(run), load_pretrained(tmp_path / "weights.safetensors")):
        for name, p in model.named_parameters():
            assert torch.equal(p, found[f"average.{name}"]), name
        assert torch.equal(model.head.weight, found["average.embedding.tokens.weight"])  # tied
    raw = load_model(run).model
    load_weights(raw, latest_checkpoint(run), averaged=False)
    assert not torch.equal(raw.head.weight, found["average.embedding.tokens.weight"])


def test_the_texts_are_those_of_the_average(folder: Path) -> None:
    config = tiny_config(folder, *EMA)
    config["callbacks"] = {
        "ema": config["callbacks"]["ema"],
        "samples": {"_target_": "meshformer.callbacks.Samples"},
        **config["callbacks"],
    }
    kinds = [type(callback) for callback in build_callbacks(config, folder / "averaged", 1)]
    assert kinds.index(callbacks.Samples) < kinds.index(callbacks.EMA) < kinds.index(callbacks.Checkpoint)


def test_a_run_without_it_drops_it(folder: Path) -> None:
    run_ranks(1, run_tiny, folder, "dropped", *EMA, "trainer.max_steps=2")
    run_ranks(1, resumed, folder, "dropped", *RUN, "trainer.max_steps=3")
    assert averages(folder, "dropped", 2) and not averages(folder, "dropped", 3)


def test_an_average_that_never_moves_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"callbacks.ema.decay=1"):
        callbacks.EMA(decay=1)
