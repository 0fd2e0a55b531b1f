"""Sweeps as a user types them, with real processes: a grid killed and resumed, a failing run, Ctrl-C, a search that is resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs import TINY, run_tiny, text_file
from meshformer.checkpoint.find import checkpoints
from meshformer.record.metrics_csv import read_metrics

ROOT = Path(__file__).parents[1]
STEPS = 6


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweeps")
    text_file(folder)
    (folder / "mine.py").write_text(TASK)
    return folder


def start(work: Path, *words: str) -> subprocess.Popen[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "TORCHELASTIC", "SLURM"))}
    env = clean | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{work}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "meshformer.cli", "train", "-m", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=work)


def settings(work: Path, *overrides: str) -> list[str]:
    given = [f"data.files=[{work}/text.txt]", f"paths.data={work}/cache", f"paths.runs={work}/runs", f"trainer.max_steps={STEPS}"]
    return [*TINY, *given, "callbacks.checkpoint.every_n_steps=2", "hydra.launcher.cores=2", *overrides]


def finish(sweep: subprocess.Popen[str], seconds: float = 400) -> tuple[int, str, str]:
    out, err = sweep.communicate(timeout=seconds)
    return sweep.returncode, out, err


def record_of(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "sweep.json").read_text())
    except (FileNotFoundError, ValueError):
        return {"points": []}


def states(folder: Path) -> list[str]:
    return [point["state"] for point in record_of(folder)["points"]]


def wait_for(sweep: subprocess.Popen[str], ready: Callable[[], object], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert sweep.poll() is None, sweep.communicate()
        assert time.monotonic() < end, "the sweep did not come that far"
        time.sleep(0.05)


def saved(folder: Path, point: int) -> list[Path]:
    return checkpoints(folder / str(point))


# Runs of this task wait at their fourth step while a file says so: what a test kills is then neither too early nor too late.
TASK = """
import time
from pathlib import Path
from meshformer.tasks import LanguageModelling

class Held(LanguageModelling):
    def losses(self, batch, phase):
        while self.trainer.global_step == 3 and Path("hold").exists() and Path("hold").read_text() == self.trainer.default_root_dir[-1]:
            Path("held").touch()
            time.sleep(0.05)
        return super().losses(batch, phase)

class Broken(LanguageModelling):
    def losses(self, batch, phase):
        if self.seed == 1 and not Path("mended").exists():
            raise RuntimeError("the widget fell off")
        return super().losses(batch, phase)
