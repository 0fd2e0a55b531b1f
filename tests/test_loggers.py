"""Loggers: the rows of metrics.csv reach each of them at the same steps, a resumed run continues in the same logged run, and a sweep is a group."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import jobs
from harness import run_ranks
from meshformer.command.compose import compose
from meshformer.config.errors import ConfigError
from meshformer.config.foreign import confine, refuse_links
from meshformer.job.build import build_loggers
from meshformer.job.loggers import begin, given_by_run

MLFLOW, WANDB = "lightning.pytorch.loggers.MLFlowLogger", "lightning.pytorch.loggers.WandbLogger"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("NETRC", "/nowhere")


def rows_of(folder: Path, key: str) -> dict[int, float]:
    return {row["step"]: row[key] for row in jobs.read_metrics(folder / "metrics.csv") if row.get(key) is not None}


def of_mlflow(folder: Path) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")


def records(file: Path) -> Iterator[bytes]:
    """The records of a wandb file: LevelDB's log format, blocks of 32 KiB with parts of (checksum, length, type), after a header of 7 bytes."""
    content, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        whole += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def of_wandb(run: Path) -> list[dict[str, Any]]:
    """The rows in the run's own files, the first start's first."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime):
        for content in records(file):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            if record.WhichOneof("record_type") == "history":
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item})
    return rows


def board(run: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run / "tensorboard")).Reload()


def of_tensorboard(run: Path, key: str) -> dict[int, float]:
    return {event.step: event.value for event in board(run).Scalars(key)}


def test_the_rows_reach_every_logger_at_the_same_steps(tmp_path: Path) -> None:
    more = ["logger=many", "+logger.csv._target_=lightning.pytorch.loggers.CSVLogger"]
    jobs.run_tiny(tmp_path, "run", "trainer.max_steps=4", "trainer.val_check_interval=2", "trainer.log_every_n_steps=2", *more)
    client, run = of_mlflow(tmp_path), tmp_path / "run"
    run_id = json.loads((run / "loggers.json").read_text())["mlflow"]
    with (run / "csv" / "metrics.csv").open(newline="") as file:
        own = list(csv.DictReader(file))
    for key in ("train/loss", "val/loss"):
        rows = rows_of(run, key)
        assert list(rows) == [2, 4]
        assert {entry.step: entry.value for entry in client.get_metric_history(run_id, key)} == pytest.approx(rows)
        assert of_tensorboard(run, key) == pytest.approx(rows)
        assert {int(row["step"]): float(row[key]) for row in own if row[key]} == pytest.approx(rows)
    logged = client.get_run(run_id)
    assert (logged.info.status, logged.info.run_name, logged.data.params["model/d_model"]) == ("FINISHED", "run", "32")
    assert client.get_experiment(logged.info.experiment_id).name == "text"


def opened(folder: Path, config: dict[str, Any]) -> str:
    run = folder / os.environ["RANK"]
    run.mkdir()
    begin(build_loggers(config, run), config, run)
    return json.loads((run / "loggers.json").read_text())["mlflow"]


def test_runs_that_start_at_once_make_one_database(tmp_path: Path) -> None:
    importlib.import_module("mlflow.store.tracking.sqlalchemy_store")  # so that the four come to its tables together
    config = jobs.tiny_config(tmp_path, "logger=mlflow")
    ids = run_ranks(4, opened, tmp_path, config)
    client = of_mlflow(tmp_path)
    (experiment,) = [one for one in client.search_experiments() if one.name == "text"]
    assert {run.info.run_id for run in client.search_runs([experiment.experiment_id])} == set(ids) and len(set(ids)) == 4


def test_a_resumed_run_continues_in_the_same_run_of_mlflow(tmp_path: Path) -> None:
    jobs.run_tiny(tmp_path, "run", "trainer.max_steps=2", "logger=mlflow", "logger.mlflow.tags={purpose: trial}")
    jobs.run_tiny(tmp_path, "run", "trainer.max_steps=4", "logger=mlflow", resume=True)
    client = of_mlflow(tmp_path)
    (experiment,) = [one for one in client.search_experiments() if one.name == "text"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert [entry.step for entry in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 2, 3, 4]
    assert run.data.tags["purpose"] == "trial" and run.info.status == "FINISHED"
    assert str(tmp_path / "runs" / "mlflow") in run.info.artifact_uri and not Path("mlruns").exists()


@pytest.mark.parametrize("other", [False, True])
def test_a_run_that_another_database_has_is_not_logged_into_this_one(tmp_path: Path, monkeypatch: Any, capsys: Any, other: bool) -> None:
    """The folder does not say where to log: the hint names the database's folder, and so does the refusal."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "elsewhere").mkdir()
    jobs.run_tiny(tmp_path, "runs/run", "trainer.max_steps=2", "logger=mlflow")
    assert "paths.runs" not in capsys.readouterr().out, "runs/ is the default"
    jobs.run_tiny(tmp_path, "elsewhere/run", "trainer.max_steps=2", "logger=mlflow", "paths.runs=elsewhere")
    assert f"resume={tmp_path}/elsewhere/run paths.runs={tmp_path}/elsewhere trainer.max_steps=4" in capsys.readouterr().out
    if not other:
        (tmp_path / "runs" / "mlflow.db").unlink()
    answer = rf"paths\.runs={tmp_path}/runs: MLflow's database .* Add paths\.runs={tmp_path}/elsewhere, or log elsewhere"
    with pytest.raises(ConfigError, match=answer):
        jobs.run_tiny(tmp_path, "elsewhere/run", "trainer.max_steps=4", "logger=mlflow", resume=True)
    assert (tmp_path / "runs" / "mlflow.db").exists() == other


