"""`export format=litert`: what is refused, what is passed to the other environment, and the folder. The conversion itself takes litert-torch, and
half a minute for each kind of model: `make litert` does it, and the slow test here."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from jobs import run_tiny
from meshformer.bench.litert import MODELS, compare
from meshformer.cli import main
from meshformer.huggingface import load_pretrained
from meshformer.job.litert import Served, _write_beside, example_inputs
from meshformer.model import Transformer, VisionTransformer, generate

ROOT = Path(__file__).parents[1]
VENV = ROOT / ".venv-litert" / "bin" / "python"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("litert")
    run_tiny(folder, "run", "trainer.max_steps=2", "callbacks.checkpoint.every_n_steps=2", "model.zero_init=false")
    return folder


class Made:
    """Stands for litert_torch's converter: the file that it writes is the graph."""

    def __init__(self, name: str, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        assert name == "serving_default" and args == ()
        self.module, self.kwargs = module, kwargs

    def convert(self) -> Made:
        return self

    def export(self, path: str) -> None:
        torch.export.save(torch.export.export(self.module, (), self.kwargs), path)


class Interpreter:
    """Stands for LiteRT's: runs the graph with torch."""

    wrong_by = 0.0

    def __init__(self, path: str) -> None:
        self.program = torch.export.load(path)

    def get_input_details(self) -> list[dict[str, Any]]:
        assert self.program.example_inputs is not None
        return [{"shape": list(self.program.example_inputs[1]["tokens"].shape)}]

    def get_signature_runner(self, name: str) -> Any:
        module = self.program.module()

        def run(**inputs: Any) -> dict[str, Any]:
            out = module(**{k: torch.from_numpy(v) for k, v in inputs.items()})
            return {k: v.detach().numpy() + float(self.wrong_by) for k, v in out.items()}

        return run


def run_there(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
    """A script for the other environment, run in this process: importing torch in another takes seconds."""
    assert command[1] == "-I", "nothing of this environment is imported there"
    out, failed = io.StringIO(), None
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(sys, "argv", command[2:])
        patch.setitem(sys.modules, "litert_torch", SimpleNamespace(signature=Made))
        patch.setitem(sys.modules, "ai_edge_litert", SimpleNamespace())
        patch.setitem(sys.modules, "ai_edge_litert.interpreter", SimpleNamespace(Interpreter=Interpreter))
        try:
            runpy.run_path(command[2], run_name="__main__")
        except ValueError as error:
            failed = f"Traceback (most recent call last):\n  …\nValueError: {error}\n"
    return subprocess.CompletedProcess(command, int(failed is not None), out.getvalue(), failed or "")


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The other environment's Python, which only knows its versions; what is run there runs here, on the real graph."""
    monkeypatch.setattr("meshformer.job.litert.subprocess", SimpleNamespace(run=run_there))
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 2.13.0+cpu 0.10.0 2.3.0\n")
    python.chmod(0o755)
    return python


def export(work: Path, *words: str | Path) -> int:
    return main(["export", f"run={work}/run", "format=litert", *map(str, words)])


def test_the_folder_holds_the_file_the_tokenizer_and_a_script_that_runs_it(
    work: Path, stand_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(work, f"litert.python={stand_in}", f"output={tmp_path}/out") == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["model.tflite", "run.py", "tokenizer.json"]
    assert not (tmp_path / "out.tmp").exists() and "largest difference from the model's outputs: " in capsys.readouterr().out
    run = [str(stand_in), "-I", str(tmp_path / "out" / "run.py"), "abc ", "40"]
    printed = run_there(run).stdout.removesuffix("\n")
    model, ids = load_pretrained(work / "run"), [load_ids(work, letter) for letter in "abc "]
    expected = generate(model, torch.tensor([ids]), 40, temperature=0)[0].tolist()
    assert [load_ids(work, letter) for letter in printed] == expected, "beyond the context of 16 tokens as well"
    assert export(work, f"litert.python={stand_in}", f"output={tmp_path}/out") == 2
    assert "it is there already" in capsys.readouterr().err


def load_ids(work: Path, letter: str) -> int:
    from meshformer.data import load_tokenizer

    return int(load_tokenizer(work / "run" / "tokenizer.json").encode(letter)[0])


@pytest.mark.parametrize(
    ("words", "wrong_by", "message"),
    [
        (["litert.length=17"], 0, "litert.length=17: the model sees 16 tokens. Use 16 at most"),
        (["output=x.tflite"], 0, "what format=litert writes is a folder"),
        ([], 0.5, "the converted model's outputs differ from the model's by 5.0e-01"),
        ([], "none", "litert-torch could not convert the model (ValueError: could not convert string to float"),
    ],
)
def test_what_cannot_be_written_is_one_sentence_and_leaves_nothing(
    words: list[str], wrong_by: Any, message: str, work: Path, stand_in: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(Interpreter, "wrong_by", wrong_by)
    assert export(work, f"litert.python={stand_in}", *words) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1, error
    assert not (work / "run" / "exports").exists() or not list((work / "run" / "exports").iterdir())


def test_an_environment_that_is_missing_or_another_is_told_at_once(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(work, f"litert.python={tmp_path}/none") == 2
    assert "no Python at that place. Make it in a checkout with `make litert`" in capsys.readouterr().err
    old = tmp_path / "python"
    for code, message in (("echo 2.9.1 0.10 2.3", "it has torch 2.9.1, which may not read"), ("exit 1", "it has no torch, litert-torch")):
        old.write_text(f"#!/bin/sh\n{code}\n")
        old.chmod(0o755)
        assert export(work, f"litert.python={old}") == 2
        assert message in capsys.readouterr().err


def test_the_default_environment_is_that_of_the_checkout_not_of_the_folder_one_stands_in(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planted = tmp_path / "here" / ".venv-litert" / "bin" / "python"
    planted.parent.mkdir(parents=True)
    planted.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    planted.chmod(0o755)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("meshformer.command.conversion.__file__", str(tmp_path / "checkout" / "src" / "meshformer" / "command" / "conversion.py"))
    assert export(work) == 2
    assert f"litert.python={tmp_path}/checkout/.venv-litert/bin/python: " in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


@torch.no_grad()
def test_the_inputs_have_fixed_shapes_and_names() -> None:
    encoder = Transformer(19, 1, 2, 16, 12, causal=False).eval()
    inputs = example_inputs(encoder, 8)
    assert {name: (tuple(x.shape), x.dtype) for name, x in inputs.items()} == {
        "tokens": ((1, 8), torch.int32), "mask": ((1, 8), torch.int32)
    }  # fmt: skip
    assert inputs["mask"].tolist() == [[1] * 6 + [0] * 2]
    (logits,) = Served(encoder)(**inputs).values()
    torch.testing.assert_close(logits[:, :6], encoder(inputs["tokens"][:, :6]), atol=1e-5, rtol=0)
    assert list(Served(Transformer(19, 1, 2, 16, 12, head=False))(**example_inputs(Transformer(19, 1, 2, 16, 12)))) == ["hidden"]
    vision = VisionTransformer(8, 4, 1, 2, 16, colours=3, classes=3).eval()
    images = example_inputs(vision)
    assert images["images"].shape == (1, 8, 8, 3) and Served(vision)(**images)["logits"].shape == (1, 3)


def test_a_classifier_has_the_names_of_its_classes_and_its_pooling(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    config = {name: {} for name in ("model", "trainer", "stage", "strategy", "paths")}
    config |= {"data": {"classes": ["ham", "spam"]}, "task": {"_target_": "meshformer.tasks.SequenceClassification", "pooling": "first"}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    encoder = Transformer(19, 1, 2, 16, 12, causal=False, outputs=2, tie_embeddings=False)
    for pooling in ("first", "mean"):
        (run / "config.yaml").write_text(yaml.safe_dump({**config, "task": {**config["task"], "pooling": pooling}}))
        (tmp_path / pooling).mkdir()
        _write_beside(encoder, run, tmp_path / pooling, tokenizer="{}")
        assert (tmp_path / pooling / "labels.txt").read_text() == "ham\nspam\n"
        assert f'parent, "{pooling}"\n' in (tmp_path / pooling / "run.py").read_text()


@pytest.mark.slow
@pytest.mark.skipif(not os.access(VENV, os.X_OK), reason="no .venv-litert: `make litert` makes it")
@pytest.mark.parametrize("name", MODELS)
def test_the_file_gives_the_models_outputs_and_tokens(name: str) -> None:
    assert len(list(compare(name))) == 4  # it raises where anything differs
