"""`meshformer convert`, and the other commands on what it makes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from jobs import TINY, text_file
from meshformer.checkpoint.read import read_into, read_rest, read_tensors, tensor_sizes
from meshformer.checkpoint.weights import load_weights
from meshformer.cli import main
from meshformer.command.compose import read_config
from meshformer.config.errors import ConfigError
from meshformer.job.build import build_model
from meshformer.record.metrics_csv import read_metrics

STEP = "step-00000004"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("convert")
    text_file(folder)
    settings = [*TINY, f"data.files=[{folder}/text.txt]", f"paths.data={folder}/cache", f"hydra.run.dir={folder}/run", "schedule=constant"]
    assert main(["train", *settings, "trainer.max_steps=6", "callbacks.checkpoint.every_n_steps=2"]) == 0
    return folder


@pytest.fixture
def run(work: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(work / "run", tmp_path / "run"))


def convert(*words: str | Path) -> int:
    return main(["convert", *map(str, words)])


def same_tensors(one: Path, other: Path) -> bool:
    a, b = read_tensors(one), read_tensors(other)
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def same(one: Path, other: Path) -> bool:
    return same_tensors(one, other) and read_rest(one) == read_rest(other)


def test_a_single_file_and_a_folder_again_hold_the_same_bits(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run / "checkpoints" / STEP
    assert convert(f"run={run}", "to=single", "checkpoint=4") == 0
    single = run / "exports" / f"{STEP}.ckpt"
    printed = capsys.readouterr().out
    assert str(single) in printed and "step 4" in printed and "weights_only=True" in printed
    assert same(single, folder)
    assert tensor_sizes(single) == tensor_sizes(folder)
    assert convert(f"run={single}", "to=sharded") == 0
    assert str(run / "exports" / STEP) in capsys.readouterr().out
    assert same(run / "exports" / STEP, folder)
    assert convert(f"run={run / 'exports' / STEP}", "to=single", f"output={run}/again, [1].ckpt") == 0
    assert same(run / "again, [1].ckpt", folder)
    held = torch.load(single, weights_only=True)
    assert held["tensors"].keys() == read_tensors(folder).keys() and held["rest"]["step"] == 4, "readable without this project"


def test_safetensors_hold_the_weights_tied_ones_once(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(f"run={run}", "to=safetensors") == 0
    file = run / "exports" / "step-00000006.safetensors"
    assert "safetensors.torch.load_file" in capsys.readouterr().out
    expected = {k.removeprefix("model."): x for k, x in read_tensors(run / "checkpoints" / "step-00000006", "model.").items()}
    stored = safetensors.torch.load_file(file)
    assert expected.keys() - stored.keys() == {"head.weight"}
    assert all(torch.equal(x, expected[name]) for name, x in stored.items())
    with safetensors.safe_open(file, framework="pt") as opened:
        about = opened.metadata()
    assert about["format"] == "pt" and json.loads(about["step"]) == 6 and json.loads(about["names"]) == list(expected)
    assert json.loads(about["tied"]) == {"head.weight": "embedding.tokens.weight"} and json.loads(about["model"])["d_model"] == 32
    # Our readers show tied weights under both names, and have no state of training.
    assert {k.removeprefix("model.") for k in read_tensors(file)} == expected.keys()
    model = build_model(read_config(run))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    load_weights(model, file)
    assert all(torch.equal(x, expected[name]) for name, x in model.state_dict().items())
    with pytest.raises(ConfigError, match="holds weights alone"):
        read_rest(file)


def test_equal_weights_are_tied_only_where_the_optimizer_knows_one_of_them(run: Path) -> None:
    """Norm gains may be equal by chance; other programs expect each of them."""
    for name in ("attention_norm.weight", "mlp_norm.weight"):
        assert f"model.blocks.0.{name}" in tensor_sizes(run / "checkpoints" / STEP)
    single = run / "checkpoints" / "step-00000009.ckpt"
    tensors, rest = read_tensors(run / "checkpoints" / STEP), read_rest(run / "checkpoints" / STEP)
    tensors = {k: torch.ones_like(x) if "norm" in k and k.startswith("model.") else x for k, x in tensors.items()}
    torch.save({"tensors": tensors, "rest": rest}, single)
    assert convert(f"run={single}", "to=safetensors") == 0
    stored = safetensors.torch.load_file(run / "exports" / "step-00000009.safetensors")
    assert tensors.keys() - {f"model.{k}" for k in stored} - {k for k in tensors if k.startswith("optimizer")} == {"model.head.weight"}


def test_reading_parts_of_single_files(run: Path) -> None:
    for to in ("single", "safetensors"):
        assert convert(f"run={run}", f"to={to}") == 0
    expected = read_tensors(run / "checkpoints" / "step-00000006", "model.")
    for suffix in ("ckpt", "safetensors"):
        got = {k: torch.zeros_like(x) for k, x in expected.items()}
        read_into(run / "exports" / f"step-00000006.{suffix}", got)
        assert all(torch.equal(got[k], x) for k, x in expected.items())
        with pytest.raises(ConfigError, match="missing in the checkpoint"):
            read_into(run / "exports" / f"step-00000006.{suffix}", {"model.other": torch.zeros(1)})


# --- single files and checkpoints in a run, read by the other commands


@pytest.fixture
def only_single(run: Path) -> Path:
    """The run with one checkpoint, a single file."""
    assert convert(f"run={run}", "to=single", "checkpoint=4", f"output={run}/checkpoints/{STEP}.ckpt") == 0
    for folder in (run / "checkpoints").glob("step-*"):
        if folder.is_dir():
            shutil.rmtree(folder)
    return run


def evaluated(capsys: pytest.CaptureFixture[str], run: Path) -> tuple[str, float]:
    capsys.readouterr()
    assert main(["evaluate", f"run={run}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    return lines[0], next(float(line.split()[1]) for line in lines if line.startswith("  val/loss"))


def test_evaluate_and_generate_read_a_named_checkpoint(
    run: Path, only_single: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = work / "run" / "checkpoints" / STEP
    shown, loss = evaluated(capsys, folder)
    newest = evaluated(capsys, work / "run")
    assert shown == str(folder) and newest[0].endswith("step-00000006") and newest[1] != loss
    assert evaluated(capsys, only_single) == (str(run / "checkpoints" / f"{STEP}.ckpt"), loss)
    assert evaluated(capsys, only_single / "checkpoints" / f"{STEP}.ckpt")[1] == loss
    texts = []
    for source in (folder, only_single, work / "run"):
        assert main(["generate", f"run={source}", "prompt=abc", "max_tokens=40", "seed=3"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_resume_from_a_single_file_is_exact(only_single: Path, work: Path) -> None:
    assert main(["train", f"resume={only_single}", "trainer.max_steps=6"]) == 0
    rows = [read_metrics(folder / "metrics.csv") for folder in (only_single, work / "run")]
    assert [r["train/loss"] for r in rows[0]] == [r["train/loss"] for r in rows[1]]
    resumed, whole = (folder / "checkpoints" / "step-00000006" for folder in (only_single, work / "run"))
    assert same_tensors(resumed, whole)
    for key in ("step", "optimizer_states", "lr_schedulers", "TextData"):
        assert read_rest(resumed)[key] == read_rest(whole)[key]
    assert (only_single / "checkpoints" / f"{STEP}.ckpt").is_file()


def test_single_files_are_never_removed(only_single: Path) -> None:
    settings = ["callbacks.checkpoint.every_n_steps=1", "callbacks.checkpoint.keep_last=1"]
    assert main(["train", f"resume={only_single}", "trainer.max_steps=7", *settings]) == 0
    assert sorted(p.name for p in (only_single / "checkpoints").iterdir()) == [f"{STEP}.ckpt", "step-00000007"]


@pytest.mark.parametrize("source", ["folder", "single"])
def test_finetune_starts_from_a_named_checkpoint(
    only_single: Path, work: Path, tmp_path: Path, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = work / "run" / "checkpoints" / STEP if source == "folder" else only_single / "checkpoints" / f"{STEP}.ckpt"
    settings = [
        *TINY,
        f"data.files=[{work}/text.txt]",
        f"paths.data={work}/cache",
        f"hydra.run.dir={tmp_path}/tuned",
        "trainer.max_steps=1",
    ]
    assert main(["train", *settings, "stage=finetune", f"stage.init_from={checkpoint}", "stage.lr_scale=1e-9"]) == 0
    assert read_config(tmp_path / "tuned")["stage"]["init_from"] == str(checkpoint)
    tuned = read_metrics(tmp_path / "tuned" / "metrics.csv")[-1]["val/loss"]
    assert tuned == pytest.approx(evaluated(capsys, checkpoint)[1], abs=1e-4) != pytest.approx(evaluated(capsys, work / "run")[1], abs=1e-4)


# --- mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run={run}"], "to: needs a value"),
        (["run={run}", "to=onnx"], "to=onnx: expected one of sharded, single, safetensors"),
        (["to=single"], "run: needs a value"),
        (["run={run}/nothing.ckpt", "to=sharded"], "there is no such file"),
        (["run={run}/checkpoints/step-00000005", "to=single"], "there is no such checkpoint"),
        (["run={run}", "to=single", "checkpoint=5"], "checkpoint=5: the run has no such checkpoint"),
        (["run={run}/checkpoints/step-00000004", "to=single", "checkpoint=4"], "run= names a checkpoint already"),
        (["run={run}/text.safetensors", "to=single"], "holds weights alone"),
        (["run={run}", "to=single", "output={run}/a.safetensors"], "what to=single writes ends in .ckpt"),
        (["run={run}", "to=sharded", "output={run}/a.ckpt"], "is a folder"),
        (["run={run}", "to=sharded", "output={run}/checkpoints"], "it is there already"),
        (["run={run}", "to=sharded", "output={run}/run.json/a"], "run.json is a file"),
        (["run={run}", "to=sharded", "outptu=x"], "outptu"),
        (["-m", "run={run}", "to=single,sharded"], "--multirun"),
    ],
)
def test_mistakes_are_one_sentence_without_torch(work: Path, words: list[str], message: str) -> None:
    (work / "run" / "text.safetensors").touch()
    before = sorted(p for p in work.rglob("*"))
    script = "import sys; from meshformer.cli import main; c = main(sys.argv[1:]); print('TORCH', 'torch' in sys.modules); sys.exit(c)"
    done = subprocess.run(
        [sys.executable, "-c", script, "convert", *(word.format(run=work / "run") for word in words)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "TORCH False" in done.stdout
    assert sorted(p for p in work.rglob("*")) == before


def test_a_damaged_file_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content in (b"", b"PK\x03\x04 torn", b"hello"):
        (run / "a.ckpt").write_bytes(content)
        assert convert(f"run={run}/a.ckpt", "to=sharded") == 2
        assert "the checkpoint is damaged: a.ckpt: no whole archive" in capsys.readouterr().err
    torch.save({"state_dict": {}}, run / "a.ckpt")
    assert convert(f"run={run}/a.ckpt", "to=sharded") == 2
    assert "cannot be read as a checkpoint" in capsys.readouterr().err
    assert not (run / "a").exists()


def test_evaluate_names_the_checkpoints_when_one_is_not_there(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", f"run={run}/checkpoints/step-00000005"]) == 2
    message = capsys.readouterr().err
    assert "there is no such checkpoint" in message and "Did you mean step-0000000" in message