def test_the_link_that_wandb_makes_is_no_way_out_of_a_run(tmp_path: Path) -> None:
    logs = tmp_path / "run" / "wandb" / "offline-run-1" / "logs"
    logs.mkdir(parents=True)
    (logs / "debug-core.log").symlink_to("/root/.cache/wandb/logs/core-debug-1.log")
    refuse_links(tmp_path / "run", "run", "run")
    cache = "/root/.cache/wandb/logs/core-debug-1.log"
    for name, target in (("debug-core.log", "/etc/passwd"), ("debug.log", cache), ("debug-core.log", "/root/wandb/x.log")):
        (logs / "debug-core.log").unlink(missing_ok=True)
        (logs / name).symlink_to(target)
        with pytest.raises(ConfigError, match="outside of the run's folder"):
            refuse_links(tmp_path / "run", "run", "run")
        (logs / name).unlink()
        (logs / "debug-core.log").touch()


def test_a_resumed_run_continues_in_the_same_run_of_wandb(tmp_path: Path) -> None:
    wandb: Any = pytest.importorskip("wandb")
    settings = ["logger=wandb", "logger.wandb.offline=true", "logger.wandb.tags=[trial]"]
    jobs.run_tiny(tmp_path, "run", "trainer.max_steps=2", *settings)
    first = json.loads((tmp_path / "run" / "loggers.json").read_text())["wandb"]
    assert wandb.run is None, "the next run of this process would be logged into the same one"
    jobs.run_tiny(tmp_path, "run", "trainer.max_steps=4", *settings, resume=True)
    jobs.run_tiny(tmp_path, "other", "trainer.max_steps=1", *settings)
    assert {file.stem for file in (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")} == {f"run-{first}"}
    refuse_links(tmp_path / "run", "run", "run")  # no command on the run minds what wandb has left there
    assert f"run-{first}" not in {file.stem for file in (tmp_path / "other").glob("wandb/offline-run-*/*.wandb")}
    found = {row["trainer/global_step"]: row["train/loss"] for row in of_wandb(tmp_path / "run") if "train/loss" in row}
    assert found == pytest.approx(rows_of(tmp_path / "run", "train/loss")) and list(found) == [1, 2, 3, 4]


def test_a_sweep_is_a_group(tmp_path: Path) -> None:
    config: dict[str, Any] = {"paths": {"runs": str(tmp_path)}}
    point = tmp_path / "text" / "sweep_1" / "0"
    point.mkdir(parents=True)
    alone = given_by_run("wandb", {"_target_": WANDB}, config, point)
    (point.parent / "sweep.json").write_text("{}")
    wandb = given_by_run("wandb", {"_target_": WANDB, "name": "mine"}, config, point)
    mlflow = given_by_run("mlflow", {"_target_": MLFLOW, "tags": {"a": "b"}}, config, point)
    board = given_by_run("tensorboard", {"_target_": "lightning.pytorch.loggers.TensorBoardLogger"}, config, point)
    assert "group" not in alone and wandb == {"save_dir": str(point), "group": "sweep_1"}
    assert mlflow["tags"] == {"a": "b", "sweep": "sweep_1"} and mlflow["run_name"] == "sweep_1/0"
    assert board == {"save_dir": str(point), "name": "", "version": "tensorboard"}  # `tensorboard --logdir sweep_1` names the points


@pytest.mark.parametrize(("choice", "package"), [("wandb", "wandb"), ("mlflow", "mlflow"), ("many", "mlflow")])
def test_a_missing_package_is_answered_by_the_extra(choice: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == package else real(name, *more))
    with pytest.raises(ConfigError, match=rf"the package {package}, which is not installed\. Install it: pip install 'meshformer\[{package}\]'\."):
        compose([f"logger={choice}"])


def test_wandb_without_an_account_is_refused_before_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"logger\.wandb: nobody is logged in .* Run `wandb login`, or add logger\.wandb\.offline=true\."):
        compose(["logger=wandb"])
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert compose(["logger=wandb"])["logger"]["wandb"]["project"] == "meshformer"


@pytest.mark.parametrize(
    ("node", "kept"),
    [
        ({"_target_": MLFLOW, "experiment_name": "text", "tracking_uri": None}, True),
        ({"_target_": MLFLOW, "experiment_name": "text", "tracking_uri": "https://elsewhere"}, False),
        ({"_target_": MLFLOW, "artifact_location": "/elsewhere"}, False),
        ({"_target_": WANDB, "project": "p", "offline": True}, True),
        ({"_target_": WANDB, "project": "p", "offline": False}, False),
        ({"_target_": WANDB, "project": "p", "offline": True, "save_dir": "/elsewhere"}, False),
    ],
)
def test_a_run_folder_cannot_say_where_to_send(node: dict[str, Any], kept: bool) -> None:
    def confined() -> Any:
        return confine({"logger": {"one": node}}, {"data": "d", "runs": "r"})["logger"]["one"]

    if kept:
        assert confined() == node
    else:
        with pytest.raises(ConfigError, match=r"writes or sends where its settings say"):
            confined()


def test_sample_texts_and_the_confusion_matrix_reach_the_loggers_that_show_them(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    every = ["logger=many", "+logger.wandb={_target_: lightning.pytorch.loggers.WandbLogger, offline: true}"]
    sampled = "+callbacks.samples={_target_: meshformer.callbacks.Samples, max_tokens: 8}"
    jobs.run_tiny(tmp_path, "run", "trainer.max_steps=4", "trainer.val_check_interval=2", *every, sampled)
    run = tmp_path / "run"
    client, run_id = of_mlflow(tmp_path), json.loads((run / "loggers.json").read_text())["mlflow"]
    assert [file.path for file in client.list_artifacts(run_id, "samples")] == [f"samples/continuation-{step:08d}.txt" for step in (2, 4)]
    written = (run / "samples" / "step-00000004.txt").read_text()
    assert Path(client.download_artifacts(run_id, "samples/continuation-00000004.txt")).read_text() == written
    tags = board(run).Tags()["tensors"]
    assert "samples/continuation/text_summary" in tags
    assert [event.step for event in board(run).Tensors("samples/continuation/text_summary")] == [2, 4]
    assert sum("samples/continuation" in "".join(row) for row in of_wandb(run)) == 2

    classes = ["task=sequence_classification", "data.label_column=label", "trainer.max_steps=2"]
    jobs.run_labelled(tmp_path, "labels", *classes, *every)
    run = tmp_path / "labels"
    run_id = json.loads((run / "loggers.json").read_text())["mlflow"]
    assert "confusion_matrix.png" in [file.path for file in client.list_artifacts(run_id)]
    assert [image.step for image in board(run).Images("confusion_matrix")] == [2]
    assert any("confusion_matrix" in "".join(row) for row in of_wandb(run))


def test_recorded_steps_reach_the_loggers_that_show_them(tmp_path: Path) -> None:
    """The picture as SVG where that can be shown; in TensorBoard the table."""
    pytest.importorskip("wandb")
    every = ["logger=many", "+logger.wandb={_target_: lightning.pytorch.loggers.WandbLogger, offline: true}"]
    jobs.run_tiny(tmp_path, "run", "trainer.max_steps=3", "callbacks.profile.steps=[2,3]", *every)
    run, picture = tmp_path / "run", (tmp_path / "run" / "profile" / "parts.svg").read_text()
    client, run_id = of_mlflow(tmp_path), json.loads((run / "loggers.json").read_text())["mlflow"]
    assert {file.path for file in client.list_artifacts(run_id, "profile")} == {"profile/parts.svg", "profile/memory.svg"}
    assert Path(client.download_artifacts(run_id, "profile/parts.svg")).read_text() == picture
    (event,) = board(run).Tensors("profile/parts/text_summary")
    table = event.tensor_proto.string_val[0].decode()
    assert event.step == 3 and table.startswith("| part | share | rank 0 |\n| --- | --- | --- |\n| data wait |") and "| step | 100.0% |" in table
    (logged,) = [row["profile/parts/path"] for row in of_wandb(run) if row.get("profile/parts/_type") == "html-file"]
    (file,) = run.glob(f"wandb/offline-run-*/files/{logged}")
    assert picture in file.read_text()
