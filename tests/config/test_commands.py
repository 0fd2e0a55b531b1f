"""The commands up to the hand-over: what a job is given, which folder it gets, resume and fork, sweeps, completion. No job is run."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml

from meshformer.checkpoint.find import PARTS, write_manifest
from meshformer.cli import COMMANDS, main
from meshformer.command.recorded import read_overrides, write_overrides
from meshformer.config import ConfigError
from meshformer.record.run_folder import PENDING

Calls = list[tuple[dict[str, Any], Path]]


@pytest.fixture
def calls(tmp_path, monkeypatch) -> Calls:
    """Jobs handed over; each leaves a checkpoint and, like a real one, a config.yaml with the vocabulary filled in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "HYDRA_FULL_ERROR"):
        monkeypatch.delenv(name, raising=False)
    made: Calls = []

    def launch(config: dict[str, Any], folder: Path, own_process: bool = False) -> dict[str, float]:
        made.append((config, folder))
        if (folder / PENDING).exists():  # its first step begins
            (folder / PENDING).replace(folder / "overrides.txt")
        checkpoint = folder / "checkpoints" / "step-00000002"
        checkpoint.mkdir(parents=True, exist_ok=True)
        for part in PARTS:
            (checkpoint / part).touch()
        write_manifest(checkpoint, dict.fromkeys(PARTS, (0, 0)))
        filled = {**config, "model": {**config["model"], "vocab_size": 84}}
        (folder / "config.yaml").write_text(yaml.safe_dump(filled, sort_keys=False))
        return {"val/loss": 2.0}

    monkeypatch.setattr("meshformer.command.jobs._launch", launch)
    monkeypatch.setattr("meshformer.command.launch.launch", launch)  # of the points of a sweep with Hydra's own launcher
    return made


def test_train_makes_a_folder_and_hands_over_a_plain_dict(calls, tmp_path, capsys):
    assert main(["train", "trainer.max_steps=50", "model=micro"]) == 0
    ((config, folder),) = calls
    assert folder.parent == tmp_path / "runs" / "shakespeare_char"
    assert (folder / "overrides.txt").read_text() == "trainer.max_steps=50\nmodel=micro\n"
    recorded = yaml.safe_load((folder / "config.yaml").read_text())
    assert "hydra" not in recorded and recorded["trainer"]["max_steps"] == 50 and recorded["model"]["d_model"] == 384
    assert type(config) is dict and type(config["model"]["position"]) is dict and config["trainer"]["devices"] == 1
    assert not (folder / ".hydra").exists()
    assert capsys.readouterr().err == "compile: no, the run is short\n"


