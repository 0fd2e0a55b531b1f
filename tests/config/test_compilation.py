"""What trainer.compile=auto becomes, and what torch.compile must find on the machine."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

from meshformer.command import compose, jobs
from meshformer.command.check import check, resolve
from meshformer.command.compose import settle
from meshformer.config import ConfigError, validate
from meshformer.parallel import compilation
from meshformer.parallel.compilation import WORTH_WHILE, compiles, lacking

RESOLVE = sys.modules["meshformer.config.resolve"]
LONG = {"trainer.max_steps": 10**9}


@pytest.fixture(autouse=True)
def _can_compile(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(compilation, "lacking", lambda accelerator: None)


def chosen(change, changes):
    return resolve(validate(change(changes)))["trainer"]["compile"]


def test_a_long_run_is_compiled_and_a_short_one_is_not(change):
    assert chosen(change, LONG) is True
    assert chosen(change, {}) is False, "the default recipe would wait longer than it wins"
    assert chosen(change, {"trainer.compile": True}) is True
    assert chosen(change, {**LONG, "trainer.compile": False}) is False


@pytest.mark.parametrize(("devices", "threads", "units"), [(1, 1, 1), (1, 8, 8), (2, 4, 8)])
def test_long_is_what_keeps_a_core_busy(change, devices, threads, units):
    """3 blocks of 12·128² entries; 16 · 128 tokens a step; 6 operations for each pair of them."""
    last_short = int(WORTH_WHILE["cpu"] * units / (6 * 3 * 12 * 128**2 * 16 * 128))
    layout = {"strategy": {"name": "ddp", "replicate": -1} if devices > 1 else {"name": "single", "replicate": 1}}
    for steps, expected in ((last_short, False), (last_short + 1, True)):
        changes = {**layout, "trainer.devices": devices, "trainer.threads": threads, "trainer.max_steps": steps}
        assert chosen(change, changes) is expected


def test_a_gpu_must_have_more_to_do(change, monkeypatch):
    monkeypatch.setattr(RESOLVE, "visible_gpus", lambda env=None: 1)
    steps = 1 + int(WORTH_WHILE["gpu"] / (6 * 3 * 12 * 128**2 * 16 * 128))
    assert chosen(change, {"trainer.max_steps": steps - 1}) is False
    assert chosen(change, {"trainer.max_steps": steps}) is True


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": {"_target_": "torch.nn.Linear", "in_features": 3, "out_features": 4}}, "parts of your own"),
        ({"model.attention": {"_target_": "mine.attend", "_partial_": True}}, "parts of your own"),
        ({"trainer.deterministic": True}, "deterministic"),
        ({"stage.unfreeze_every": 10}, "unfreeze_every"),
        ({"data.kind": "texts"}, "differ in length"),
        ({"trainer.max_epochs": 3}, "max_epochs"),
        ({"strategy.schedule": "interleaved_zero_bubble"}, "two backward passes"),
    ],
)
def test_what_does_not_suit_is_not_compiled_however_long(change, changes, reason):
    config = resolve(validate(change({**LONG, "trainer.compile": False})))
    for key, value in changes.items():
        *parents, last = key.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        node[last] = value
    choice, told = compiles(config)
    assert choice is False and reason in told


def test_anomalies_are_not_looked_for_in_compiled_blocks(change):
    with pytest.raises(ConfigError, match=r"trainer\.detect_anomaly=true: .* Use trainer\.detect_anomaly=false, or trainer\.compile=false"):
        settle(change({"trainer.compile": True, "trainer.detect_anomaly": True}))
    settle(change({"trainer.compile": "auto", "trainer.detect_anomaly": True}))


def test_images_count_their_patches():
    settings = ["task=image_classification", "data=digits", "model=vit_tiny", "trainer.threads=1"]
    steps = int(WORTH_WHILE["cpu"] / (6 * 6 * 12 * 64**2 * 2**2 * 16))
    for more, expected in ((0, False), (1, True)):
        config = compose.compose([*settings, f"trainer.max_steps={steps + more}"])
        assert config["trainer"]["compile"] is expected


def test_what_is_missing_is_named(change, monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    headers, tools = tmp_path / "include", tmp_path / "bin"
    headers.mkdir()
    tools.mkdir()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(headers))
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setattr(sys, "platform", "linux")
    assert lacking("cpu") == lacking("gpu") == "Python's header files"
    (headers / "Python.h").touch()
    assert lacking("cpu") == "a C++ compiler (g++)"
    monkeypatch.setenv("CXX", "my-c++")
    assert lacking("cpu") == "a C++ compiler (my-c++)"
    program(tools / "my-c++")
    assert lacking("cpu") is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert lacking("gpu") == "the package triton"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert lacking("gpu") == "a C compiler (gcc)"
    program(tools / "gcc")
    assert lacking("gpu") is None


def program(path: Path) -> None:
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)


def test_without_a_compiler_auto_is_false_and_true_refused(change, monkeypatch):
    monkeypatch.setattr(compilation, "lacking", lambda accelerator: "a C++ compiler (g++)")
    config = settle(change(LONG))
    assert config["trainer"]["compile"] is False
    assert compiles(config) == (False, "it needs a C++ compiler (g++)")
    with pytest.raises(ConfigError, match=r"trainer.compile=true: torch.compile needs a C\+\+ compiler"):
        settle(change({"trainer.compile": True}))


@pytest.mark.parametrize("recorded", [True, False, None])
def test_a_resumed_run_keeps_what_it_was_begun_with(tmp_path, recorded):
    """None: a run older than the setting."""
    config = compose.compose(["trainer.max_steps=1000000000"])
    assert config["trainer"].pop("compile") is True, "what auto would choose for it"
    if recorded is not None:
        config["trainer"]["compile"] = recorded
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))

    def again(*overrides: str) -> bool:
        hydra, before = compose.make_hydra(), ["trainer.max_steps=1000000000"]
        found = compose.recorded(hydra, "train", tmp_path, before, list(overrides), compose.RESUMABLE, lambda key, value: ConfigError(key))
        settled = resolve(validate(found))
        check({**settled, "resume": "x"})
        return settled["trainer"]["compile"]

    assert again() is bool(recorded)
    assert again("trainer.threads=1") is bool(recorded)
    assert again("trainer.compile=false") is False


def test_the_command_says_what_it_chose(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(jobs, "_launch", lambda config, folder: None)
    where = [f"paths.runs={tmp_path}", f"paths.data={tmp_path}"]
    assert jobs.run_command("train", where) == 0
    assert capsys.readouterr().err == "compile: no, the run is short\n"
    assert jobs.run_command("train", [*where, "trainer.max_steps=1000000000"]) == 0
    assert capsys.readouterr().err == "compile: yes, the run is long\n"
    for said in ("trainer.compile=false", "trainer.progress=false"):
        assert jobs.run_command("train", [*where, said]) == 0
        assert capsys.readouterr().err == ""
