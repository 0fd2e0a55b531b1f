"""Which checkpoints a run has. Names only: no torch."""

from __future__ import annotations

from pathlib import Path

from meshformer.config.errors import ConfigError
from meshformer.config.paths import CHECKPOINT

METADATA, REST = ".metadata", "trainer.pt"
PARTS = (METADATA, REST)  # a checkpoint folder without either is not complete
SINGLE, WEIGHTS = ".ckpt", ".safetensors"  # files that hold all of a checkpoint, and its weights alone


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def checkpoints(run: Path) -> list[Path]:
    """The run's complete checkpoints, oldest first: folders, and single files that `meshformer convert` made."""
    folder = Path(run) / "checkpoints"
    found = [p for p in folder.glob("step-*") if CHECKPOINT.fullmatch(p.name) and is_complete(p)]
    return sorted(found, key=lambda p: (step_of(p), p.is_dir()))


def is_complete(checkpoint: Path) -> bool:
    """Single files are renamed to their name when they are complete."""
    return checkpoint.is_file() if checkpoint.suffix == SINGLE else all((checkpoint / part).is_file() for part in PARTS)


def step_of(checkpoint: Path) -> int:
    match = CHECKPOINT.fullmatch(Path(checkpoint).name)
    if match is None:
        raise ConfigError(f"{checkpoint} is not named like a checkpoint", fix="checkpoints are named step-00000500")
    return int(match[1])


def latest_checkpoint(run: Path, key: str = "run") -> Path:
    """The newest complete checkpoint of a run folder; a checkpoint RUN/checkpoints/step-… itself. ConfigError naming `key` for none."""
    if CHECKPOINT.fullmatch(Path(run).name) and is_complete(Path(run)):
        return Path(run)
    found = checkpoints(run)
    if not found:
        raise ConfigError(f"{run} holds no checkpoint", key=key, value=str(run), fix="name a run folder that has checkpoints/step-…")
    return found[-1]
