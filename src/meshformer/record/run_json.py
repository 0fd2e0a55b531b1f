"""`run.json`: a run's state, code version, device, layout and final metrics."""

import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from meshformer.record.run_folder import atomic_write_text

STATES = ("running", "finished", "failed", "preempted")
PACKAGES = ("meshformer", "torch", "lightning", "hydra-core", "omegaconf", "torchmetrics", "tokenizers", "numpy")
SEGMENT = ("state", "started", "ended", "git", "versions", "device", "layout", "error")
SOURCE = Path(__file__).resolve()


def read_run(folder: Path | str) -> dict[str, Any]:
    """Return the fields of `folder/run.json`. Raises ValueError if the file is damaged."""
    file = Path(folder) / "run.json"
    fields = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(fields, dict):
        raise ValueError(f"{file} is damaged: it holds no fields")
    return fields


class RunRecord:
    """Writer of `folder/run.json`; every call replaces the file atomically.

    Fields: `state` (running, finished, failed, preempted), `started`, `ended` (ISO 8601, with offset), `git`
    (`commit`, `dirty`; None outside a checkout), `versions`, `python`, `platform`, `device`, `layout`, `parameters`,
    `final` (metrics), `error` (`type`, `message`; None without), `segments` (earlier starts of a resumed run).
    It records no user name, host name or environment variable. Non-finite floats, which JSON lacks, are written as "nan", "inf", "-inf".
    """

    def __init__(self, folder: Path | str) -> None:
        self.path = Path(folder) / "run.json"
        try:
            self.fields: dict[str, Any] = read_run(folder) if self.path.is_file() else {}
        except ValueError:  # damaged, for example by a full disk; the checkpoints do not depend on it
            self.fields = {"state": "unknown"}

    def start(
        self,
        *,
        device: Mapping[str, Any] | str | None = None,
        layout: Mapping[str, Any] | str | None = None,
        parameters: int | None = None,
        **fields: Any,
    ) -> None:
        """Record the start of the run, or of its next segment if the folder already has a record (a resume)."""
        segments = list(self.fields.get("segments", []))
        if self.fields:
            segment = {key: self.fields.get(key) for key in SEGMENT}
            if segment["state"] == "running":  # its process died before it could record an end
                segment.update(state="failed", error={"type": None, "message": "ended without recording why (killed, or its machine failed)"})
            segments.append(segment)
        self.fields = {
            "state": "running",
            "started": _now(),
            "ended": None,
            "git": git_state(),
            "versions": installed_versions(),
            "python": platform.python_version(),
            "platform": f"{platform.system()} {platform.machine()}",
            "device": device,
            "layout": layout,
            "parameters": parameters,
            "final": {},
            "error": None,
            "segments": segments,
            **fields,
        }
        self._write()

    def update(self, **fields: Any) -> None:
        """Set fields during the run, such as `parameters` once the model is built. `start` and `finish` set the state."""
        if "state" in fields:
            raise ValueError("update() cannot set the state; start() and finish() do.")
        self.fields.update(fields)
        self._write()

    def finish(self, state: str, error: BaseException | str | None = None, **final: Any) -> None:
        """Record the end of the run in `state` (finished, failed or preempted) with its last metrics, as in `**{"val/loss": 1.5}`."""
        if state not in STATES[1:]:
            raise ValueError(f"state={state!r} does not end a run; use one of {', '.join(STATES[1:])}.")
        if isinstance(error, BaseException):
            error_field = {"type": type(error).__name__, "message": str(error)}
        else:
            error_field = None if error is None else {"type": None, "message": error}
        final = {**(self.fields.get("final") or {}), **final}
        self.fields.update(state=state, ended=_now(), error=error_field, final=final)
        self._write()

    def _write(self) -> None:
        atomic_write_text(self.path, json.dumps(_plain(self.fields), indent=2, allow_nan=False) + "\n")


def git_state() -> dict[str, Any] | None:
    """Return the commit of the checkout this code runs from and whether tracked files differ; None for an installed copy."""
    # This file must be tracked by git: a virtual environment inside another repository is not a checkout of meshformer.
    if _git("ls-files", "--error-unmatch", SOURCE.name) is None or (commit := _git("rev-parse", "HEAD")) is None:
        return None
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": changes != ""}


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages that affect results, from package metadata: importing torch would take a second."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _git(*arguments: str) -> str | None:
    # Inside a git hook, GIT_DIR and similar variables point at the repository that runs the hook.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    try:
        done = subprocess.run(["git", *arguments], cwd=SOURCE.parent, env=environment, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _now() -> str:
    return datetime.now(timezone.utc).astimezone().isoformat(timespec="seconds")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if hasattr(value, "item"):  # NumPy and torch scalars, without importing either
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if isinstance(value, (bool, int)) else str(value)
