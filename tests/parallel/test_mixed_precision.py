"""With FSDP `bf16-mixed` gathers parameters in bf16 and sums gradients in fp32; the parameters themselves, and what is computed in fp32, stay so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from harness import run_ranks
from jobs import before_the_norm, run_tiny, text_file
from meshformer.tasks import Task

SHORT = ["trainer.max_steps=2", "trainer.precision=bf16-mixed", "trainer.devices=2"]
# As new torch calls them, and old.
GATHERS, SUMS = ("all_gather_single", "all_gather_into_tensor"), ("reduce_scatter_single", "reduce_scatter_tensor")


def sent(folder: Path, *overrides: str) -> dict[str, Any]:
    """Types that this rank communicated in while it trained, and those of its parameters, of their gradients and of the residual stream."""
    seen: dict[str, set[str]] = {
        "gathered": set(),
        "summed": set(),
        "parameters": set(),
        "gradients": set(),
        "stream": set(),
        "optimizer": set(),
    }

    def note(kind: str, name: str) -> None:
        original: Callable[..., Any] = getattr(dist, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            given = args[1] if len(args) > 1 else kwargs.get("input_tensor", kwargs.get("input"))
            seen[kind].add(str(given.dtype))
            return original(*args, **kwargs)

        setattr(dist, name, noted)

    for kind, names in (("gathered", GATHERS), ("summed", SUMS)):
        for name in names:
            if hasattr(dist, name):
                note(kind, name)

    def look(task: Any) -> None:
        seen["parameters"] |= {str(p.dtype) for p in task.model.parameters()}
        seen["gradients"] |= {str(p.grad.dtype) for p in task.model.parameters()}
        seen["optimizer"] |= {str(x.dtype) for state in task.trainer.optimizers[0].state.values() for x in state.values() if x.ndim}

    started = Task.on_train_start

    def watch(self: Any) -> None:
        started(self)
        for block in getattr(self.model, "blocks", ()):
            block.register_forward_pre_hook(lambda _, inputs: seen["stream"].add(str(inputs[0].dtype)))

    before_the_norm(look)
    Task.on_train_start = watch
    run_tiny(folder, f"sent-{len(list(folder.iterdir()))}", *SHORT, *overrides)
    return {kind: {name.removeprefix("torch.") for name in names} for kind, names in seen.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("mixed")
    text_file(made)
    return made


OWN = {"gathered": {"bfloat16"}, "summed": {"float32"}}
CASES = {
    "auto": (["strategy=fsdp"], OWN),
    "accumulated": (["strategy=fsdp", "trainer.accumulate_grad_batches=2"], OWN),
    "a reduction that is left open": (["strategy=fsdp", "strategy.param_dtype=bfloat16", "strategy.reduce_dtype=null"], OWN),
    "sums in bf16, asked for": (["strategy=fsdp", "strategy.reduce_dtype=bfloat16"], {**OWN, "summed": {"bfloat16"}}),
    "autocast over fp32 gathers, asked for": (["strategy=fsdp", "strategy.param_dtype=null"], {"gathered": {"float32"}, "summed": {"float32"}}),
    "fp32": (["strategy=fsdp", "trainer.precision=32-true"], {"gathered": {"float32"}, "summed": {"float32"}}),
    "context": (["strategy=context"], OWN),
    "layer norm, biases": (["strategy=fsdp", "model.norm=layer", "model.bias=true", "model/position=learned"], OWN),
}  # fmt: skip


SLOW = ("a reduction that is left open", "sums in bf16, asked for")  # tests/config/test_layouts.py has what the settings become


@pytest.mark.parametrize(
    ("overrides", "expected"), [pytest.param(*case, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, case in CASES.items()]
)
def test_what_is_communicated(folder: Path, overrides: list[str], expected: dict[str, set[str]]) -> None:
    found = run_ranks(2, sent, folder, *overrides)[0]
    assert {kind: found[kind] for kind in expected} == expected
    assert found["parameters"] == found["gradients"] == found["stream"] == {"float32"}
    assert found["optimizer"] <= {"float32"}


def stopped_and_resumed(folder: Path, *overrides: str) -> list[list[dict[str, Any]]]:
    whole = run_tiny(folder, "whole", *SHORT, *overrides, "trainer.max_steps=4")
    run_tiny(folder, "half", *SHORT, *overrides, "trainer.max_steps=2")
    half = run_tiny(folder, "half", *SHORT, *overrides, "trainer.max_steps=4", resume=True)
    told = ("train/loss", "train/grad_norm", "val/loss")
    return [[{key: row[key] for key in told if key in row} for row in rows] for rows in (whole, half)]


def test_a_resumed_run_goes_on_bit_for_bit(folder: Path) -> None:
    """Muon, AdamW, their state and the average of the weights included: none of it lives in bf16."""
    overrides = ["strategy=fsdp", "optimizer=muon", "callbacks.ema.decay=0.9", "trainer.val_check_interval=4", "schedule=constant"]
    whole, half = run_ranks(2, stopped_and_resumed, folder, *overrides)[0]
    assert whole[2:] == half[-2:] and "val/loss" in whole[-1]
