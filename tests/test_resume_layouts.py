"""A run saved in any layout goes on in any other, also on another number of processes, as if nothing had happened."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from harness import run_ranks
from jobs import run_tiny, text_file, tiny_config
from layouts import layouts

STEPS, SAVED = 18, 8  # resumed for ten steps
COMMON = [
    "data.batch_size=16", "model.n_kv_heads=2", "trainer.val_check_interval=5", f"callbacks.checkpoint.every_n_steps={SAVED}",
    "schedule=cosine", "schedule.warmup_steps=3", f"trainer.max_steps={STEPS}",
]  # fmt: skip
ADAMW = ["optimizer=adamw", "optimizer.lr=3e-3"]
MUON = ["optimizer=muon", "optimizer.lr=2e-3", "optimizer.adamw_lr=1e-3"]
TOLERANCE = 5e-6
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    **layouts(fsdp_pipeline=["strategy.microbatches=4"], tensor_pipeline=["strategy.microbatches=4"]),
    "single": (1, ["strategy=single"]),
    "ddp, accumulated": (2, ["strategy=ddp", "trainer.accumulate_grad_batches=2"]),
    "fsdp, four": (4, ["strategy=fsdp"]),
    "interleaved": (2, ["strategy=pipeline", "strategy.schedule=interleaved_1f1b"]),
}
# (saved in, resumed in)
PAIRS = [
    ("single", "fsdp"),
    ("ddp", "hsdp"),
    ("fsdp", "single"),
    ("fsdp", "fsdp, four"),
    ("fsdp, four", "ddp, accumulated"),
    ("tensor", "pipeline"),
    ("context", "fsdp_tensor"),
    ("pipeline", "single"),
    ("pipeline", "interleaved"),
    ("interleaved", "fsdp"),
    ("fsdp_tensor", "fsdp_pipeline"),
    ("fsdp_pipeline", "tensor"),
]
REPEATED = [("tensor", "pipeline"), ("interleaved", "fsdp")]  # what two others read and write


def rows(folder: Path, name: str, overrides: list[str], resume: bool = False) -> list[dict[str, Any]]:
    return run_tiny(folder, name, *COMMON, *overrides, resume=resume)


class Runs:
    """Whole runs, each trained once; and copies of them that end with their checkpoint of step SAVED."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.known: dict[tuple[str, ...], tuple[str, list[dict[str, Any]]]] = {}
        text_file(folder, letters="abcdefghijk")

    def whole(self, layout: str, *settings: str) -> tuple[str, list[dict[str, Any]]]:
        key = (layout, *settings)
        if key not in self.known:
            processes, overrides = LAYOUTS[layout]
            name = f"whole-{len(self.known)}"
            overrides = [*overrides, *settings, f"trainer.devices={processes}"]
            tiny_config(self.folder, *COMMON, *overrides)  # once, for all ranks
            found = run_ranks(processes, rows, self.folder, name, overrides)[0]
            self.known[key] = name, found
        return self.known[key]

    def stopped(self, layout: str, *settings: str) -> str:
        name, _ = self.whole(layout, *settings)
        copy = f"stopped-{len(list(self.folder.iterdir()))}"
        shutil.copytree(self.folder / name, self.folder / copy)
        for checkpoint in (self.folder / copy / "checkpoints").glob("step-*"):
            if int(checkpoint.name.removeprefix("step-")) > SAVED:
                shutil.rmtree(checkpoint)
        return copy

    def resumed(self, name: str, layout: str, *settings: str) -> list[dict[str, Any]]:
        processes, overrides = LAYOUTS[layout]
        overrides = [*overrides, *settings, f"trainer.devices={processes}"]
        tiny_config(self.folder, *COMMON, *overrides)
        return run_ranks(processes, rows, self.folder, name, overrides, True)[0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("matrix"))


def check_continues(ours: list[dict[str, Any]], whole: list[dict[str, Any]]) -> None:
    assert [r["step"] for r in ours] == [r["step"] for r in whole] == list(range(1, STEPS + 1))
    assert [(r["samples"], r["epoch"], r["train/lr"]) for r in ours] == [(r["samples"], r["epoch"], r["train/lr"]) for r in whole]
    for key in ("train/loss", "val/loss"):
        found = max(abs(a[key] - b[key]) for a, b in zip(ours[SAVED:], whole[SAVED:], strict=True) if key in b)
        assert found < TOLERANCE, (key, found)


@pytest.mark.parametrize(
    ("saved", "resumed"), [pytest.param(a, b, id=f"{a} to {b}", marks=[pytest.mark.slow] * ((a, b) in REPEATED)) for a, b in PAIRS]
)
def test_a_run_saved_in_one_layout_goes_on_in_another(runs: Runs, saved: str, resumed: str) -> None:
    settings = [*ADAMW] + ["model.n_layers=4"] * ("interleaved" in (saved, resumed))
    _, whole = runs.whole("single", *settings)
    check_continues(runs.resumed(runs.stopped(saved, *settings), resumed, *settings), whole)


@pytest.mark.parametrize(("saved", "resumed"), [("fsdp", "pipeline"), ("pipeline", "single")])
def test_three_groups_of_two_methods_find_their_parameters(runs: Runs, saved: str, resumed: str) -> None:
    """Muon's groups: matrices, and AdamW with and without decay; a middle pipeline rank has none of the second."""
    untied = [*MUON, "model.tie_embeddings=false"]
    _, whole = runs.whole("single", *untied)
    check_continues(runs.resumed(runs.stopped(saved, *untied), resumed, *untied), whole)


@pytest.mark.parametrize("layout", ["single", "fsdp"])
def test_a_checkpoint_saved_in_the_background_is_the_same(runs: Runs, layout: str) -> None:
    _, whole = runs.whole("single", *ADAMW)
    name = runs.stopped(layout, *ADAMW, "callbacks.checkpoint.asynchronous=true")
    check_continues(runs.resumed(name, "tensor", *ADAMW), whole)


def test_negative_control_lost_optimizer_state_is_seen(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    from meshformer.parallel import strategy

    def forgets(path: Any, optimizer: Any, groups: Any) -> Any:
        return {**strategy_read(path, optimizer, groups), "state": {}}

    strategy_read = strategy.read_optimizer
    monkeypatch.setattr(strategy, "read_optimizer", forgets)
    _, whole = runs.whole("single", *ADAMW)
    with pytest.raises(AssertionError, match="train/loss"):
        check_continues(runs.resumed(runs.stopped("fsdp", *ADAMW), "fsdp", *ADAMW), whole)
