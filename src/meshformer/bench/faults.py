"""Fault injection: jobs are killed, run out of disk or get corrupted files, are resumed, and are compared with an undisturbed run.

`python -m meshformer.bench.faults --count 200` (or `make faults`). Every fault is drawn from (seed, number) alone and its outcome is a line of
FOLDER/outcomes.jsonl, so that a stopped campaign can be continued. Jobs are forked from this process, which has imported everything.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meshformer.bench.__main__ import machine
from meshformer.checkpoint.find import candidates, checkpoints, step_of
from meshformer.command.compose import compose
from meshformer.command.launch import launch
from meshformer.config.errors import ConfigError, Stopped
from meshformer.job import train
from meshformer.record.metrics_csv import read_metrics
from meshformer.record.run_json import read_run
from meshformer.tasks import LanguageModelling

LAYOUTS = ("single", "ddp", "fsdp", "tensor", "pipeline", "context")
STEPS, EVERY = 40, 5  # steps per run; steps between checkpoints
TOLERANCE = 5e-6  # tolerance of the loss between layouts, also when a run is resumed in another one
TIMEOUT, PATIENCE = 5, 45  # seconds: strategy.timeout; time for a job to end after its fault
EXACT, OLDER, LOST, HUNG = "recovered exactly", "recovered to an older checkpoint", "lost", "hung"
COMMON = [
    "data=text", "data.context_length=16", "data.batch_size=8", "model=nano", "model.n_layers=2", "model.d_model=32",
    "optimizer=adamw", "trainer.progress=false", "trainer.precision=32-true", "trainer.threads=1", "trainer.log_every_n_steps=1",
    "trainer.val_check_interval=1000", "logger=csv", "~callbacks.samples", "~callbacks.throughput",
    f"callbacks.checkpoint.every_n_steps={EVERY}", f"trainer.max_steps={STEPS}", f"strategy.timeout={TIMEOUT}",
    "task._target_=meshformer.bench.faults.Faulty", "allow=[meshformer.bench.faults]", "callbacks.nonfinite.action=skip",
]  # fmt: skip


class Faulty(LanguageModelling):
    """Language modelling with slow steps, which can be interrupted, and faults chosen by the environment variable MESHFORMER_FAULT."""

    def score(self, output: Tensor, batch: dict[str, Tensor], phase: str) -> tuple[Tensor, Tensor]:
        time.sleep(0.01)
        kind, step, rank = os.environ.get("MESHFORMER_FAULT", "none:0:0").split(":")
        total, count = super().score(output, batch, phase)
        if phase == "train" and self.trainer.global_step + 1 == int(step):
            if kind == "nan":
                total = total * float("nan")
            if kind == "hang" and os.environ.get("RANK", "0") == rank:
                time.sleep(600)
        return total, count


class Job:
    """A training job forked from this process, with all its processes in one process group."""

    def __init__(self, config: dict[str, Any], folder: Path, fault: str = "none:0:0"):
        self.folder, self.log = folder, folder.with_name(folder.name + ".log")
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(self._run(config, fault))
        with contextlib.suppress(OSError):  # the child also calls it, since either may run first
            os.setpgid(self.pid, self.pid)
        self.code: int | None = None

    def _run(self, config: dict[str, Any], fault: str) -> int:
        os.setpgid(0, 0)
        output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ["MESHFORMER_FAULT"] = fault
        code = 1
        try:
            train.TEXT_TOKENS = 400 if fault.startswith("closing") else 16  # a long sample leaves time to kill the job while it closes
            launch(config, self.folder, start_method="fork")
            code = 0
        except Stopped:
            code = 75
        except ConfigError as error:
            print(error, file=sys.stderr)
            code = 2
        except BaseException as error:
            print(f"{type(error).__name__}: {error}\n{getattr(error, 'details', '')}", file=sys.stderr)
        sys.stderr.flush()
        return code

    def ended(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is not None

    def wait(self, seconds: float) -> bool:
        """Wait until the job and all its processes have ended; after `seconds`, kill them and return False."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.ended() and not self.processes():
                return True
            time.sleep(0.02)
        self.kill(signal.SIGKILL)
        while not self.ended():
            time.sleep(0.02)
        return False

    def processes(self) -> list[int]:
        """Return the ids of the job's live processes; ranks come last."""
        found = []
        for entry in os.scandir("/proc"):
            if entry.name.isdigit():
                with contextlib.suppress(OSError):  # the process has ended meanwhile
                    fields = Path(entry.path, "stat").read_text().rpartition(")")[2].split()
                    if int(fields[2]) == self.pid and fields[0] != "Z":
                        found.append(int(entry.name))
        return sorted(found)

    def kill(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)


