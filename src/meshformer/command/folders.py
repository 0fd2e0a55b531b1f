"""Choose and create the folder of a new run. Processes started by torchrun or srun derive the same name without communicating."""

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
    """Create `folder` if needed and claim it with an empty config.yaml. Raises ConfigError if it is not empty, so that runs do not mix."""
    check_unused(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").open("x").close()  # exclusive: of two commands started at once, only one succeeds
    except FileExistsError:
        raise ConfigError(f"the folder {folder} is already used", "hydra.run.dir", fix="Choose another.") from None
    except OSError as error:
        raise ConfigError(f"the folder cannot be made ({error.strerror})", "hydra.run.dir", str(folder)) from None


def check_unused(folder: Path) -> None:
    """Raise ConfigError if `folder` is a file or holds something."""
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(
            f"the folder {folder} is already used", "hydra.run.dir", fix=f"Choose another, or continue it with {argument('resume', folder)}."
        )
    if folder.exists() and not folder.is_dir():
        raise ConfigError("is a file", "hydra.run.dir", str(folder))


def write_settings(folder: Path, config: dict[str, Any], overrides: str) -> None:
    """Write config.yaml and overrides.txt of the run in `folder`."""
    kept = {**config, "resume": None}  # resume= belongs to one command, not to the run
    atomic_write_text(folder / "config.yaml", yaml.safe_dump(kept, sort_keys=False, allow_unicode=True))
    atomic_write_text(folder / "overrides.txt", overrides)


def forget_folder(folder: Path, runs: Path | None = None) -> None:
    """Delete a folder claimed by this command whose job failed before its first step, so that `last` does not name an empty run.

    `runs` is paths.runs if the folder's name was generated; empty folders between the two are then deleted too.
    """
    if (folder / "checkpoints").exists() or (folder / "metrics.csv").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    above = folder.parent
    while runs is not None and above.is_relative_to(runs):
        try:
            above.rmdir()
        except OSError:  # not empty: other runs are in it
            return
        above = above.parent


def shared_folder(config: dict[str, Any], external: ExternalLauncher | None) -> Path:
    """Return a new run folder. Under torchrun or srun every rank derives the same name; clocks read on each rank would differ."""
    runs, experiment = Path(config["paths"]["runs"]), config["experiment"]
    if external is None or external.world == 1:
        try:
            return new_run_folder(runs, experiment).absolute()
        except ValueError as error:
            raise ConfigError(str(error), "experiment", experiment) from None
        except OSError as error:
            raise ConfigError(f"no run folder can be made there ({error.strerror})", "paths.runs", str(runs)) from None
    job, port = os.environ.get("TORCHELASTIC_RUN_ID", "none"), os.environ.get("MASTER_PORT", "")
    if job == "none" and "SLURM_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_JOB_ID']}.{os.environ.get('SLURM_STEP_ID', '0')}"
        port = port if "RANK" in os.environ else ""  # with srun alone, a batch script may pick a new port at each start
    if job != "none":
        return (runs / experiment / f"job-{_suffix(job, port, 8)}").absolute()
    if external.nodes > 1:
        raise ConfigError("processes on several nodes cannot agree on a folder by themselves", "hydra.run.dir", fix="Add hydra.run.dir=FOLDER.")
    # torchrun without --rdzv-id on one node: its agent is the parent of every rank, so the agent's start time is the same for all.
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