def said_without_a_trace(line, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert main([*line, "--dry-run"]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    out = capsys.readouterr().out
    assert out.endswith("dry run: checked, nothing was written or started\n")
    return out


def test_a_dry_run_says_what_would_run_and_changes_nothing(calls, tmp_path, capsys):
    out = said_without_a_trace(["train", "strategy=fsdp_tensor", "trainer.devices=4", "trainer.max_steps=50"], tmp_path, capsys)
    rows = dict(re.findall(r"^(.+?) {2,}(.+)$", out, re.MULTILINE))
    assert rows["run folder"].startswith(f"{tmp_path}/runs/shakespeare_char/")
    assert rows["layout"] == "fsdp_tensor, 4 processes: shard 2 × tensor 2"
    assert rows["step"] == "16 samples of 128 tokens = 2,048 tokens; 8 a process"
    assert rows["steps"] == "50, 102,400 tokens in all" and rows["model"] == "Transformer, about 0.6 million parameters"
    assert "GB a process" in rows["memory"] and not calls
    assert main(["train", "trainer.max_steps=2"]) == 0 and len(calls) == 1
    capsys.readouterr()
    assert f"{calls[0][1]}, which goes on from step 2\n" in said_without_a_trace(["train", "resume=last", "trainer.max_steps=9"], tmp_path, capsys)
    assert len(calls) == 1
    assert main(["train", f"hydra.run.dir={calls[0][1]}", "--dry-run"]) == 2  # as without the flag
    assert "is already used" in capsys.readouterr().err
    assert main(["evaluate", "run=last", "--dry-run"]) == 2
    assert "belongs to `meshformer train`" in capsys.readouterr().err


def test_a_dry_run_of_a_sweep_lists_its_runs(calls, tmp_path, capsys):
    out = said_without_a_trace(["train", "-m", "model.n_heads=4,3", "seed=1,2"], tmp_path, capsys)
    assert "4 runs, 2 of them refused" in out and "  0  model.n_heads=4 seed=1\n" in out
    assert re.search(r"^  3  model.n_heads=3 seed=2  refused: model.d_model=128: does not divide", out, re.MULTILINE)
    assert "a search by tpe, at most 7 runs" in said_without_a_trace(["train", "-m", "sweep=search", "sweep.trials=7"], tmp_path, capsys)
    assert not calls


def test_a_folder_given_by_the_user_is_taken(calls, tmp_path):
    assert main(["train", "hydra.run.dir=here/it_is", "~experiment"]) == 0
    assert calls[0][1] == tmp_path / "here" / "it_is"
    assert calls[0][0]["experiment"] == "unnamed"


@pytest.mark.parametrize(
    ("raised", "code"), [(ConfigError("bad text"), 2), (ValueError("no luck"), 1), (KeyboardInterrupt(), 130), (SystemExit(75), None)]
)
def test_exit_codes_of_a_failing_job(calls, monkeypatch, capsys, raised, code):
    def fail(*arguments: Any, **options: Any) -> None:
        raise raised

    monkeypatch.setattr("meshformer.command.jobs._launch", fail)
    if code is None:
        with pytest.raises(SystemExit) as caught:
            main(["train"])
        assert caught.value.code == 75
        return
    assert main(["train"]) == code
    printed = capsys.readouterr().err
    assert ("Traceback" in printed) == (code == 1)
    assert code == 130 or str(raised) in printed


def test_resume_goes_on_in_the_same_folder(calls, capsys):
    assert main(["train", "seed=7"]) == 0
    folder = calls[0][1]
    assert main(["train", "resume=last", "trainer.max_steps=5000", "strategy=ddp", "logger=csv", "trainer.accumulate_grad_batches=2"]) == 0
    config, again = calls[1]
    assert again == folder and config["resume"] == str(folder)
    assert (config["trainer"]["max_steps"], config["strategy"]["replicate"], config["logger"]) == (5000, 2, {})
    assert (config["seed"], config["model"]["vocab_size"]) == (7, 84), "what was recorded stays"
    assert read_overrides(folder)[0][0] == "seed=7" and "trainer.max_steps=5000" in read_overrides(folder)[0]
    assert main(["train", f"resume={folder.name[-4:]}"]) == 0
    assert calls[2][0]["trainer"]["max_steps"] == 5000 and calls[2][0]["strategy"]["name"] == "ddp"


def test_a_resumed_runs_settings_are_written_once_its_first_step_begins(calls):
    assert main(["train", "seed=7"]) == 0
    folder = calls[0][1]
    assert main(["train", "resume=last", "trainer.max_steps=5000"]) == 0
    assert not (folder / PENDING).exists() and "trainer.max_steps=5000" in read_overrides(folder)[0]


def test_resume_and_finetuning_may_choose_another_layout(calls):
    assert main(["train", "strategy=fsdp_tensor"]) == 0
    folder = calls[0][1]
    assert main(["train", "resume=last", "strategy=pipeline", "strategy.schedule=gpipe"]) == 0
    assert main(["train", "resume=last", "strategy=hsdp", "strategy.schedule=1f1b"]) == 0
    assert main(["train", "stage=finetune", f"stage.init_from={folder}", "strategy=tensor_pipeline"]) == 0
    kept = ("name", "shard", "tensor", "pipeline", "schedule", "microbatches")
    assert [(*(config["strategy"][key] for key in kept), config["trainer"]["devices"]) for config, _ in calls] == [
        ("fsdp_tensor", 2, 2, 1, "1f1b", 1, 4),
        ("pipeline", 1, 1, 2, "gpipe", 8, 2),
        ("hsdp", 2, 1, 1, "1f1b", 1, 4),
        ("tensor_pipeline", 1, 2, 2, "1f1b", 8, 4),
    ]


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("data.batch_size=64", "data.batch_size"), ("seed=2", "seed"), ("model=micro", "model.n_layers"), ("optimizer=adamw", "optimizer._target_"),
        ("trainer.precision=bf16-true", "trainer.precision"), ("hydra.run.dir=x", "hydra.run.dir"),
    ],
)  # fmt: skip
def test_resume_refuses_what_would_make_another_run(calls, capsys, override, key):
    main(["train"])
    before = {path: path.read_bytes() for path in calls[0][1].rglob("*") if path.is_file()}
    assert main(["train", "resume=last", override]) == 2
    printed = capsys.readouterr().err
    assert f"error: {key}" in printed and "fork=" in printed
    assert len(calls) == 1
    assert {path: path.read_bytes() for path in calls[0][1].rglob("*") if path.is_file()} == before


