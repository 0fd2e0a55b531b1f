"""`sweep.json`: the points of a sweep and their states, so that the sweep can be resumed. Writes are atomic."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from meshformer.config import ConfigError
from meshformer.config.foreign import refuse_links
from meshformer.printing import argument
from meshformer.record import atomic_write_text

# done, pruned (ended early by a search's pruner) and failed are final; interrupted runs were stopped by a signal and continue when resumed.
STATES = ("queued", "running", "done", "pruned", "failed", "interrupted")
FILE = "sweep.json"


@dataclass
class Point:
    """One run of a sweep. `folder` is relative to the sweep's folder, `final` holds the last metrics, `seconds` is the total over all starts."""

    number: int
    overrides: list[str]
    state: str = "queued"
    folder: str = ""
    error: str | None = None
    seconds: float = 0.0
    final: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return " ".join(self.overrides)


class SweepRecord:
    """The record of one sweep, kept in its folder as sweep.json with the fields state, started, ended, overrides, flags, sources and points.

    `sources`: stage.init_from as typed -> the run or folder that it meant when the sweep began.
    """

    def __init__(
        self, folder: Path, overrides: list[str], flags: dict[str, str | None], points: list[Point], sources: dict[str, str] | None = None
    ):
        self.folder, self.overrides, self.flags, self.points = Path(folder), overrides, flags, points
        self.sources = {} if sources is None else sources
        self.state, self.started, self.ended = "running", _now(), None
        self._lock: int | None = None

    @classmethod
    def read(cls, folder: Path) -> SweepRecord:
        """Read the record in `folder`. Raises ConfigError if there is none or it is damaged."""
        refuse_links(folder, "sweep.resume", str(folder))
        try:
            fields = json.loads((folder / FILE).read_text(encoding="utf-8"))
            record = cls(folder, fields["overrides"], fields["flags"], [Point(**point) for point in fields["points"]], fields.get("sources"))
            record.started = str(fields["started"])
        except (FileNotFoundError, NotADirectoryError):
            raise ConfigError("is not the folder of a sweep: it holds no sweep.json", "sweep.resume", str(folder)) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ConfigError("its sweep.json is damaged", "sweep.resume", str(folder)) from None
        record.check()
        return record

    def check(self) -> None:
        """Raise ConfigError unless `write` could have written this record, which is untrusted. recorded.py checks the overrides."""
        sound = isinstance(self.flags, dict) and isinstance(self.overrides, list) and isinstance(self.sources, dict)
        if sound:
            texts = [*self.flags, *(value for value in self.flags.values() if value is not None), *self.overrides, *self.sources.values()]
            sound = all(isinstance(text, str) for text in texts)
        for number, point in enumerate(self.points):
            sound = sound and isinstance(point.number, int) and isinstance(point.overrides, list) and point.state in STATES
            sound = sound and all(isinstance(text, str) for text in [*point.overrides, point.folder, point.error or ""])
            sound = sound and isinstance(point.seconds, (int, float)) and isinstance(point.final, dict)
            sound = sound and all(isinstance(n, str) and isinstance(x, (int, float)) for n, x in point.final.items())
            if not sound:
                raise ConfigError(f"point {number} of its sweep.json is damaged", "sweep.resume", str(self.folder))
            # A point that is restarted has its folder deleted first, so that folder must lie inside the sweep's.
            place, top = (self.folder / point.folder).resolve(), self.folder.resolve()
            if point.folder and (place == top or not place.is_relative_to(top)):
                message = f"point {number} of its sweep.json names a folder outside of it ({point.folder})"
                raise ConfigError(message, "sweep.resume", str(self.folder))
        if not sound:
            raise ConfigError("its sweep.json is damaged", "sweep.resume", str(self.folder))

    def claim(self) -> None:
        """Create the sweep's folder. Raises ConfigError if it is not empty, so that sweeps do not mix."""
        fix = f"Choose another, or continue it with {argument('sweep.resume', self.folder)}."
        used = ConfigError(f"the folder {self.folder} is already used", "hydra.sweep.dir", fix=fix)
        if self.folder.is_dir() and any(self.folder.iterdir()):
            raise used
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / FILE).open("x").close()  # exclusive: of two commands started at once, only one succeeds
        except FileExistsError:
            raise used from None
        except OSError as error:
            raise ConfigError(f"the folder cannot be made ({error.strerror})", "hydra.sweep.dir", str(self.folder)) from None

    def lock(self, patience: float = 5.0) -> int:
        """Lock the sweep for this process and its children, and return the file descriptor they inherit. The last one to exit releases it."""
        handle = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        end = time.monotonic() + patience  # jobs of a sweep that was just killed exit within a second
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                if time.monotonic() > end:
                    os.close(handle)
                    raise ConfigError("that sweep is still running", "sweep.resume", str(self.folder)) from None
                time.sleep(0.1)
                continue
            self._lock = handle
            return handle

    def unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def write(self, state: str | None = None) -> None:
        if state is not None:
            self.state, self.ended = state, None if state == "running" else _now()
        fields: dict[str, Any] = {"state": self.state, "started": self.started, "ended": self.ended}
        fields |= {"overrides": self.overrides, "flags": self.flags, "sources": self.sources}
        fields["points"] = [dataclasses.asdict(point) for point in self.points]
        atomic_write_text(self.folder / FILE, json.dumps(fields, indent=1, default=str) + "\n")

    def in_state(self, *states: str) -> list[Point]:
        return [point for point in self.points if point.state in states]


def _now() -> str:
    return datetime.now(timezone.utc).astimezone().isoformat(timespec="seconds")
