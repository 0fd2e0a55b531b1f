"""The model of docs/make_it_yours/model.md, plain PyTorch in a file outside the checkout, trains to the same loss in every layout."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import jobs
from harness import RankFailed, run_ranks
from jobs import run_tiny, text_file
from layouts import layouts, params
from meshformer.model.meta_device import parameters_on_meta
from meshformer.record.metrics_csv import read_metrics
from test_own_attention import SOURCE as GATED

PAGE = Path(__file__).parents[1] / "docs" / "make_it_yours" / "model.md"
OWN = [
    "~model", "+model={_target_: my_model.Net, vocab_size: null, width: 32, length: 16}", "allow=[my_model]", "optimizer=sgd", "optimizer.lr=0.3",
    "schedule=constant", "trainer.max_steps=6", "trainer.gradient_clip_val=0.5", "data.batch_size=16", "~callbacks.checkpoint",
]  # fmt: skip
TOLERANCE = 5e-6
ULYSSES = ["strategy.context_method=ulysses"]
LAYOUTS = {
    **layouts(context=ULYSSES, fsdp_context=ULYSSES, tensor_pipeline=["strategy.microbatches=4"]),
    "tensor, whole sequences": (2, ["strategy=tensor", "strategy.sequence_parallel=false"]),
    "interleaved": (2, ["strategy=pipeline", "strategy.schedule=interleaved_1f1b"]),
}


def write_module(folder: Path, change: tuple[str, str] = ("", "")) -> None:
    """The code of the page as my_model.py, with one text of it replaced by another."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(code.splitlines()) <= 80 and change[0] in code
    (folder / "my_model.py").write_text(code.replace(*change) if change[0] else code, encoding="utf-8")


def own_rows(folder: Path, name: str, overrides: list[str]) -> list[dict[str, Any]]:
    sys.path.insert(0, str(folder))
    jobs.TINY[:] = [setting for setting in jobs.TINY if not setting.startswith("model")]
    return run_tiny(folder, name, *OWN, *overrides)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("own")
    text_file(folder)
    write_module(folder)
    (rows,) = run_ranks(1, own_rows, folder, "one", [])
    assert rows[-1]["train/loss"] < rows[0]["train/loss"] - 0.05
    return folder, rows


@pytest.mark.parametrize("layout", params(LAYOUTS, ["fsdp_tensor", "fsdp_pipeline", "fsdp_context"]))
def test_every_layout_trains_it_to_the_loss_of_one_process(reference, layout: str):
    folder, rows = reference
    processes, overrides = LAYOUTS[layout]
    ours = run_ranks(processes, own_rows, folder, layout.replace(" ", "_"), [*overrides, f"trainer.devices={processes}"], timeout=240)[0]
    assert [row["step"] for row in ours] == [row["step"] for row in rows]
    for a, b in zip(ours, rows, strict=True):
        assert abs(a["train/loss"] - b["train/loss"]) < TOLERANCE
        assert abs(a["train/grad_norm"] / b["train/grad_norm"] - 1) < TOLERANCE