def test_resume_does_not_notice_that_conf_has_changed_since(calls):
    main(["train"])
    file = calls[0][1] / "config.yaml"
    file.write_text(yaml.safe_dump({**(recorded := yaml.safe_load(file.read_text())), "data": {**recorded["data"], "batch_size": 16}}))
    assert main(["train", "resume=last", "trainer.max_steps=3000"]) == 0
    assert calls[1][0]["data"]["batch_size"] == 16


def test_resume_needs_a_checkpoint(calls, capsys):
    main(["train"])
    checkpoint = calls[0][1] / "checkpoints" / "step-00000002"
    checkpoint.rename(checkpoint.with_name("step-00000002.tmp"))  # what a kill inside a save leaves
    assert main(["train", "resume=last"]) == 2
    assert "no checkpoint" in capsys.readouterr().err


def test_fork_may_change_anything_in_a_new_folder(calls):
    main(["train", "seed=7"])
    assert main(["train", "fork=last", "data.batch_size=64"]) == 0
    config, folder = calls[1]
    assert folder != calls[0][1] and config["fork"] == str(calls[0][1]) and config["resume"] is None
    assert (config["seed"], config["data"]["batch_size"]) == (7, 64)
    assert read_overrides(folder)[0] == ["seed=7", "data.batch_size=64"]