class Campaign:
    """Injects faults into runs in the folder `scratch`. All random choices derive from `seed`."""

    def __init__(self, scratch: Path, seed: int):
        self.scratch, self.seed = scratch, seed
        scratch.mkdir(parents=True, exist_ok=True)
        draw = random.Random(0)
        text = scratch / "text.txt"
        text.write_text(" ".join("".join(draw.choices("abcdefghij", k=draw.randint(2, 6))) for _ in range(3000)))
        data = [f"data.files=[{text}]", f"paths.data={scratch}/cache", f"paths.runs={scratch}/runs"]
        self.configs = {}
        for layout in LAYOUTS:
            devices = ["trainer.devices=1"] if layout == "single" else ["trainer.devices=2"]
            common = [c for c in COMMON if layout != "single" or not c.startswith("strategy.")]
            self.configs[layout] = compose([*common, *data, f"strategy={layout}", *devices])
        self.expected: dict[str, list[float]] = {}

    def reference(self, fault: str) -> list[float]:
        """Return the losses of an uninterrupted run in one process; with a `nan` fault, the same bad batch is included."""
        fault = fault if fault.startswith("nan") else "none:0:0"
        if fault not in self.expected:
            folder = self.scratch / f"reference-{fault.replace(':', '-')}"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            job = Job(self.configs["single"], folder, fault)
            if not job.wait(120) or job.code != 0:
                raise RuntimeError(f"the reference run failed: {job.log.read_text()[-2000:]}")
            self.expected[fault] = losses(folder)
        return self.expected[fault]

    def fault(self, number: int) -> dict[str, Any]:
        """Inject fault `number`, resume the run in another random layout, and return the outcome."""
        draw = random.Random(f"{self.seed}/{number}")
        kind = list(FAULTS)[number % len(FAULTS)]
        first, then = draw.choice([x for x in LAYOUTS if x != "single" or kind not in NEEDS_RANKS]), draw.choice(LAYOUTS)
        folder, begun = self.scratch / f"fault-{number:04d}", time.monotonic()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        folder.with_name(folder.name + ".log").unlink(missing_ok=True)
        outcome: dict[str, Any] = {"number": number, "fault": kind, "layout": first, "resumed in": then}
        at = draw.randint(EVERY + 2, STEPS - 3)
        spec = f"{kind}:{at}:1" if kind in ("nan", "hang") else "closing:0:0" if kind == CLOSING else "none:0:0"
        job = Job(merged(self.configs[first], SETTINGS.get(kind, {})), folder, spec)
        detail = FAULTS[kind](job, draw, at)
        in_time = job.wait(PATIENCE)
        newest = max((step_of(p) for p in checkpoints(folder)), default=0)
        attempted = max((step_of(p) for p in candidates(folder)), default=0)
        state = read_run(folder)["state"]
        outcome |= {"detail": detail, "exit": job.code, "state": state, "checkpoint": newest}
        if not in_time:
            return outcome | {"outcome": HUNG, "why": f"not ended {PATIENCE} s after the fault"}
        if state == "running" and job.code not in (0, -signal.SIGKILL):
            return outcome | {"outcome": LOST, "why": "the record says running though the job ended"}
        if job.code != 0:
            damaged = DAMAGE[kind](folder, draw) if kind in DAMAGE else None
            outcome |= {"damaged": damaged} if damaged else {}
            job = Job(self.configs[then] | {"resume": str(folder)}, folder, spec if kind == "nan" else "none:0:0")
            if not job.wait(2 * PATIENCE):
                return outcome | {"outcome": HUNG, "why": "the resumed job did not end"}
        outcome["seconds"] = round(time.monotonic() - begun, 1)
        if job.code != 0:
            return outcome | {"outcome": LOST, "why": f"resume ended with {job.code}: {last_line(job.log)}"}
        found, expected = losses(folder), self.reference(spec)
        apart = max((difference(a, b) for a, b in zip(found, expected, strict=False)), default=0.0)
        outcome["largest difference"] = apart
        if len(found) != len(expected) or not apart <= TOLERANCE:
            return outcome | {"outcome": LOST, "why": f"{len(found)} rows of {len(expected)}, losses {apart:.2g} apart"}
        shutil.rmtree(folder)
        return outcome | {"outcome": OLDER if kind in DAMAGE or newest < attempted else EXACT}


