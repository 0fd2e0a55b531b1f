"""A refused command changes nothing, and what was stopped after its last step can be finished."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import jobs
from meshformer.callbacks.rows import Rows
from meshformer.cli import main
from meshformer.record import RunRecord, read_run
from meshformer.record.metrics_csv import read_metrics

SRC = Path(__file__).parents[1] / "src"
STEPS = "trainer.max_steps=4"


def command(folder: Path, *overrides: str) -> list[str]:
    """`train` as jobs.tiny_config has it, by the command."""
    text = folder / "text.txt"
    text = text if text.is_file() else jobs.text_file(folder)
    return ["train", *jobs.TINY, f"data.files=[{text}]", f"paths.data={folder}/cache", f"paths.runs={folder}/runs", *overrides]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    assert main(command(folder, STEPS, f"hydra.run.dir={folder}/run")) == 0
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path):
    import shutil

    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.mark.parametrize("changes", [["trainer.max_steps=3"], ["optimizer.lr=3"], ["trainer.max_steps=many"], []])
def test_a_refused_resume_changes_no_file(changes, run):
    before = contents(run)
    assert main(["train", f"resume={run}", *changes]) == 2
    assert contents(run) == before


def test_another_models_checkpoints_are_refused_and_nothing_is_changed(run, capsys):
    for name in ("config.yaml", "overrides.txt"):
        (run / name).write_text((run / name).read_text().replace("d_model: 32", "d_model: 64").replace("d_model=32", "d_model=64"))
    before = contents(run)
    assert main(["train", f"resume={run}", "trainer.max_steps=8"]) == 2
    told = capsys.readouterr().err
    assert "(32, 32) in the checkpoint, (64, 64) in the model" in told and "Traceback" not in told
    assert contents(run) == before


def killed_at_the_end(run: Path) -> None:
    """As a run stands that was killed behind its last checkpoint, in the closing validation."""
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "state": "running", "ended": None, "final": {}}))
    lines = (run / "metrics.csv").read_text().splitlines(keepends=True)
    cells = lines[-1].split(",")
    cells[lines[0].split(",").index("val/loss")] = ""
    (run / "metrics.csv").write_text("".join(lines[:-1]) + ",".join(cells))


@pytest.mark.parametrize("layout", [[], ["strategy=fsdp", "trainer.devices=1"]])
def test_a_run_killed_in_its_closing_validation_is_finished_by_resume(layout, finished, run):
    record, whole = json.loads((run / "run.json").read_text()), read_metrics(run / "metrics.csv")
    killed_at_the_end(run)
    assert main(["train", f"resume={run}", *layout]) == 0
    again = read_run(run)
    assert again["state"] == "finished" and again["segments"][0]["state"] == "failed"
    rows = read_metrics(run / "metrics.csv")
    assert len(rows) == len(whole) and abs(rows[-1]["val/loss"] - whole[-1]["val/loss"]) < 5e-6
    assert abs(again["final"]["val/loss"] - record["final"]["val/loss"]) < 5e-6 and again["final"]["train/loss"] == record["final"]["train/loss"]
    assert main(["train", f"resume={run}"]) == 2  # finished is finished


def test_a_point_killed_in_its_closing_validation_is_finished_by_its_sweep(tmp_path):
    folder, (_, *words) = tmp_path / "sweep", command(tmp_path, STEPS)
    assert main(["train", "-m", *words, f"hydra.sweep.dir={folder}", "seed=1,2"]) == 0
    book = json.loads((folder / "sweep.json").read_text())
    first, last = book["points"]
    killed_at_the_end(folder / last["folder"])
    (folder / "sweep.json").write_text(json.dumps({**book, "state": "running", "points": [first, {**last, "state": "running", "final": {}}]}))
    assert main(["train", "-m", f"sweep.resume={folder}"]) == 0
    again = json.loads((folder / "sweep.json").read_text())
    assert again["state"] == "finished" and [point["state"] for point in again["points"]] == ["done", "done"]
    assert again["points"][0] == first and abs(again["points"][1]["final"]["val/loss"] - last["final"]["val/loss"]) < 5e-6


def test_a_job_that_refuses_its_settings_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(command(tmp_path, STEPS, "data.batch_size=100000")) == 2
    assert not (tmp_path / "runs").exists()


def test_a_fork_with_another_optimizer_starts_it_without_state(run, tmp_path, capsys):
    fork = tmp_path / "fork"
    changes = ["optimizer=adamw", "trainer.max_steps=6", f"hydra.run.dir={fork}"]
    assert main(["train", f"fork={run}", *changes]) == 0
    assert "adamw starts without state" in capsys.readouterr().err
    assert [row["step"] for row in read_metrics(fork / "metrics.csv")] == [5, 6]
    sharded = tmp_path / "sharded"
    assert main(["train", f"fork={run}", *changes[:2], f"hydra.run.dir={sharded}", "strategy=fsdp", "trainer.devices=1"]) == 0
    ours, theirs = (read_metrics(folder / "metrics.csv")[-1]["train/loss"] for folder in (fork, sharded))
    assert abs(ours - theirs) < 5e-6


@pytest.mark.parametrize("change", ["data.workers=1", "data.eval_batch_size=2"])
def test_what_changes_no_sample_may_change_on_resume(change, run):
    assert main(["train", f"resume={run}", "trainer.max_steps=5", change]) == 0
    assert read_metrics(run / "metrics.csv")[-1]["step"] == 5


def test_a_run_without_checkpoints_offers_nothing_to_go_on_from(tmp_path, capfd):
    assert main(command(tmp_path, STEPS, f"hydra.run.dir={tmp_path}/run", "~callbacks.checkpoint")) == 0
    told = capfd.readouterr().out
    assert "run folder" in told and "resume=" not in told and "evaluate" not in told and "generate" not in told


@pytest.mark.parametrize(
    ("number", "layout"),
    [
        (signal.SIGTERM, []),
        (signal.SIGUSR1, ["strategy=ddp"]),
        pytest.param(signal.SIGUSR1, [], marks=pytest.mark.slow),  # each signal and each layout is there once
        pytest.param(signal.SIGTERM, ["strategy=ddp"], marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_the_whole_group_saves_with_loaders(number, layout, tmp_path):
    run = tmp_path / "run"
    long = ["trainer.max_steps=100000", "callbacks.checkpoint.every_n_steps=100000"]
    arguments = command(tmp_path, *long, f"hydra.run.dir={run}", "data.workers=2", *layout)
    environment = {**os.environ, "PYTHONPATH": str(SRC)}
    job = subprocess.Popen([sys.executable, "-m", "meshformer.cli", *arguments], env=environment, start_new_session=True, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120
        while not (run / "metrics.csv").is_file() or len(read_metrics(run / "metrics.csv")) < 5:
            assert job.poll() is None and time.monotonic() < deadline, job.stderr and job.stderr.read()
            time.sleep(0.05)
        os.killpg(job.pid, number)
        _, told = job.communicate(timeout=60)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode == 75, told
    assert read_run(run)["state"] == "preempted" and list((run / "checkpoints").glob("step-*"))
    deadline = time.monotonic() + 15  # the loaders ended with their trainer
    while _in_group(job.pid) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not _in_group(job.pid)


def _in_group(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_disk_that_is_full_for_a_while_costs_no_row(tmp_path, monkeypatch, capsys):
    class Trainer:
        global_step, is_global_zero, loggers = 0, True, ()

        class datamodule:
            steps_per_epoch, batch_size, samples = 10, 2, 0

    rows = Rows(tmp_path, 1)
    rows.begin(Trainer)
    flush, full = type(rows.csv).flush, [True]

    def failing(self):
        if full[0]:
            raise OSError(28, "No space left on device")
        flush(self)

    monkeypatch.setattr(type(rows.csv), "flush", failing)
    with pytest.raises(OSError, match="No space"):
        rows._write(Trainer, 1, {"train/loss": 1.0})
    rows.tolerant = True
    rows._write(Trainer, 2, {"train/loss": 2.0})
    rows._write(Trainer, 3, {"train/loss": 3.0})
    assert capsys.readouterr().err.count("warning: metrics.csv could not be written") == 1
    full[0] = False
    rows._write(Trainer, 4, {"train/loss": 4.0})
    assert [row["train/loss"] for row in read_metrics(tmp_path / "metrics.csv")] == [1.0, 2.0, 3.0, 4.0]


def test_a_record_that_cannot_be_written_ends_no_run_that_was_told_to_go_on(tmp_path, monkeypatch, capfd):
    def full(self, *arguments, **fields):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunRecord, "finish", full)
    told = ["callbacks.checkpoint.on_failure=warn"]
    assert main(command(tmp_path, STEPS, f"hydra.run.dir={tmp_path}/run", *told)) == 0
    assert "what the run ends with could not be written (No space left on device)" in capfd.readouterr().err
    assert main(command(tmp_path, STEPS, f"hydra.run.dir={tmp_path}/strict")) == 1