def test_a_run_folder_cannot_allow_itself_to_build_things(calls, capsys, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("class Part:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["train", "+callbacks.part._target_=mine.Part", "allow=[mine]"]) == 0
    assert main(["train", "resume=last"]) == 2
    assert "allow=[mine]" in capsys.readouterr().err
    assert main(["train", "resume=last", "allow=[mine]"]) == 0


def test_a_sweep_trains_each_point_in_a_folder_of_its_own(calls, tmp_path):
    assert main(["train", "-m", "seed=2", "model=nano,micro", "trainer.max_steps=30", "hydra/launcher=basic"]) == 0
    assert [(c["seed"], c["model"]["d_model"]) for c, _ in calls] == [(2, 128), (2, 384)]
    folders = [folder for _, folder in calls]
    assert len(set(folders)) == 2 and {folder.parent for folder in folders} == {folders[0].parent}
    assert folders[0].parent.parent == tmp_path / "runs" / "shakespeare_char"
    assert read_overrides(folders[1])[0] == ["seed=2", "model=micro", "trainer.max_steps=30"]


def test_a_sweep_goes_on_after_a_failed_job_and_then_fails(calls, monkeypatch, capsys):
    seen = []

    def launch(config: dict[str, Any], folder: Path, own_process: bool = False) -> dict[str, float]:
        assert own_process
        seen.append(config["seed"])
        if config["seed"] == 1:
            raise RuntimeError("boom")
        return {"val/loss": 1.0}

    monkeypatch.setattr("meshformer.command.launch.launch", launch)
    assert main(["train", "-m", "seed=1,2", "hydra/launcher=basic"]) == 1
    assert seen == [1, 2]
    assert "boom" in capsys.readouterr().err


def test_ranks_started_from_outside_agree_on_one_folder(calls, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_PORT", "29500")
    for run_id in ("none", "job7"):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id)
        for rank in ("0", "1"):
            monkeypatch.setenv("RANK", rank)
            assert main(["train", "strategy=ddp"]) == 0
        assert calls[-2][1] == calls[-1][1]
        assert calls[-1][0]["trainer"]["devices"] == 2
    assert calls[0][1] != calls[2][1]


def test_only_rank_zero_refuses_a_used_folder_and_writes(calls, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "x").touch()
    monkeypatch.setenv("RANK", "0")
    assert main(["train", "strategy=ddp", "hydra.run.dir=used"]) == 2
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("meshformer.command.jobs._launch", lambda *a, **k: {})
    assert main(["train", "strategy=ddp", "hydra.run.dir=used"]) == 0
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["x"]
    assert main(["train", "-m", "seed=1,2"]) == 2
    assert "without torchrun" in capsys.readouterr().err


@pytest.fixture
def used(monkeypatch) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Calls of evaluate and generate."""
    made: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
    for name in ("evaluate", "generate"):
        module = types.ModuleType(f"meshformer.job.{name}")
        setattr(module, name, lambda config, options, name=name: made.append((name, config, options)))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return made


def test_evaluate_reads_the_runs_configuration_and_takes_changes(calls, used, capsys):
    main(["train", "seed=7"])
    assert main(["evaluate", "run=last", "split=test"]) == 0
    assert main(["evaluate", "run=last", "data.batch_size=64", "data=kjv", "trainer.precision=bf16-true"]) == 0
    _, config, options = used[0]
    assert (options["split"], config["seed"], config["model"]["vocab_size"]) == ("test", 7, 84)
    assert options["run"] == str(calls[0][1])
    _, config, _ = used[1]
    assert (config["data"]["batch_size"], config["trainer"]["precision"]) == (64, "bf16-true")
    assert config["data"]["source"]["_target_"].endswith("KingJames") and config["model"]["vocab_size"] == 84
    assert main(["evaluate", "run=last", "data.batch_sizes=64"]) == 2
    assert "Did you mean data.batch_size?" in capsys.readouterr().err


@pytest.mark.parametrize("prompt", ["ROMEO: What, ho?", "it's [a] {b} ${c}", "a\\'b\\", "'quoted'", "x=1,2", "two\nlines"])
def test_a_prompt_is_taken_as_it_is_typed(calls, used, prompt):
    main(["train"])
    assert main(["generate", "run=last", f"prompt={prompt}", "top_k=5"]) == 0
    assert used[0][2]["prompt"] == (prompt.strip("'") if prompt.startswith("'") else prompt)
    assert used[0][2]["top_k"] == 5


def test_overrides_survive_the_file(tmp_path):
    overrides = ["seed=1", "callbacks.samples.prompt='two\nlines'", "hydra.run.dir=x", "~callbacks.samples"]
    (tmp_path / "overrides.txt").write_text(write_overrides(overrides, str(tmp_path), "other"))
    assert read_overrides(tmp_path) == (["seed=1", "callbacks.samples.prompt='two\nlines'", "~callbacks.samples"], str(tmp_path), "other")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("meshformer tr", ["train"]),
        ("meshformer ", ["plan", "train", "evaluate", "generate", "convert", "export", "runs", "profile", "report", "doctor"]),
        ("meshformer train model=n", ["model=nano"]),
        ("meshformer train trainer.max_s", ["trainer.max_steps="]),
        ("meshformer generate temp", ["temperature="]),
    ],
)
def test_the_shell_completes_commands_and_overrides(line, expected, monkeypatch, capsys):
    monkeypatch.setenv("COMP_LINE", line)
    assert main(["-sc", "query=bash"]) == 0
    assert capsys.readouterr().out.split() == expected


def test_help_is_short_and_that_of_a_command_starts_with_its_own_section(capsys):
    for line in ([], ["--help"]):
        assert main(line) == 0
        text = capsys.readouterr().out
        assert len(text.splitlines()) <= 15 and all(f"  meshformer {command} " in text for command in COMMANDS), text
    for command in COMMANDS:
        assert main([command, "--help"]) == 0
        assert capsys.readouterr().out.splitlines()[0].startswith(f"meshformer {command}")
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("model/attention", "positional_attention", "kjv_finetune", "Examples"))
    assert "by default: queries and keys are rotated" in text


@pytest.mark.parametrize("flag", [["--config-dir", "mine"], ["--config-dir=mine"], ["-cd", "mine"]])
def test_help_lists_the_users_own_options(flag, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "tall.yaml").write_text("# Pick it for long texts.\ndefaults: [nano, _self_]\n")
    assert main(["train", *flag, "--help"]) == 0
    assert re.search(r"^    tall +\(yours\) for long texts\.$", capsys.readouterr().out, re.MULTILINE)
    assert main(["train", "--config-dir=other", "--help"]) == 2
    assert "--config-dir=other: there is no such folder" in capsys.readouterr().err


def test_info_and_cfg_show_the_composition(capsys):
    assert main(["train", "--cfg", "job", "--package", "model.position"]) == 0
    assert "meshformer.model.position.Rotary" in capsys.readouterr().out
    assert main(["train", "--info", "defaults"]) == 0
    assert "experiment/shakespeare_char" in capsys.readouterr().out
