"""Images train to the loss and gradient norm of one process in every layout but those with a context axis, which is refused in a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import jobs
from harness import run_ranks
from layouts import params
from meshformer.command.compose import compose
from meshformer.config import ConfigError

DIGITS = [
    "experiment=vit_digits", "trainer.max_steps=6", "trainer.log_every_n_steps=1", "trainer.val_check_interval=6", "trainer.limit_val_batches=2",
    "trainer.progress=false", "trainer.threads=1", "trainer.precision=32-true", "optimizer=sgd", "optimizer.lr=0.1", "schedule=constant",
    "trainer.gradient_clip_val=0.5", "data.workers=0", "data.batch_size=32", "model.n_layers=3", "model.d_model=32", "logger=csv",
    "~callbacks.checkpoint", "~callbacks.samples", "~callbacks.throughput",
]  # fmt: skip
CLASS_TOKEN = ["model.pooling=cls", "strategy.sequence_parallel=false"]  # 17 tokens, which no two processes share equally
TOLERANCE = 5e-6
LAYOUTS = {
    "fsdp": (2, ["strategy=fsdp"]),
    "tensor": (2, ["strategy=tensor"]),
    "tensor, a class token": (2, ["strategy=tensor", *CLASS_TOKEN]),
    "pipeline": (2, ["strategy=pipeline"]),
    "pipeline, a class token": (2, ["strategy=pipeline", CLASS_TOKEN[0]]),
    "tensor_pipeline": (4, ["strategy=tensor_pipeline", "strategy.microbatches=4"]),
    "fsdp_tensor": (4, ["strategy=fsdp_tensor"]),
}


def rows(folder: Path, name: str, overrides: list[str]) -> list[dict[str, Any]]:
    run = folder / name
    return jobs._run(run, compose([*DIGITS, *overrides]), False)


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder, known = tmp_path_factory.mktemp("images"), {}

    def reference(pooling: list[str]) -> tuple[Path, list[dict[str, Any]]]:
        if str(pooling) not in known:
            (known[str(pooling)],) = run_ranks(1, rows, folder, f"one-{len(known)}", pooling)
        return folder, known[str(pooling)]

    return reference


@pytest.mark.parametrize("layout", params(LAYOUTS, ["fsdp_tensor", "pipeline, a class token"]))
def test_every_layout_trains_to_the_loss_of_one_process(references: Any, layout: str) -> None:
    processes, overrides = LAYOUTS[layout]
    folder, one = references([o for o in overrides if o.startswith("model.")])
    ours = run_ranks(processes, rows, folder, layout, [*overrides, f"trainer.devices={processes}"], timeout=240)[0]
    assert [row["step"] for row in ours] == [row["step"] for row in one] == list(range(1, 7))
    for a, b in zip(ours, one, strict=True):
        assert abs(a["train/loss"] - b["train/loss"]) < TOLERANCE
        assert abs(a["train/grad_norm"] / b["train/grad_norm"] - 1) < TOLERANCE
    assert abs(ours[-1]["val/loss"] - one[-1]["val/loss"]) < TOLERANCE and ours[-1]["val/accuracy"] == one[-1]["val/accuracy"]


def test_a_context_axis_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"strategy\.context=2: cuts sequences of tokens over processes, and the data is images"):
        compose([*DIGITS, "strategy=context", "trainer.devices=2"])
