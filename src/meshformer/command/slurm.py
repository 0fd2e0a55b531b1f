"""A SLURM job that is put back in the queue starts again under its old number: its command then finds the run folder that it made, and goes on.

A run folder remembers, in a file of its own, the job and the command that made it: names, ports and step numbers may differ between starts.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path
from typing import Any

from meshformer.printing import say

MARK = ".slurm_job"


def job_mark(folder: str, overrides: str) -> str | None:
    """What tells this command (`hydra.run.dir` and the text of overrides.txt) of this job from others; None outside of SLURM."""
    job = os.environ.get("SLURM_JOB_ID")
    return job and f"{job} {hashlib.sha256(f'{folder} {overrides}'.encode()).hexdigest()[:16]}\n"


def earlier_start(config: dict[str, Any], folder: str, mark: str | None) -> Path | None:
    """The run folder of an earlier start of this job; None at its first. The same on every rank. `folder`: hydra.run.dir as it was given."""
    if mark is None or os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        return None
    runs = Path(config["paths"]["runs"]) / config["experiment"]
    folders = sorted(runs.glob("*/")) if folder == "auto" else [Path(folder)]
    return next((one.absolute() for one in folders if _read(one / MARK) == mark), None)


def requeue() -> None:
    """`scontrol requeue` of the job around this process. SLURM then ends what is left of it. A failure is a warning: the run is saved."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        problem = "this is no SLURM job"
    else:
        try:
            done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60, check=False)
            said = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
            problem = said if done.returncode else None
        except (OSError, subprocess.TimeoutExpired) as error:
            problem = str(error)
    if problem is None:
        say(f"SLURM job {job} goes back to the queue, and on by itself", error=True)
    else:
        say(f"warning: launch.requeue=true: the job could not be put back in the queue ({problem})", error=True)


def _read(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return None
