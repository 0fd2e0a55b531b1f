"""Which checkpoints a run has. Names only: no torch."""

from __future__ import annotations

import re
from pathlib import Path

from meshformer.config.errors import ConfigError

METADATA, REST = ".metadata", "trainer.pt"
PARTS = (METADATA, REST)  # a checkpoint folder without either is not complete
_NAME = re.compile(r"step-(\d+)")


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def checkpoints(run: Path) -> list[Path]:
    """The run's complete checkpoints, oldest first."""
    folder = Path(run) / "checkpoints"
    found = [p for p in folder.glob("step-*") if _NAME.fullmatch(p.name) and all((p / part).is_file() for part in PARTS)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    match = _NAME.fullmatch(Path(checkpoint).name)
    if match is None:
        raise ConfigError(f"{checkpoint} is not named like a checkpoint", fix="checkpoints are named step-00000500")
    return int(match[1])


def latest_checkpoint(run: Path, key: str = "run") -> Path:
    """The newest complete checkpoint of a run folder. ConfigError naming `key` when there is none."""
    found = checkpoints(run)
    if not found:
        raise ConfigError(f"{run} holds no checkpoint", key=key, value=str(run), fix="name a run folder that has checkpoints/step-…")
    return found[-1]
