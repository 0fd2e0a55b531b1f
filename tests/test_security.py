"""Nothing that comes from a stranger runs, and nothing secret is written down."""

from __future__ import annotations

import ast
import os
import pickle
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import meshformer
from jobs import TINY, text_file
from meshformer.checkpoint.find import MANIFEST, latest_checkpoint, read_manifest, write_manifest
from meshformer.cli import main

SECRET = "hunter2-do-not-write-me"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("security")
    text_file(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_API_KEY", SECRET)
        patch.setenv("HARMLESS_DATA", str(folder / "cache"))
        settings = [*TINY, f"data.files=[{folder}/text.txt]", f"hydra.run.dir={folder}/run", "trainer.max_steps=2", "logger=tensorboard"]
        assert main(["train", *settings, "paths.data=${oc.env:HARMLESS_DATA}"]) == 0
        yield folder / "run"


def test_the_environment_is_not_in_the_records(run: Path) -> None:
    files = [file for file in run.rglob("*") if file.is_file()]
    assert {"config.yaml", "overrides.txt", "run.json", "metrics.csv", "trainer.pt"} <= {file.name for file in files}
    for file in files:
        content = file.read_bytes()
        assert SECRET.encode() not in content, file
        assert not [name for name in ("HOME", "PATH") if len(os.environ[name]) > 8 and f"{name}={os.environ[name]}".encode() in content]


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "HF_TOKEN", "db_password", "AWS_SECRET_ACCESS_KEY"])
def test_a_secret_is_refused_before_it_is_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, SECRET)
    assert main(["train", f"paths.data=${{oc.env:{name}}}", f"paths.runs={tmp_path}/runs"]) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith(f"error: paths.data: the value of {name}, which looks like a secret") and SECRET not in message
    assert not (tmp_path / "runs").exists()


class Bomb:
    """Its pickle makes a file when it is read."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copied"))


@pytest.mark.parametrize("part", ["trainer.pt", ".metadata", "single"])
def test_a_pickle_that_would_run_code_is_refused(part: str, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    canary, checkpoint = tmp_path / "canary", latest_checkpoint(copied)
    if part == "single":
        torch.save({"tensors": {}, "rest": Bomb(canary)}, checkpoint.with_name("step-00000009.ckpt"))
    else:
        if part == "trainer.pt":
            torch.save(Bomb(canary), checkpoint / part)
        else:
            (checkpoint / part).write_bytes(pickle.dumps(Bomb(canary)))
        manifest = read_manifest(checkpoint)  # a stranger writes one that fits
        (checkpoint / MANIFEST).unlink()
        write_manifest(checkpoint, manifest.files | {part: summed(checkpoint / part)}, manifest.metrics)
    assert main(["train", f"resume={copied}", "trainer.max_steps=12"]) == 2
    (message,) = capsys.readouterr().err.strip().splitlines()
    assert message.startswith("error: ") and "mkdir" in message
    assert not canary.exists()


def summed(file: Path) -> tuple[int, int]:
    return file.stat().st_size, zlib.crc32(file.read_bytes())


@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", "run={}"],
        ["generate", "run={}"],
        ["train", "resume={}", "trainer.max_steps=3"],
        ["train", "stage=finetune", "stage.init_from={}"],
    ],
)
def test_the_configuration_of_a_strangers_run_builds_no_more_than_any_other(
    command: list[str], copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load((copied / "config.yaml").read_text())
    config["model"]["attention"] = config["model"]["position"] = {"_target_": "os.mkdir", "path": str(tmp_path / "canary")}
    config["allow"] = ["os"]
    (copied / "config.yaml").write_text(yaml.safe_dump(config))
    if command[1] == "stage=finetune":
        command = [*command, "data=text", f"data.files={copied.parent}/none.txt", "data.context_length=16", f"paths.runs={tmp_path}/runs"]
        (copied.parent / "none.txt").write_text("a b c " * 200)
    assert main([word.format(copied) for word in command]) == 2
    (message,) = capsys.readouterr().err.strip().splitlines()
    assert "_target_" in message and "os.mkdir" in message, message
    assert not (tmp_path / "canary").exists()


def test_nothing_is_loaded_or_unpacked_in_a_way_that_runs_or_writes_what_it_likes() -> None:
    """Of tar archives single members are read into memory, and none is unpacked; so no path in one matters."""
    calls: dict[str, list[str]] = {}
    root = Path(meshformer.__file__).parent
    for file in root.rglob("*.py"):
        # Pickles go through a pipe between a program and its own child alone.
        if file in (root / "command" / "sweep" / "server.py", root / "data" / "workers.py"):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                calls.setdefault(ast.unparse(node.func), []).append(ast.unparse(node))
    names = set(calls)
    assert {"torch.load", "np.load", "yaml.safe_load"} <= names, "the test sees calls"
    assert all("weights_only=True" in call for call in calls["torch.load"])
    assert not [call for call in calls["np.load"] if "allow_pickle=True" in call], "NumPy's default is False"
    assert not names & {
        "pickle.load",
        "pickle.loads",
        "yaml.unsafe_load",
        "yaml.full_load",
        "eval",
        "exec",
        "os.system",
        "shutil.unpack_archive",
    }
    assert all(call.endswith("Loader)") for call in calls.get("yaml.load", [])), (
        "runs/ takes the safe loader written in C where there is one"
    )
    assert not {name for name in names if "UnsafeLoader" in name or "FullLoader" in name}
    assert not [name for name in names if name.endswith((".extractall", ".extract"))]