"""
HELD, BROKEN = (["allow=[mine]", f"task._target_=mine.{name}"] for name in ("Held", "Broken"))
LAYOUTS = "strategy=single,fsdp,tensor"


@dataclass
class Two:
    """A grid of six points over three layouts, killed in the middle of its third run and resumed, and one with failing points beside it."""

    grid: Path
    failing: Path
    before: dict[str, float]  # files of the runs that were finished when the grid was killed -> their time
    out: str  # what the resumed grid printed
    failed: tuple[int, str, str]


@pytest.fixture(scope="module")
def two(work: Path) -> Two:
    (work / "hold").write_text("2")
    grid = start(work, *settings(work, *HELD, LAYOUTS, "seed=0,1"))
    failing = start(work, *settings(work, *BROKEN, "model.n_heads=4,3", "seed=1,2"))
    top = work / "runs" / "text"
    wait_for(grid, lambda: top.is_dir() and sum(len(record_of(folder)["points"]) > 0 for folder in top.iterdir()) == 2)
    folders = {len(record_of(folder)["points"]): folder for folder in top.iterdir()}
    wait_for(grid, lambda: saved(folders[6], 2))
    processes = psutil.Process(grid.pid).children(recursive=True)
    assert len(processes) >= 4, "a server, a job, two ranks"
    grid.kill()
    grid.communicate()
    assert not psutil.wait_procs(processes, timeout=20)[1], "processes were left behind"
    assert states(folders[6])[:4] == ["done", "done", "running", "queued"]
    before = {str(path): path.stat().st_mtime for n in (0, 1) for path in (folders[6] / str(n)).iterdir()}
    failed = finish(failing)
    (work / "hold").unlink()
    code, out, err = finish(start(work, f"sweep.resume={folders[6]}", HELD[0]))
    assert code == 0, err
    return Two(folders[6], folders[4], before, out, failed)


def test_a_killed_grid_is_resumed_to_the_results_of_one_that_was_not(two: Two, work: Path) -> None:
    assert states(two.grid) == ["done"] * 6
    for seed in (0, 1):
        alone = run_tiny(work, f"alone-{seed}", f"trainer.max_steps={STEPS}", f"seed={seed}")
        for point in range(seed, 6, 2):
            rows = read_metrics(two.grid / str(point) / "metrics.csv")
            assert [row["step"] for row in rows] == [row["step"] for row in alone]
            assert max(abs(a["train/loss"] - b["train/loss"]) for a, b in zip(rows, alone, strict=True)) < 5e-6, point
            assert abs(rows[-1]["val/loss"] - alone[-1]["val/loss"]) < 5e-6, point


def test_finished_runs_are_not_run_again_and_the_interrupted_one_continues(two: Two) -> None:
    assert {path: Path(path).stat().st_mtime for path in two.before} == two.before
    record = json.loads((two.grid / "2" / "run.json").read_text())
    assert len(record["segments"]) == 1 and record["state"] == "finished"
    assert len(json.loads((two.grid / "3" / "run.json").read_text())["segments"]) == 0


def test_the_table_has_a_row_a_layout_with_the_spread_over_seeds(two: Two) -> None:
    assert all(f"│ {layout}" in two.out for layout in ("single", "fsdp", "tensor")) and " ± " in two.out and "│    2 │" in two.out
    rows = json.loads((two.grid / "results.json").read_text())["rows"]
    assert [len(row["points"]) for row in rows] == [2, 2, 2]
    losses = [json.loads((two.grid / str(n) / "run.json").read_text())["final"]["val/loss"] for n in rows[0]["points"]]
    assert rows[0]["metrics"]["val/loss"]["mean"] == pytest.approx(sum(losses) / 2)
    assert (two.grid / "results.csv").read_text().count("\n") == 7


def test_a_changed_grid_is_refused_and_the_same_command_has_nothing_left_to_do(two: Two, work: Path) -> None:
    command = settings(work, f"sweep.resume={two.grid}", *HELD, LAYOUTS)
    code, _, err = finish(start(work, *command, "seed=0,1,2"))
    assert code == 2 and "seed=0,1 there, seed=0,1,2 here" in err, err
    code, out, err = finish(start(work, *command, "seed=0,1"))
    assert code == 0 and " are left" not in out, err


def test_two_sweeps_that_start_at_once_do_not_meet(two: Two) -> None:
    assert two.grid.parent == two.failing.parent and two.grid != two.failing
    assert len(states(two.failing)) == 4 and len(list(two.grid.glob("[0-9]"))) == 6


def test_failing_runs_are_reported_and_the_others_go_on(two: Two, work: Path) -> None:
    code, out, err = two.failed
    folder = two.failing
    assert code == 1
    assert "RuntimeError: the widget fell off" in err and f"{folder}/0/job.log" in err
    assert "model.d_model=32: does not divide by model.n_heads=3" in err
    assert "in losses" in (folder / "0" / "job.log").read_text(), "the log holds the traceback"
    assert "1, 1 failed" in out and not (folder / "2").exists()
    assert states(folder) == ["failed", "done", "failed", "failed"]

    (work / "mended").touch()
    code, _, err = finish(start(work, f"sweep.resume={folder}", "sweep.retry_failed=true"))
    assert code == 2 and "add allow=[mine]" in err.lower(), "a folder cannot allow itself to run code"
    code, _, err = finish(start(work, f"sweep.resume={folder}", "sweep.retry_failed=true", "allow=[mine]"))
    assert code == 1 and states(folder) == ["done", "done", "failed", "failed"], err


def search(work: Path, folder: Path, *more: str) -> list[str]:
    ranges = ["optimizer.lr=tag(log,interval(0.001,0.1))", "model/position=rotary,none"]
    return settings(work, f"hydra.sweep.dir={folder}", "sweep.search=tpe", "sweep.jobs=1", *ranges, *more)


def test_a_search_survives_an_interruption_and_goes_on(work: Path) -> None:
    optuna = pytest.importorskip("optuna")
    folder = work / "search"
    options = ["sweep.trials=3", "sweep.pruner=median", "trainer.val_check_interval=2", *HELD]
    (work / "hold").write_text("1")
    (work / "held").unlink(missing_ok=True)  # of the grid before
    sweep = start(work, *search(work, folder, *options))
    wait_for(sweep, (work / "held").exists)
    assert saved(folder, 1)
    sweep.send_signal(signal.SIGINT)
    assert sweep.stderr is not None
    while "stopping" not in sweep.stderr.readline():
        pass
    time.sleep(1)  # until the run has heard
    (work / "hold").unlink()
    code, out, err = finish(sweep)
    assert code == 130, err
    assert f"continue with  meshformer train -m sweep.resume={folder}" in out
    assert states(folder) == ["done", "interrupted"]
    assert read_metrics(folder / "1" / "metrics.csv")[-1]["step"] == 4, "it was told to stop, and saved"

    code, out, err = finish(start(work, f"sweep.resume={folder}", HELD[0]))
    assert code == 0, err
    assert states(folder) == ["done"] * 3
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{folder}/study.db")
    assert [trial.number for trial in study.trials] == [0, 1, 2]
    for trial, point in zip(study.trials, record_of(folder)["points"], strict=True):
        assert trial.state.name == "COMPLETE" and trial.value == point["final"]["val/loss"]
        assert f"optimizer.lr={trial.params['optimizer.lr']}" in point["overrides"]
        assert list(trial.intermediate_values) == [2, 4], "every validation but the last is reported, before and after the interruption"
    assert [row["step"] for row in read_metrics(folder / "1" / "metrics.csv")] == [1, 2, 3, 4, 5, 6]
    assert f"best trial: {folder}/{study.best_trial.number}" in out


def test_submitit_runs_the_points_in_jobs_of_its_own(work: Path) -> None:
    """The launcher of hydra/launcher=slurm, with the executor that needs no cluster."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher.submitit_launcher")
    folder = work / "submitted"
    command = settings(work, f"hydra.sweep.dir='{folder}'", "hydra/launcher=submitit_local", "model.n_heads=3,4", "seed=1")
    code, out, err = finish(start(work, *[word for word in command if not word.startswith("hydra.launcher.cores")]))
    assert code == 1 and states(folder) == ["failed", "done"], err
    assert json.loads((folder / "1" / "run.json").read_text())["state"] == "finished"
    assert not (folder / "0").exists() and list((folder / ".submitit").iterdir())
    assert "does not divide by model.n_heads=3" in err and "1 failed" in out