def merged(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of `config` with the nested `changes` merged in."""
    inner = {key: merged(config[key], value) if isinstance(value, dict) else value for key, value in changes.items()}
    return {**config, **inner}


def losses(folder: Path) -> list[float]:
    return [float(row.get("train/loss", "nan")) for row in read_metrics(folder / "metrics.csv")]


def difference(a: float, b: float) -> float:
    """Return |a − b|: 0 if both are nan (a skipped batch has no loss in either run), infinity if only one is."""
    if math.isnan(a) or math.isnan(b):
        return 0.0 if math.isnan(a) and math.isnan(b) else math.inf
    return abs(a - b)


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def until(job: Job, step: int) -> None:
    """Wait until the run has logged `step` in metrics.csv, which is flushed before each checkpoint, and has a checkpoint."""
    path = job.folder / "metrics.csv"
    while not job.ended():
        with contextlib.suppress(OSError, ValueError):
            lines = path.read_text().splitlines()
            if len(lines) > 1 and int(lines[-1].split(",")[0]) >= step and checkpoints(job.folder):
                return
        time.sleep(0.005)


def ranks(job: Job) -> list[int]:
    return [pid for pid in job.processes() if pid != job.pid]


def kill_rank(job: Job, draw: random.Random, at: int) -> str:
    until(job, at)
    alive = ranks(job)
    victim = draw.choice(alive) if alive else job.pid
    with contextlib.suppress(ProcessLookupError):
        os.kill(victim, signal.SIGKILL)
    return f"at step {at}"


def kill_all(job: Job, draw: random.Random, at: int) -> str:
    until(job, at)
    time.sleep(draw.random() * 0.05)
    job.kill(signal.SIGKILL)
    return f"at step {at}"


def kill_in_save(job: Job, draw: random.Random, at: int) -> str:
    """Kill the job as soon as an unfinished checkpoint appears after the first one."""
    until(job, EVERY)
    folder, pause, unfinished = job.folder / "checkpoints", draw.random() * 0.01, []
    while not job.ended():
        unfinished = [p.name for p in folder.iterdir() if p.name.endswith(".tmp")]
        if unfinished:
            time.sleep(pause)
            break
        time.sleep(0.0005)
    job.kill(signal.SIGKILL)
    return f"while {', '.join(unfinished)} was there" if unfinished else "the job had ended"


def sigterm(job: Job, draw: random.Random, at: int) -> str:
    until(job, at)
    with contextlib.suppress(ProcessLookupError):
        os.kill(job.pid, signal.SIGTERM)
    return f"at step {at}"


def sigterm_to_all(job: Job, draw: random.Random, at: int) -> str:
    """Send SIGTERM to every process, including those of the data loaders, as SLURM and Kubernetes do."""
    until(job, at)
    job.kill(signal.SIGTERM)
    return f"at step {at}, to every process"


def kill_at_the_end(job: Job, draw: random.Random, at: int) -> str:
    """Kill the job after its last checkpoint, before run.json says finished."""
    while not job.ended() and max((step_of(p) for p in checkpoints(job.folder)), default=0) < STEPS:
        time.sleep(0.002)
    time.sleep(draw.random() * 0.05)
    job.kill(signal.SIGKILL)
    return f"behind the checkpoint of step {STEPS}"


def disk_full_for_a_while(job: Job, draw: random.Random, at: int) -> str:
    """Limit every file to 1 KiB for 0.1 s, so that writing rows, checkpoints and records fails; the run is configured to continue."""
    at = min(at, STEPS // 2)
    until(job, at)
    for size in (1 << 10, resource.RLIM_INFINITY):
        for pid in job.processes():
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        time.sleep(0.1)
    return f"from step {at}, for 0.1 s"


def full_disk(job: Job, draw: random.Random, at: int) -> str:
    """Limit every file to 16 KiB from now on, so that the next checkpoint fails as on a full disk, although with another error message."""
    until(job, at)
    for pid in job.processes():
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (16 << 10, resource.RLIM_INFINITY))
    return f"from step {at}"


def nothing_yet(job: Job, draw: random.Random, at: int) -> str:
    return f"at step {at}"


def truncate(folder: Path, draw: random.Random) -> str:
    file = _file_of_newest(folder, draw)
    with open(file, "r+b") as stream:
        stream.truncate(draw.randrange(file.stat().st_size))
    return f"{file.parent.name}/{file.name} truncated"


def flip(folder: Path, draw: random.Random) -> str:
    file = _file_of_newest(folder, draw)
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)
    return f"a bit of {file.parent.name}/{file.name} flipped"


def remove(folder: Path, draw: random.Random) -> str:
    file = _file_of_newest(folder, draw)
    file.unlink()
    return f"{file.parent.name}/{file.name} removed"


def _file_of_newest(folder: Path, draw: random.Random) -> Path:
    newest = checkpoints(folder)[-1]
    return draw.choice(sorted(p for p in newest.iterdir() if p.stat().st_size))


def two_checkpoints(job: Job, draw: random.Random, at: int) -> str:
    """Kill the job once it has two checkpoints: the newest will be damaged, and the run must resume from the other."""
    return kill_all(job, draw, max(at, 2 * EVERY + 2))


Inject = Callable[[Job, random.Random, int], str]
CLOSING = "kill at the end"
FAULTS: dict[str, Inject] = {
    "kill -9 of a rank": kill_rank, "kill all": kill_all, "kill in a save": kill_in_save, "SIGTERM": sigterm, "truncated file": two_checkpoints,
    "flipped bit": two_checkpoints, "missing file": two_checkpoints, "full disk": full_disk, "nan": nothing_yet, "hang": nothing_yet,
    "stop with loaders": sigterm_to_all, CLOSING: kill_at_the_end, "full disk, go on": disk_full_for_a_while,
}  # fmt: skip
DAMAGE: dict[str, Callable[[Path, random.Random], str]] = {"truncated file": truncate, "flipped bit": flip, "missing file": remove}
SETTINGS: dict[str, dict[str, Any]] = {  # extra settings of the run that gets the fault
    "stop with loaders": {"data": {"workers": 2}},
    "full disk, go on": {"callbacks": {"checkpoint": {"on_failure": "warn"}}},
}
NEEDS_RANKS = ("kill -9 of a rank", "hang")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m meshformer.bench.faults", description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("runs/faults"), help="folder for outcomes and for runs that were lost")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(f"{datetime.date.today()}  {machine()}  torch {torch.__version__}", flush=True)
    campaign = Campaign(options.folder.absolute() / f"seed-{options.seed}", options.seed)
    outcomes = campaign.scratch / "outcomes.jsonl"
    known = [json.loads(line) for line in outcomes.read_text().splitlines()] if outcomes.is_file() else []
    done = {outcome["number"]: outcome for outcome in known}
    for number in range(options.count):
        if number not in done:
            done[number] = campaign.fault(number)
            with open(outcomes, "a", encoding="utf-8") as file:
                file.write(json.dumps(done[number]) + "\n")
            outcome = done[number]
            why = f": {outcome['why']}" if "why" in outcome else ""
            print(f"{number:4d}  {outcome['fault']:<18}{outcome['layout']:>9} → {outcome['resumed in']:<9} {outcome['outcome']}{why}", flush=True)
    print(table([done[number] for number in range(options.count)]))
    return int(any(outcome["outcome"] in (LOST, HUNG) for outcome in done.values()))


def table(outcomes: list[dict[str, Any]]) -> str:
    columns = (EXACT, OLDER, LOST, HUNG)
    lines = [f"{'fault':<20}{'injected':>9}" + "".join(f"{name:>{len(name) + 2}}" for name in columns)]
    counts = collections.Counter((outcome["fault"], outcome["outcome"]) for outcome in outcomes)
    rows = [(kind, {name: counts[kind, name] for name in columns}) for kind in FAULTS]
    rows.append(("all", {name: sum(row[name] for _, row in rows) for name in columns}))
    for kind, row in rows:
        lines.append(f"{kind:<20}{sum(row.values()):>9}" + "".join(f"{row[name]:>{len(name) + 2}}" for name in columns))
    layouts = sorted({outcome["layout"] for outcome in outcomes})
    return "\n".join(["", *lines, "", f"in {len(layouts)} layouts: {', '.join(layouts)}"])


if __name__ == "__main__":
    sys.exit(main())
