"""The commands as a user types them: train, resume, fork, evaluate, generate, fine-tune; and what they leave in the run folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import TINY, text_file
from meshformer.cli import main
from meshformer.record import RunRecord
from meshformer.record.metrics_csv import read_metrics


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    text_file(folder)
    return folder


def command(work: Path, *words: str) -> int:
    return main([words[0], f"paths.runs={work}/runs", *words[1:]])


def tiny(work: Path, name: str, *overrides: str) -> Path:
    run = work / name
    settings = [
        *TINY,
        f"data.files=[{work}/text.txt]",
        f"paths.data={work}/cache",
        f"hydra.run.dir={run}",
        "trainer.max_steps=12",
        "schedule.warmup_steps=2",
    ]
    assert command(work, "train", *settings, *overrides) == 0
    return run


@pytest.fixture(scope="module")
def run(work: Path) -> Path:
    return tiny(work, "first", "callbacks.checkpoint.every_n_steps=4")


def test_the_run_folder_holds_what_analysis_needs(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    assert record["state"] == "finished"
    assert record["parameters"] > 0
    assert record["final"]["val/loss"] == read_metrics(run / "metrics.csv")[-1]["val/loss"]
    assert record["layout"]["name"] == "single"
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["vocab_size"] == json.loads((run / "tokenizer.json").read_text()).get(
        "vocab_size", config["model"]["vocab_size"]
    )
    assert "${" not in (run / "config.yaml").read_text(), "the recorded configuration must be resolved"
    assert "data.batch_size=8" in (run / "overrides.txt").read_text().splitlines()
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000004", "step-00000008", "step-00000012"]
    assert not (run / ".hydra").exists()


def test_metrics_have_the_contracts_columns(run: Path) -> None:
    header = (run / "metrics.csv").read_text().splitlines()[0].split(",")
    assert header[:8] == ["step", "epoch", "samples", "train/loss", "train/grad_norm", "train/lr", "train/tokens_per_second", "val/loss"]
    rows = read_metrics(run / "metrics.csv")
    assert [r["samples"] for r in rows] == [8 * r["step"] for r in rows]


def test_evaluate_repeats_the_validation_loss_of_training(run: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(work, "evaluate", f"run={run}") == 0
    shown = {line.split()[0]: float(line.split()[1]) for line in capsys.readouterr().out.splitlines() if line.startswith("  val/")}
    assert shown["val/loss"] == pytest.approx(read_metrics(run / "metrics.csv")[-1]["val/loss"], abs=1e-5)


def test_generate_needs_the_run_folder_alone(run: Path, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    words = [f"run={moved}", "prompt=abc", "max_tokens=30", "seed=3", f"paths.runs={tmp_path}"]
    shutil.move(work / "text.txt", work / "hidden.txt")
    try:
        texts = []
        for _ in range(2):
            assert main(["generate", *words]) == 0
            texts.append(capsys.readouterr().out)
    finally:
        shutil.move(work / "hidden.txt", work / "text.txt")
    assert texts[0] == texts[1]
    assert texts[0].startswith("abc")
    assert len(texts[0].rstrip("\n")) >= 30


def test_resume_continues_in_the_same_folder(work: Path) -> None:
    run = tiny(work, "resumed", "schedule=constant")
    assert command(work, "train", f"resume={run}", "trainer.max_steps=15") == 0
    assert [r["step"] for r in read_metrics(run / "metrics.csv")] == list(range(1, 16))
    assert json.loads((run / "run.json").read_text())["state"] == "finished"
    assert json.loads((run / "run.json").read_text())["segments"], "the first segment stays in the record"


def test_resume_refuses_another_optimisation_by_key(run: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "config.yaml").read_bytes()
    assert command(work, "train", f"resume={run}", "optimizer.lr=0.5") == 2
    assert "optimizer.lr" in capsys.readouterr().err
    assert (run / "config.yaml").read_bytes() == before


def test_fork_starts_from_the_state_in_a_new_folder(run: Path, work: Path) -> None:
    forked = work / "forked"
    rows = read_metrics(run / "metrics.csv")
    assert command(work, "train", f"fork={run}", f"hydra.run.dir={forked}", "trainer.max_steps=14", "optimizer.adamw_lr=0.001") == 0
    assert [r["step"] for r in read_metrics(forked / "metrics.csv")] == [13, 14]
    assert read_metrics(run / "metrics.csv") == rows, "the run it came from stays as it was"


def test_finetune_takes_weights_and_tokenizer(run: Path, work: Path) -> None:
    tuned = tiny(work, "tuned", "stage=finetune", f"stage.init_from={run}", "trainer.max_steps=3", "stage.lr_scale=1e-6", "seed=7")
    assert (tuned / "tokenizer.json").read_text() == (run / "tokenizer.json").read_text()
    before, after = read_metrics(run / "metrics.csv")[-1]["val/loss"], read_metrics(tuned / "metrics.csv")[-1]["val/loss"]
    assert after == pytest.approx(before, abs=1e-2), "with hardly any learning rate, the loss stays that of the pretrained weights"


def test_a_used_folder_is_refused_and_left_alone(run: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    settings = [*TINY, f"data.files=[{work}/text.txt]", f"hydra.run.dir={run}", "trainer.max_steps=2"]
    assert command(work, "train", *settings) == 2
    assert str(run) in capsys.readouterr().err
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_finetune_takes_the_models_shape_from_the_run_unless_told(work: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = tiny(work, "wide", "model.d_model=48", "model/position=learned", "model.n_kv_heads=2", "trainer.max_steps=2")
    settings = [s for s in TINY if not s.startswith("model")] + [f"data.files=[{work}/text.txt]", f"paths.data={work}/cache"]
    settings += ["stage=finetune", f"stage.init_from={wide}", "trainer.max_steps=1"]
    assert command(work, "train", *settings, f"hydra.run.dir={work}/adopted", "data.context_length=8") == 0
    model = yaml.safe_load((work / "adopted" / "config.yaml").read_text())["model"]
    assert (model["d_model"], model["n_kv_heads"], model["context_length"]) == (48, 2, 16)
    assert model["position"]["_target_"].endswith("Learned")
    capsys.readouterr()
    assert command(work, "train", *settings, "model.d_model=64", f"hydra.run.dir={work}/refused") == 2
    assert "model.d_model=64" in capsys.readouterr().err
    assert not (work / "refused").exists()


def test_the_last_validation_is_of_the_last_step(work: Path) -> None:
    run = tiny(work, "late", "trainer.max_steps=7", "trainer.val_check_interval=4")
    validated = {r["step"]: r["val/loss"] for r in read_metrics(run / "metrics.csv") if "val/loss" in r}
    assert list(validated) == [4, 7]
    assert json.loads((run / "run.json").read_text())["final"]["val/loss"] == validated[7]


def test_a_resume_on_other_text_is_refused_and_changes_neither_tokenizer_nor_weights(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = work / "changing.txt"
    text.write_text((work / "text.txt").read_text())
    run = tiny(work, "swapped", f"data.files=[{text}]")
    text.write_text(text.read_text().replace("a", "Z"))
    before = (run / "tokenizer.json").read_bytes()
    capsys.readouterr()
    assert command(work, "train", f"resume={run}", "trainer.max_steps=20") == 2
    assert "other text" in capsys.readouterr().err
    assert (run / "tokenizer.json").read_bytes() == before
    assert command(work, "generate", f"run={run}", "prompt=a", "max_tokens=3") == 0


def test_resuming_a_finished_run_asks_for_more_steps(run: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(work, "train", f"resume={run}") == 2
    assert "trainer.max_steps=12" in capsys.readouterr().err


def test_a_fork_with_another_batch_size_resumes_exactly(run: Path, work: Path) -> None:
    settings = [f"fork={run}", "data.batch_size=4", "schedule=constant"]
    whole, halves = work / "fork-whole", work / "fork-halves"
    assert command(work, "train", *settings, f"hydra.run.dir={whole}", "trainer.max_steps=24") == 0
    assert command(work, "train", *settings, f"hydra.run.dir={halves}", "trainer.max_steps=18") == 0
    assert command(work, "train", f"resume={halves}", "trainer.max_steps=24") == 0
    expected, resumed = (
        {r["step"]: (r["train/loss"], r["samples"]) for r in read_metrics(folder / "metrics.csv")} for folder in (whole, halves)
    )
    assert resumed == expected
    assert expected[13][1] == 12 * 8 + 4


def test_a_text_without_a_newline_trains_to_the_end(work: Path) -> None:
    text = work / "one-line.txt"
    text.write_text((work / "text.txt").read_text().replace("\n", " "))
    tiny(work, "one-line", f"data.files=[{text}]", "trainer.max_steps=2")


def test_bf16_true_sums_its_losses_in_double_precision(run: Path, work: Path) -> None:
    half = tiny(work, "half", "trainer.precision=bf16-true", "data.eval_batch_size=1")
    losses = [read_metrics(folder / "metrics.csv")[-1]["val/loss"] for folder in (half, run)]
    assert losses[0] == pytest.approx(losses[1], abs=0.02)


def test_the_logged_rate_is_the_one_the_step_used(work: Path) -> None:
    run = tiny(work, "rates", "optimizer=sgd", "optimizer.lr=0.1", "schedule=linear", "schedule.warmup_steps=2", "trainer.max_steps=4")
    rates = [r["train/lr"] for r in read_metrics(run / "metrics.csv")]
    assert rates == pytest.approx([0.05, 0.1, 0.1, 0.05])  # up in two steps, then down a line that would reach 0 after the last


@pytest.mark.parametrize("stepped", [False, True])
def test_a_new_folder_is_forgotten_only_before_its_first_step(work: Path, monkeypatch: pytest.MonkeyPatch, stepped: bool, capsys: Any) -> None:
    """Ctrl-C: else `last` would name a folder from which nothing can be read."""

    def interrupted(config: dict[str, Any], folder: Path) -> None:
        if stepped:
            RunRecord(folder).start()
        raise KeyboardInterrupt

    monkeypatch.setattr("meshformer.command.jobs._launch", interrupted)
    assert main(["train", *TINY, f"data.files=[{work}/text.txt]", f"paths.runs={work}/interrupted{stepped}"]) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")
    assert (work / f"interrupted{stepped}").exists() == stepped


def test_a_resumed_run_that_is_interrupted_at_once_is_as_before(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(config: dict[str, Any], folder: Path) -> None:
        raise KeyboardInterrupt

    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    monkeypatch.setattr("meshformer.command.jobs._launch", interrupted)
    assert main(["train", f"resume={run}", "trainer.max_steps=20"]) == 130
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
