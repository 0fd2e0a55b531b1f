"""Real processes: the elastic agent inside the command, torchrun from outside, a multirun; one folder each, no process left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from harness import free_port
from jobs import TINY, text_file
from meshformer.checkpoint.find import latest_checkpoint, step_of
from meshformer.checkpoint.write import write_folder
from meshformer.cli import main
from meshformer.command.slurm import requeue
from meshformer.record import RunRecord
from meshformer.record.metrics_csv import read_metrics

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    text_file(folder)
    return folder


def settings(work: Path, *overrides: str) -> list[str]:
    return [
        *TINY,
        f"data.files=[{work}/text.txt]",
        f"paths.data={work}/cache",
        f"paths.runs={work}/runs",
        "trainer.max_steps=4",
        *overrides,
    ]


def start(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "TORCHELASTIC", "SLURM"))}
    env = clean | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=env, check=False)


CLI = [sys.executable, "-m", "meshformer.cli", "train"]


@pytest.fixture(scope="module")
def agent(work: Path) -> tuple[Path, str]:
    """The folder of a run of two ranks from one command, and what the command printed."""
    done = start([*CLI, *settings(work, "strategy=ddp", "trainer.devices=2", f"hydra.run.dir={work}/agent")])
    assert done.returncode == 0, done.stderr
    return work / "agent", done.stdout


def test_two_ranks_from_one_command_leave_one_folder(agent: tuple[Path, str]) -> None:
    folder, printed = agent
    assert [r["step"] for r in read_metrics(folder / "metrics.csv")] == [1, 2, 3, 4]
    assert json.loads((folder / "run.json").read_text())["layout"]["processes"] == 2
    assert printed.count("run folder") == 1
    assert not (folder / ".ranks").exists()


def test_a_run_of_two_ranks_is_evaluated_in_one_process(agent: tuple[Path, str]) -> None:
    folder, _ = agent
    done = start([sys.executable, "-m", "meshformer.cli", "evaluate", f"run={folder}"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("val/loss") == 1
    shown = float(done.stdout.split("val/loss")[1].split()[0])
    last: dict[str, Any] = read_metrics(folder / "metrics.csv")[-1]
    assert abs(shown - last["val/loss"]) < 1e-5


def test_several_nodes_need_an_outside_launcher(work: Path) -> None:
    done = start([*CLI, *settings(work, "strategy=ddp", "trainer.devices=1", "trainer.num_nodes=2", f"hydra.run.dir={work}/nodes")])
    assert done.returncode == 2
    assert "torchrun" in done.stderr
    assert not (work / "nodes").exists()


def ranks_of(command: int) -> list[psutil.Process]:
    """The command starts a fork server, the fork server the ranks (and only those)."""
    return [rank for server in psutil.Process(command).children() for rank in server.children()]


def test_a_killed_rank_is_recorded_as_a_failure(work: Path) -> None:
    folder = work / "killed"
    command = [*CLI, *settings(work, "strategy=ddp", "trainer.devices=2", f"hydra.run.dir={folder}", "trainer.max_steps=100000")]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while time.monotonic() < end and job.poll() is None and not (folder / "metrics.csv").is_file():
        time.sleep(0.1)
    assert job.poll() is None, job.communicate()
    ranks = ranks_of(job.pid)
    assert len(ranks) == 2
    ranks[-1].kill()
    begun = time.monotonic()
    _, err = job.communicate(timeout=90)
    assert time.monotonic() - begun < 30
    assert job.returncode == 1, err
    assert not psutil.wait_procs(ranks, timeout=5)[1]
    assert json.loads((folder / "run.json").read_text())["state"] == "failed"


def test_ctrl_c_while_the_ranks_start_stops_the_run_without_a_trace(work: Path) -> None:
    """A terminal sends it to every process; the one that imports torch for the ranks must live on."""
    folder = work / "early"
    overrides = ["strategy=ddp", "trainer.devices=2", "trainer.max_steps=100000", f"hydra.run.dir={folder}"]
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    job = subprocess.Popen([*CLI, *settings(work, *overrides)], **pipes, env=env, start_new_session=True)
    end = time.monotonic() + 60
    while time.monotonic() < end and not (folder / ".ranks").is_dir():  # made when the server of the ranks is started
        time.sleep(0.05)
    time.sleep(1)  # it imports for some seconds
    os.killpg(job.pid, signal.SIGINT)
    _, told = job.communicate(timeout=180)
    assert job.returncode == 130 and "Traceback" not in told and "stopped by Ctrl-C after step" in told, told


@pytest.mark.slow
def test_torchrun_from_outside_trains_in_one_folder(work: Path, agent: tuple[Path, str]) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "meshformer.cli", "train"]
    done = start([*torchrun, *settings(work, "strategy=ddp", "trainer.devices=2", f"hydra.run.dir={work}/torchrun")])
    assert done.returncode == 0, done.stderr
    inside, outside = read_metrics(agent[0] / "metrics.csv"), read_metrics(work / "torchrun" / "metrics.csv")
    assert [r["train/loss"] for r in outside] == [r["train/loss"] for r in inside]
    assert done.stdout.count("run folder") == 1


def broken_task(work: Path, mistake: str) -> list[str]:
    """Settings of a task in which rank 1 does `mistake` in the third step."""
    name = f"broken_{abs(hash(mistake))}"
    (work / f"{name}.py").write_text(
        "import os, time\n"
        "from meshformer.tasks import LanguageModelling\n"
        "class Broken(LanguageModelling):\n"
        "    def training_step(self, batch, batch_idx):\n"
        "        if os.environ['RANK'] == '1' and self.trainer.global_step == 2:\n"
        f"            {mistake}\n"
        "        return super().training_step(batch, batch_idx)\n"
    )
    return [f"task._target_={name}.Broken", f"allow=[{name}]"]


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "pipeline"])
def test_a_failing_rank_ends_the_job_with_its_own_words(work: Path, strategy: str) -> None:
    task = broken_task(work, "raise RuntimeError('the widget fell off')")
    command = settings(work, f"strategy={strategy}", "trainer.devices=2", f"hydra.run.dir={work}/failed-{strategy}", *task)
    begun = time.monotonic()
    done = start([*CLI, *command], PYTHONPATH=f"{ROOT / 'src'}{os.pathsep}{work}")
    assert done.returncode == 1
    assert "rank 1 failed: RuntimeError: the widget fell off" in done.stderr
    assert "in training_step" in done.stderr, "the failing rank's own traceback is shown"
    assert time.monotonic() - begun < 60
    assert json.loads((work / f"failed-{strategy}" / "run.json").read_text())["state"] == "failed"


def test_a_hung_rank_ends_the_job_after_the_timeout(work: Path) -> None:
    task = broken_task(work, "time.sleep(600)")
    folder = work / "hung"
    command = settings(work, "strategy=fsdp", "trainer.devices=2", "strategy.timeout=5", f"hydra.run.dir={folder}", *task)
    begun = time.monotonic()
    done = start([*CLI, *command], PYTHONPATH=f"{ROOT / 'src'}{os.pathsep}{work}")
    assert done.returncode == 1
    assert "rank 0 waited for rank 1, longer than strategy.timeout allows" in done.stderr, done.stderr
    assert time.monotonic() - begun < 60
    record = json.loads((folder / "run.json").read_text())
    assert record["state"] == "failed"


def srun(command: list[str], work: Path, job: str, **more: str) -> list[subprocess.Popen[str]]:
    """What srun sets, set by hand: two tasks on one node. The port is another one each time."""
    port = free_port()
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "TORCHELASTIC", "SLURM"))}
    tasks = []
    for rank in range(2):
        slurm = {
            "SLURM_JOB_ID": job, "SLURM_JOB_NAME": "train", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_STEP_NUM_NODES": "1", "SLURM_NNODES": "1", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0",
            "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NODELIST": "localhost", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        env = clean | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{work}", "OMP_NUM_THREADS": "1"} | slurm | more
        tasks.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env))
    return tasks


def test_a_slurm_job_told_to_stop_is_requeued_once_and_goes_on_in_its_folder(work: Path) -> None:
    (work / "bin").mkdir()
    scontrol = work / "bin" / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {work}/scontrol.log\n')
    scontrol.chmod(0o755)
    (work / "slow_first.py").write_text(
        "import os, time\n"
        "from meshformer.tasks import LanguageModelling\n"
        "class Slow(LanguageModelling):\n"
        "    def training_step(self, batch, batch_idx):\n"
        "        time.sleep(0 if 'SLURM_RESTART_COUNT' in os.environ else 0.3)\n"
        "        return super().training_step(batch, batch_idx)\n"
    )
    command = [*CLI, *settings(work, "strategy=tensor", "trainer.devices=2", "trainer.max_steps=40", "launch.requeue=true")]
    command += ["task._target_=slow_first.Slow", "allow=[slow_first]", f"paths.runs={work}/slurm"]
    path = f"{work / 'bin'}{os.pathsep}{os.environ['PATH']}"
    tasks, end = srun(command, work, "77", PATH=path), time.monotonic() + 120
    while time.monotonic() < end and not list((work / "slurm").glob("*/job-*/metrics.csv")):
        assert [task.poll() for task in tasks] == [None, None], [task.communicate() for task in tasks]
        time.sleep(0.05)
    for task in tasks:
        task.send_signal(signal.SIGUSR1)
    ends = [task.communicate(timeout=120) for task in tasks]
    assert [task.returncode for task in tasks] == [75, 75], ends
    assert (work / "scontrol.log").read_text() == "requeue 77\n"
    assert "SLURM job 77 is requeued" in ends[0][1] and "SLURM" not in ends[1][1]
    (folder,) = (work / "slurm").glob("*/*")
    step = step_of(latest_checkpoint(folder))
    assert 0 < step < 40

    tasks = srun(command, work, "77", PATH=path, SLURM_RESTART_COUNT="1")
    ends = [task.communicate(timeout=180) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], ends
    assert sum(out.count("run folder") for out, _ in ends) == 1
    assert list((work / "slurm").glob("*/*")) == [folder]
    assert [r["step"] for r in read_metrics(folder / "metrics.csv")] == list(range(1, 41))
    record = json.loads((folder / "run.json").read_text())
    assert record["state"] == "finished" and [segment["state"] for segment in record["segments"]] == ["preempted"]
    assert record["layout"]["tensor"] == 2
    assert (work / "scontrol.log").read_text() == "requeue 77\n"


@pytest.fixture
def jobs(work: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Path]]:
    """(what it resumes, its folder) of each job that the command would start."""
    started: list[tuple[Any, Path]] = []
    monkeypatch.setattr("meshformer.command.jobs._launch", lambda config, folder: started.append((config["resume"], folder)))
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    return started


def test_a_requeued_job_finds_the_folder_of_its_own_command_alone(work: Path, jobs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (["train", *settings(work, f"paths.runs={work}/requeued", f"seed={seed}")] for seed in (1, 2))
    for command in (one, other, one):
        assert main(command) == 0
    folders = [folder for _, folder in jobs]
    assert len(set(folders)) == 3, "at its first start a job makes a new folder for every command"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert main(other) == 0
    assert jobs[-1] == (None, folders[1]), "it had ended before its first checkpoint, so it begins again in its folder"
    save_something(folders[1] / "checkpoints" / "step-00000002")
    assert main(other) == 0
    assert jobs[-1] == (str(folders[1]), folders[1])
    monkeypatch.setenv("SLURM_JOB_ID", "4712")
    assert main(other) == 0
    assert jobs[-1][1] not in folders, "another job"


def test_a_requeued_job_keeps_to_the_folder_it_was_given_and_ends_when_all_is_done(
    work: Path, jobs: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", *settings(work, f"hydra.run.dir={work}/given")]
    assert main(command) == 0 and main(command) == 2
    assert "already used" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    save_something(work / "given" / "checkpoints" / "step-00000004")
    assert main(command) == 0
    assert jobs[-1] == (str(work / "given"), work / "given")
    RunRecord(work / "given").finish("finished")
    assert main(command) == 0
    assert len(jobs) == 2 and "finished already" in capsys.readouterr().out


def save_something(path: Path) -> None:
    write_folder(path, {"model.x": torch.zeros(2)}, {"step": 2})


def test_a_job_that_cannot_be_requeued_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def told() -> str:
        requeue()
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("warning: launch.requeue=true: the job could not be put back in the queue (")
        return line

    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert "no SLURM job" in told()
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "'scontrol'" in told()
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho 'Requested operation is presently disabled' >&2\nexit 1\n")
    (tmp_path / "scontrol").chmod(0o755)
    assert "presently disabled" in told()


def test_torchrun_on_two_nodes_trains_a_product_of_axes(work: Path) -> None:
    port = free_port()
    nodes = []
    for node in range(2):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={node}", "--nproc-per-node=2"]
        torchrun += ["--master-addr=127.0.0.1", f"--master-port={port}", "-m", "meshformer.cli", "train"]
        command = settings(work, "strategy=hsdp", "trainer.num_nodes=2", "trainer.devices=2", f"hydra.run.dir={work}/nodes2")
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "TORCHELASTIC"))}
        env = clean | {"PYTHONPATH": f"{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}
        nodes.append(subprocess.Popen([*torchrun, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env))
    ends = [node.communicate(timeout=180) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], ends
    layout = json.loads((work / "nodes2" / "run.json").read_text())["layout"]
    assert (layout["replicate"], layout["shard"], layout["processes"]) == (2, 2, 4)
