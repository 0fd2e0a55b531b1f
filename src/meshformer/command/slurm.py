"""Requeue a SLURM job, and let the restarted job find and resume its run folder.

A requeued job keeps its job id. Each run folder stores the id and a hash of the command that made it in `.slurm_job`, since generated names,
ports and step numbers may differ between starts.
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
    """Return a line that identifies this command within its SLURM job, from hydra.run.dir and the text of overrides.txt; None outside of SLURM."""
    job = os.environ.get("SLURM_JOB_ID")
    return job and f"{job} {hashlib.sha256(f'{folder} {overrides}'.encode()).hexdigest()[:16]}\n"


def earlier_start(config: dict[str, Any], folder: str, mark: str | None) -> Path | None:
    """Return the run folder of an earlier start of this job, or None at its first start. The same on every rank. `folder`: hydra.run.dir as typed."""
    if mark is None or os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        return None
    runs = Path(config["paths"]["runs"]) / config["experiment"]
    folders = sorted(runs.glob("*/")) if folder == "auto" else [Path(folder)]
    return next((one.absolute() for one in folders if _read(one / MARK) == mark), None)


def requeue() -> None:
    """Requeue the current job with `scontrol requeue`; SLURM then ends its processes. A failure only prints a warning, since the run is saved."""
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
        say(f"SLURM job {job} is requeued and will resume by itself", error=True)
    else:
        say(f"warning: launch.requeue=true: the job could not be put back in the queue ({problem})", error=True)


def _read(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return None
