"""A stranger's run folder is data: whatever stands in any field of its files, nothing runs, nothing outside is read or written, and what is
shown is text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import TINY, text_file
from meshformer.cli import main
from meshformer.command.compose import settle
from meshformer.config import ConfigError
from meshformer.config.foreign import confine, read_config
from meshformer.job.build import build_callbacks, build_data, build_loggers, build_task
from meshformer.job.train import settle_sizes
from planted import KINDS, Dumper, Plants, Watch, places, planted, refuse_raw


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("foreign")
    text_file(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MESHFORMER_DATA", str(folder / "cache"))
        settings = [*(o for o in TINY if o != "logger=csv"), f"data.files=[{folder}/text.txt]", "model.n_layers=1", "trainer.max_steps=2"]
        settings += ["callbacks.ema.decay=0.9", "+callbacks.lr={_target_: lightning.pytorch.callbacks.LearningRateMonitor}"]
        assert main(["train", *settings, f"hydra.run.dir={folder}/run"]) == 0
        yield folder / "run"


@pytest.fixture
def copied(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(run, tmp_path / "copied"))


@pytest.fixture
def plants(tmp_path: Path) -> Plants:
    return Plants(tmp_path)


def reach(config: dict[str, Any], folder: Path) -> None:
    """All of a job that reaches outside of its process: data, parts, loggers; no training."""
    data = build_data(config)
    data.prepare_data()
    settle_sizes(config, data)
    build_callbacks(config, folder, 1)
    build_task(config, 10).configure_model()  # pyright: ignore[reportCallIssue]
    for logger in build_loggers(config, folder).values():
        logger.log_metrics({"x": 1.0}, 1)
        logger.save()
        logger.finalize("success")


def told(capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    out, err = capsys.readouterr()
    refuse_raw(out + err)
    assert "Traceback" not in err, err
    return out, err


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "markup"])  # nothing is shown here: markup is a text like the escapes
def test_no_field_of_the_configuration_runs_or_reaches_outside(kind: str, run: Path, copied: Path, plants: Plants) -> None:
    """Every field of config.yaml, at every depth, with the value in its place, in a list there, and beside it: read as resume, evaluate and the
    notebooks read it, and then built, logged to and prepared as a job does. The next test takes the commands themselves."""
    file, whole = copied / "config.yaml", yaml.safe_load((run / "config.yaml").read_text())
    paths = {"data": str(copied.parent / "cache"), "runs": "runs"}
    refused, passed = 0, 0
    for place in places(whole):
        for made in planted(whole, place, plants.value(kind)):
            file.write_text(yaml.dump(made, Dumper=Dumper))
            before = sorted(path for path in copied.parent.iterdir())
            with Watch(plants.outside) as opened:
                try:
                    config = confine({**read_config(copied), "resume": str(copied), "allow": []}, paths)
                    reach(settle(config), copied)
                    passed += 1
                except ConfigError as error:
                    assert str(error).count("\n") == 0, error
                    refused += 1
            plants.check()
            assert not opened or (kind == "outside" and place[0] == "data"), (place, opened)
            assert {p.name for p in copied.parent.iterdir()} - {p.name for p in before} <= {"cache"}, place
    assert refused and (passed or kind == "evaluated"), "texts such as the experiment's name are taken as they are"


COMMANDS = {
    "resume": ["train", "resume={}", "trainer.max_steps=3"],
    "evaluate": ["evaluate", "run={}"],
    "generate": ["generate", "run={}", "max_tokens=1"],
    "finetune": ["train", "stage=finetune", "stage.init_from={}", "data=text", "data.files=[{}/../../text.txt]", "data.context_length=16"],
    "export": ["export", "run={}", "format=safetensors", "output=exported.safetensors"],
    "convert": ["convert", "run={}", "to=safetensors", "output=converted.safetensors"],
}
PLACES = [("model", "position"), ("callbacks",), ("paths", "data")]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: ".".join(place))
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_holds_to_it(
    command: str,
    place: tuple[str, ...],
    run: Path,
    copied: Path,
    plants: Plants,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("meshformer.command.jobs._launch", reach)
    file, whole = copied / "config.yaml", yaml.safe_load((run / "config.yaml").read_text())
    words = [word.replace("{}/../../text.txt", str(run.parent / "text.txt")).format(copied) for word in COMMANDS[command]]
    for kind in KINDS:
        made = next(planted(whole, place, plants.value(kind)))
        file.write_text(yaml.dump(made, Dumper=Dumper))
        (copied / "overrides.txt").write_bytes((run / "overrides.txt").read_bytes())
        for name in ("exported.safetensors", "converted.safetensors"):
            Path(name).unlink(missing_ok=True)
        with Watch(plants.outside) as opened:
            code = main(words)
        plants.check()
        out, err = told(capsys)
        assert code in (0, 2) and not opened, (kind, err)
        assert code == 0 or len(err.strip().splitlines()) == 1, err
        if kind == "evaluated":
            assert code == 2 and "interpolation" in err, (out, err)


def test_what_writes_where_it_is_told_is_asked_for_again(
    run: Path, copied: Path, plants: Plants, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs: list[dict[str, Any]] = []
    monkeypatch.setattr("meshformer.command.jobs._launch", lambda config, folder: jobs.append(config))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["logger"] = {"csv": {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": str(plants.outside)}}
    config["paths"] = {"data": str(plants.outside), "runs": str(plants.outside)}
    (copied / "config.yaml").write_text(yaml.safe_dump(config))
    resume = ["train", f"resume={copied}", "trainer.max_steps=9"]
    assert main(resume) == 2
    assert "add allow=[lightning.pytorch.loggers.CSVLogger] to the command" in told(capsys)[1]
    assert main([*resume, "allow=[lightning.pytorch.loggers.CSVLogger]"]) == 0
    assert jobs[0]["logger"] == config["logger"] and jobs[0]["paths"]["data"] == str(run.parent / "cache")
    assert main([*resume, "allow=[lightning.pytorch.loggers.CSVLogger]", "paths.data=mine"]) == 0
    assert jobs[1]["paths"]["data"] == "mine"


HYDRA = "hydra.callbacks.x={_target_: os.mkdir, path: CANARY}"
LINES = [
    HYDRA, f"+{HYDRA}", f"++{HYDRA}", json.dumps(f"+{HYDRA}"), "+logger@hydra.callbacks=tensorboard", "model@_global_=nano", "hydra/launcher=basic",
    "hydra.job.env_set.LD_PRELOAD=OUTSIDE", "hydra.searchpath=[file://OUTSIDE]", "experiment=../../../OUTSIDE/evil", "experiment='OUTSIDE/evil'",
    "model/position=../../OUTSIDE/evil", "experiment=[a,'../b']", "experiment=${oc.env:HOME}", "resume=OUTSIDE", "fork=OUTSIDE", "run=OUTSIDE",
    "--config-dir=OUTSIDE", "--config-name=../../OUTSIDE/evil", "--config-path=OUTSIDE", "--experimental-rerun=OUTSIDE/x.pkl", '"not JSON',
    "a b c", "\x1b]0;x", "+callbacks.x={_target_: os.mkdir, path: CANARY}", "logger.tensorboard._target_=os.mkdir",
    "+callbacks.x='${oc.create:{_target_: os.mkdir, path: CANARY}}'",
    "+callbacks.x={_target_: lightning.pytorch.callbacks.ModelCheckpoint, dirpath: OUTSIDE}",
    "+logger.x={_target_: lightning.pytorch.loggers.CSVLogger, save_dir: OUTSIDE}",
]  # fmt: skip


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("command", ["resume", "fork"])
def test_no_line_of_the_overrides_says_more_than_values_of_our_own_keys(
    command: str, line: str, copied: Path, plants: Plants, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("meshformer.command.jobs._launch", reach)
    (plants.outside.parent / "evil").mkdir()
    line = line.replace("OUTSIDE", str(plants.outside)).replace("CANARY", str(plants.canary))
    file = copied / "overrides.txt"
    file.write_text(f"{line}\n{file.read_text()}")
    with Watch(plants.outside) as opened:
        code = main(["train", f"{command}={copied}", "trainer.max_steps=3"])
    plants.check()
    _, err = told(capsys)
    # What resume takes of parts is config.yaml's, which the tests above plant in.
    assert code == 2 or (command == "resume" and "_target_" in line), err
    assert code == 0 or (len(err.strip().splitlines()) == 1 and err.startswith("error: ")), err
    assert not opened


def test_a_folder_of_settings_is_read_where_the_command_names_it(
    run: Path, copied: Path, plants: Plants, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs: list[Any] = []
    monkeypatch.setattr("meshformer.command.jobs._launch", lambda config, folder: jobs.append(config))
    mine = plants.root / "mine"
    (mine / "extra").mkdir(parents=True)
    (mine / "extra" / "wide.yaml").write_text("# @package _global_\ntrainer:\n  log_every_n_steps: 1\n")
    file = copied / "overrides.txt"
    file.write_text(f"--config-dir={mine}\n{file.read_text()}+extra=wide\n")
    assert main(["train", f"resume={copied}", "trainer.max_steps=9"]) == 2
    assert f"add --config-dir={mine} to the command" in told(capsys)[1]
    assert main(["train", f"resume={copied}", "trainer.max_steps=9", f"--config-dir={mine}"]) == 0 and len(jobs) == 1
    assert main(["evaluate", f"run={copied}"]) == 0, "config.yaml says all that it needs"