WRONG = {
    "a parameter that no pattern fits": (('"layers.*.o": "rows",', ""), "tensor", r"does not say how to cut layers\.0\.o\.weight"),
    "heads that do not divide": (("heads=4, length", "heads=1, length"), "tensor", r"the model's heads=1 does not divide by it"),
    "no module for each token by itself": (
        ('"*ln?": "sequence", "ln": "sequence"', '"*ln?": "replicated", "ln": "replicated"'), "tensor", r"sequence_parallel=false",
    ),
    "arithmetic behind the embedding": (("self.pos(positions)", "self.pos(positions) + 1"), "pipeline", r"changes hidden states between"),
    "a parameter of no stage": (('embed=("tok", "pos")', 'embed=("tok",)'), "pipeline", r"in which stage pos\.weight is"),
    "heads counted by a number": (("x.view(*x.shape[:2], -1, self.head_size)", "x.view(*x.shape[:2], 4, -1)"), "tensor", r"different output than"),
    "heads of a number and a size": (("-1, self.head_size)", "4, self.head_size)"), "tensor", r"the model fails: shape '\[2, 16, 4, 8\]' is invalid"),
    "q, k and v in one matrix": (
        ("self.split(self.q(h)), self.split(self.k(h)), self.split(self.v(h))", "*map(self.split, self.q(h).chunk(3, dim=-1))"),
        "tensor",
        r"a different output than unsharded",
    ),
    "keys of other processes": (("", ""), "context", r"strategy\.context_method=ulysses"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_plan_that_does_not_fit_is_refused_before_the_first_step(tmp_path: Path, case: str):
    change, layout, message = WRONG[case]
    text_file(tmp_path)
    write_module(tmp_path, change)
    if "chunk(3" in change[1]:
        text = (tmp_path / "my_model.py").read_text()
        (tmp_path / "my_model.py").write_text(text.replace("in range(4))", "in range(4))\n        self.q = nn.Linear(width, 3 * width)"))
    with pytest.raises(RankFailed, match=message):
        run_ranks(2, own_rows, tmp_path, "run", [f"strategy={layout}", "trainer.devices=2"])
    metrics = tmp_path / "run" / "metrics.csv"
    assert not metrics.exists() or read_metrics(metrics) == []


# --- weights drawn by name


BY_NAME = """self.ln, self.out = nn.LayerNorm(width), nn.Linear(width, vocab_size, bias=False)
        self.register_buffer("scale", torch.arange(width) / width + 0.5, persistent=False)

    def initial_value(self, name, shape, seed):
        generator = torch.Generator().manual_seed(seed + sum(map(ord, name)))
        return torch.ones(shape) if "ln" in name else torch.empty(shape).normal_(0, 0.1, generator=generator)"""
LN_OUT = "self.ln, self.out = nn.LayerNorm(width), nn.Linear(width, vocab_size, bias=False)"


@pytest.fixture(scope="module")
def by_name(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("by_name")
    text_file(folder)
    write_module(folder, (LN_OUT, BY_NAME))
    code = (folder / "my_model.py").read_text()
    (folder / "my_model.py").write_text(code.replace("self.out(self.ln(x))", "self.out(self.ln(x) * self.scale)"))
    return folder, run_ranks(1, own_rows, folder, "one", [])[0]


@pytest.mark.parametrize("layout", ["ddp", "fsdp", "tensor"])
def test_weights_drawn_by_name_and_a_computed_buffer_are_the_same_in_every_layout(by_name, layout: str):
    folder, rows = by_name
    ours = run_ranks(2, own_rows, folder, layout, [f"strategy={layout}", "trainer.devices=2"])[0]
    for a, b in zip(ours, rows, strict=True):
        assert abs(a["train/loss"] - b["train/loss"]) < TOLERANCE


def test_a_model_with_initial_value_is_built_without_parameters(by_name, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(by_name[0])
    with parameters_on_meta():
        net = importlib.import_module("my_model").Net(16, width=32, length=16)
        tied = nn.Linear(2, 2)
        tied.again = tied.weight
    assert all(p.is_meta for p in net.parameters()) and tied.again is tied.weight
    assert torch.equal(net.scale, torch.arange(32) / 32 + 0.5)
    assert not nn.Linear(2, 2).weight.is_meta, "afterwards, modules are built as usual"


# --- a subclass of Transformer


SUBCLASSES = f"""
{GATED}
from dataclasses import replace

class Same(Transformer):
    pass

class Planned(Gated):
    plan = replace(Transformer.plan, tensor={{"blocks.*.attention.gate": "columns", **Transformer.plan.tensor}})
"""


def subclass_rows(folder: Path, name: str, kind: str, overrides: list[str]) -> list[dict[str, Any]]:
    sys.path.insert(0, str(folder))
    own = [f"model._target_=subclasses_for_test.{kind}", "allow=[subclasses_for_test]", "model.zero_init=false", "model.qk_norm=false"]
    return run_tiny(folder, name, *own, *OWN[3:], *overrides)


@pytest.fixture(scope="module")
def subclasses(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder, known = tmp_path_factory.mktemp("subclasses"), {}
    text_file(folder)
    (folder / "subclasses_for_test.py").write_text(SUBCLASSES, encoding="utf-8")

    def reference(kind: str) -> tuple[Path, list[dict[str, Any]]]:
        if kind not in known:
            (known[kind],) = run_ranks(1, subclass_rows, folder, kind, kind, [])
        return folder, known[kind]

    return reference


@pytest.mark.parametrize(
    ("kind", "layout"), [("Same", "tensor"), ("Planned", "tensor"), ("Planned", "pipeline"), ("Planned", "context"), ("Gated", "fsdp")]
)
def test_a_subclass_and_a_weight_of_its_own_survive_the_cuts(subclasses: Any, kind: str, layout: str):
    folder, one = subclasses(kind)
    ours = run_ranks(2, subclass_rows, folder, f"{kind}-{layout}", kind, [f"strategy={layout}", "trainer.devices=2"])[0]
    for a, b in zip(ours, one, strict=True):
        assert abs(a["train/loss"] - b["train/loss"]) < TOLERANCE
        assert abs(a["train/grad_norm"] / b["train/grad_norm"] - 1) < TOLERANCE
    assert one[-1]["train/loss"] < one[0]["train/loss"] - 0.05


def test_a_weight_that_the_plan_leaves_out_is_refused_by_its_name(subclasses: Any):
    folder, _ = subclasses("Gated")
    with pytest.raises(RankFailed, match=r"does not say how to cut blocks\.0\.attention\.gate\.weight, blocks\.1"):
        run_ranks(2, subclass_rows, folder, "refused", "Gated", ["strategy=tensor", "trainer.devices=2"])


def test_the_command_on_the_page_trains_as_it_is_printed(tmp_path: Path):
    write_module(tmp_path)
    (command,) = re.findall(r"^meshformer (train .*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    short = [f"data.files=[{text_file(tmp_path, words=8000)}]", "data=text", "trainer.max_steps=2", "trainer.threads=1", "hydra.run.dir=run"]
    done = subprocess.run(
        [sys.executable, "-m", "meshformer.cli", *shlex.split(command), *short, "~callbacks.samples"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert read_metrics(tmp_path / "run" / "metrics.csv") and "generate" not in done.stdout
