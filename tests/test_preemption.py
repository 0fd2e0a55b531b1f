"""Told to stop, a run ends at a step boundary, saved, and goes on as if it had not."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist

from harness import run_ranks
from jobs import TINY, run_tiny, text_file
from meshformer.callbacks.preemption import Preemption, StopSignals
from meshformer.checkpoint.find import latest_checkpoint, step_of
from meshformer.cli import main
from meshformer.config.errors import Stopped
from meshformer.record.metrics_csv import read_metrics
from meshformer.tasks import LanguageModelling

ROOT = Path(__file__).parents[1]
CLI = [sys.executable, "-m", "meshformer.cli", "train"]
LAYOUTS = {
    "single": ["strategy=single"],
    "pipeline": ["strategy=pipeline", "trainer.devices=2"],
    "ddp": ["strategy=ddp", "trainer.devices=2"],
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preemption")
    text_file(folder)
    return folder


def settings(work: Path, *overrides: str) -> list[str]:
    paths = [f"data.files=[{work}/text.txt]", f"paths.data={work}/cache", f"paths.runs={work}/runs"]
    return [*TINY, *paths, "schedule=constant", "callbacks.checkpoint.every_n_steps=100000", *overrides]


def environment(folder: Path) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "TORCHELASTIC", "SLURM"))}
    return clean | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{folder.parent}", "OMP_NUM_THREADS": "1"}


def slow_task(work: Path, pause: str, when: str) -> list[str]:
    """Settings of a task that does `pause` in the steps in which `when` holds."""
    name = f"slow_{abs(hash(pause))}"
    (work / f"{name}.py").write_text(
        "import time\n"
        "from meshformer.tasks import LanguageModelling\n"
        "class Slow(LanguageModelling):\n"
        "    def training_step(self, batch, batch_idx):\n"
        f"        if {when}:\n"
        f"            {pause}\n"
        "        return super().training_step(batch, batch_idx)\n"
    )
    return [f"task._target_={name}.Slow", f"allow=[{name}]"]


def begin(command: list[str], folder: Path, rows: int = 4) -> subprocess.Popen[str]:
    """Starts `command` and returns when the run in `folder` has logged some steps."""
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(folder))
    metrics, end = folder / "metrics.csv", time.monotonic() + 120
    while time.monotonic() < end and job.poll() is None and not (metrics.is_file() and len(metrics.read_text().splitlines()) > rows):
        time.sleep(0.05)
    assert job.poll() is None, job.communicate()
    return job


@pytest.mark.parametrize(
    ("layout", "number", "code"),
    [
        ("single", signal.SIGINT, 130),
        ("pipeline", signal.SIGUSR1, 75),
        ("ddp", signal.SIGTERM, 75),
        pytest.param("single", signal.SIGTERM, 75, marks=pytest.mark.slow),
    ],
)
def test_a_signal_stops_the_run_saved_and_it_goes_on_exactly(work: Path, layout: str, number: signal.Signals, code: int) -> None:
    folder = work / f"{layout}-{number.name}"
    calm = "optimizer.lr=1e-3"  # the default here makes four times as much of a rounding error in each step
    command = [*CLI, *settings(work, *LAYOUTS[layout], calm, f"hydra.run.dir={folder}", "trainer.max_steps=100000")]
    job = begin(command, folder)
    if layout != "single":  # SLURM sends it to every process of a job step, and the command passes its own on
        for process in psutil.Process(job.pid).children(recursive=True):
            process.send_signal(number)
    job.send_signal(number)
    _, err = job.communicate(timeout=60)
    assert job.returncode == code, err
    assert "Traceback" not in err
    assert "saved" in err and f"resume={folder}" in err
    record = json.loads((folder / "run.json").read_text())
    step = step_of(latest_checkpoint(folder))
    assert record["state"] == "preempted" and f"after step {step}" in record["error"]["message"]
    assert not (folder / ".ranks").exists()
    assert run_ranks(1, main, ["train", f"resume={folder}", f"trainer.max_steps={step + 3}", "strategy=single", "trainer.devices=1"]) == [0]
    resumed = read_metrics(folder / "metrics.csv")
    # Whole runs in the same layout: over the steps before the ranks hear of the signal layouts drift apart by rounding.
    whole = [f"whole-{folder.name}", "schedule=constant", calm, f"trainer.max_steps={step + 3}", *LAYOUTS[layout]]
    expected = run_ranks(len(LAYOUTS[layout]), run_tiny, work, *whole)[0]
    assert [r["step"] for r in resumed] == list(range(1, step + 4))
    assert max(abs(a["train/loss"] - b["train/loss"]) for a, b in zip(resumed, expected, strict=True)) < 1e-5


def stopped_on_a_full_disk(folder: Path, name: str, *overrides: str) -> tuple[Stopped, str]:
    usage, step = shutil.disk_usage, LanguageModelling.training_step
    shutil.disk_usage = lambda path: usage(path)._replace(free=0)  # pyright: ignore[reportAttributeAccessIssue]

    def step_and_signal(self: Any, *arguments: Any) -> Any:
        if self.trainer.global_step == 2 and self.trainer.is_global_zero:
            os.kill(os.getpid(), signal.SIGUSR1)
        return step(self, *arguments)

    LanguageModelling.training_step = step_and_signal
    with contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            run_tiny(folder, name, "callbacks.checkpoint.on_failure=warn", *overrides)
        except Stopped as stopped:
            return stopped, err.getvalue()
    raise AssertionError("not stopped")


def agreements(slow: float) -> tuple[int, list[int]]:
    """On one of two ranks: how many exchanges 250 steps took, and at which later step it heard of a signal to rank 1, whose steps are slower."""
    dist.init_process_group("gloo")
    signals, begun = StopSignals(by_agent=False), []
    stopping, rank, exchange = Preemption(signals), dist.get_rank(), dist.all_reduce
    stopping.group = dist.group.WORLD
    dist.all_reduce = lambda *args, **kwargs: (begun.append(1), exchange(*args, **kwargs))[1]
    heard: list[int] = []
    for _ in range(250):
        time.sleep(slow * (1 + rank))
        assert stopping._agreed() is None
    exchanges = len(begun)
    signals.requested = "preempted" if rank else None
    for step in range(250):
        time.sleep(slow * (1 + rank))
        if stopping._agreed() == "preempted":
            heard.append(step)
            break
    stopping._finish()
    dist.destroy_process_group()
    return exchanges, heard


@pytest.mark.parametrize(("slow", "fewest", "most"), [(1e-4, 3, 20), (0.005, 4, 40)])
def test_ranks_of_unequal_speed_exchange_now_and_then_and_hear_at_the_same_step(slow: float, fewest: int, most: int) -> None:
    (one, heard), (other, too) = run_ranks(2, agreements, slow)
    assert one == other and fewest <= one <= most  # it would be 250 after every step
    assert heard == too and len(heard) == 1


@pytest.mark.parametrize("layout", ["single", "pipeline"])
def test_a_run_that_could_not_be_saved_does_not_say_so(work: Path, layout: str) -> None:
    ends = run_ranks(len(LAYOUTS[layout]), stopped_on_a_full_disk, work, f"full-{layout}", *LAYOUTS[layout], "trainer.max_steps=1000")
    for stopped, _ in ends:
        assert not stopped.saved and str(stopped).endswith("not saved: the save failed")
    assert "not enough disk space" in ends[0][1] and "continue with" not in ends[0][1]
    assert json.loads((work / f"full-{layout}" / "run.json").read_text())["state"] == "preempted"


def test_a_second_signal_ends_the_job_at_once(work: Path) -> None:
    folder = work / "twice"
    command = [*CLI, *settings(work, "strategy=ddp", "trainer.devices=2", f"hydra.run.dir={folder}", "trainer.max_steps=100000")]
    job = begin([*command, *slow_task(work, "time.sleep(600)", "self.trainer.global_step == 6")], folder, rows=6)  # the next step sleeps
    processes = psutil.Process(job.pid).children(recursive=True)
    job.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert job.poll() is None, "the step in progress never ends, so the first signal waits"
    job.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    job.communicate(timeout=60)
    assert job.returncode not in (0, 75)
    assert time.monotonic() - begun < 30
    _, alive = psutil.wait_procs(processes, timeout=5)
    assert not alive


def test_ranks_that_were_not_there_yet_hear_of_it_too(work: Path) -> None:
    folder = work / "early"
    command = [*CLI, *settings(work, "strategy=ddp", "trainer.devices=2", f"hydra.run.dir={folder}", "trainer.max_steps=100000")]
    job = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment(folder))
    while not (folder / ".ranks").exists():
        time.sleep(0.01)
    time.sleep(0.1)
    assert not list((folder / ".ranks").glob("*.pid"))
    job.send_signal(signal.SIGTERM)
    _, err = job.communicate(timeout=120)
    assert job.returncode == 75 and "saved" in err, err


def test_a_dead_rank_starts_again_from_the_newest_checkpoint(work: Path) -> None:
    folder = work / "restarted"
    layout = ["strategy=ddp", "trainer.devices=2", "trainer.max_steps=60"]
    overrides = [
        *layout,
        f"hydra.run.dir={folder}",
        "launch.max_restarts=1",
        *slow_task(work, "time.sleep(0.1)", "self.trainer.global_step > 20"),
    ]
    job = begin([*CLI, *settings(work, *overrides), "callbacks.checkpoint.every_n_steps=10"], folder, rows=25)
    ranks = [rank for server in psutil.Process(job.pid).children() for rank in server.children()]
    ranks[-1].kill()
    _, err = job.communicate(timeout=180)
    assert job.returncode == 0, err
    record = json.loads((folder / "run.json").read_text())
    assert record["state"] == "finished" and [segment["state"] for segment in record["segments"]] == ["failed"]
    rows, (expected, _) = read_metrics(folder / "metrics.csv"), run_ranks(2, run_tiny, work, "never-died", "schedule=constant", *layout)
    assert [(r["step"], r["train/loss"]) for r in rows] == [(r["step"], r["train/loss"]) for r in expected]
    assert len(rows) == 60
