"""The folder of a run that starts: new, the user's own, or one that processes started from outside agree on without talking."""

from __future__ import annotations

import hashlib
import os
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from meshformer.config import ConfigError
from meshformer.config.resolve import ExternalLauncher
from meshformer.printing import argument
from meshformer.record import atomic_write_text, new_run_folder

STAMP = "%Y-%m-%d_%H-%M-%S"


def claim_folder(folder: Path) -> None:
    """Make `folder` if need be and claim it by an empty config.yaml. Raises ConfigError when anything is in it: runs do not mix."""
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(
            f"the folder {folder} is already used", "hydra.run.dir", fix=f"Choose another, or continue it with {argument('resume', folder)}."
        )
    if folder.exists() and not folder.is_dir():
        raise ConfigError("is a file", "hydra.run.dir", str(folder))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").open("x").close()  # of two commands that start at once, one gets it
    except FileExistsError:
        raise ConfigError(f"the folder {folder} is already used", "hydra.run.dir", fix="Choose another.") from None
    except OSError as error:
        raise ConfigError(f"the folder cannot be made ({error.strerror})", "hydra.run.dir", str(folder)) from None


def write_settings(folder: Path, config: dict[str, Any], overrides: str) -> None:
    """config.yaml and overrides.txt of the run in `folder`."""
    kept = {**config, "resume": None}  # which folder it continues in is no setting of the run
    atomic_write_text(folder / "config.yaml", yaml.safe_dump(kept, sort_keys=False, allow_unicode=True))
    atomic_write_text(folder / "overrides.txt", overrides)


def forget_folder(folder: Path, runs: Path | None = None) -> None:
    """Takes a folder away that this command has claimed, for a job that refused its settings before the first step: `last` is no such run.

    `runs`: paths.runs, where the command made up the folder's name: the folders between the two go too where they are empty.
    """
    if (folder / "checkpoints").exists() or (folder / "metrics.csv").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    above = folder.parent
    while runs is not None and above.is_relative_to(runs):
        try:
            above.rmdir()
        except OSError:  # it holds other runs
            return
        above = above.parent


def shared_folder(config: dict[str, Any], around: ExternalLauncher | None) -> Path:
    """A new run folder; under torchrun or srun, one that every rank derives alike (a clock read by each would differ)."""
    runs, experiment = Path(config["paths"]["runs"]), config["experiment"]
    if around is None or around.world == 1:
        try:
            return new_run_folder(runs, experiment).absolute()
        except ValueError as error:
            raise ConfigError(str(error), "experiment", experiment) from None
        except OSError as error:
            raise ConfigError(f"no run folder can be made there ({error.strerror})", "paths.runs", str(runs)) from None
    job, port = os.environ.get("TORCHELASTIC_RUN_ID", "none"), os.environ.get("MASTER_PORT", "")
    if job == "none" and "SLURM_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_JOB_ID']}.{os.environ.get('SLURM_STEP_ID', '0')}"
        port = port if "RANK" in os.environ else ""  # of srun's ranks, a batch script may choose another whenever the job starts
    if job != "none":
        return (runs / experiment / f"job-{_suffix(job, port, 8)}").absolute()
    if around.nodes > 1:
        raise ConfigError("processes on several nodes must be told their folder", "hydra.run.dir", fix="Add hydra.run.dir=FOLDER.")
    # torchrun without an id, on one node: its own process is the parent of every rank, and it started at one moment.
    agent = os.getppid()
    try:
        started = Path(f"/proc/{agent}").stat().st_mtime
    except OSError:
        raise ConfigError(
            "these processes cannot agree on a folder by themselves", "hydra.run.dir", fix="Add hydra.run.dir=FOLDER."
        ) from None
    name = f"{datetime.fromtimestamp(int(started)).strftime(STAMP)}-{_suffix(str(agent), port, 4)}"
    return (runs / experiment / name).absolute()


def _suffix(job: str, port: str, length: int) -> str:
    return hashlib.sha256(f"{job}:{port}".encode()).hexdigest()[:length]
