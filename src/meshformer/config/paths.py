"""Where conf/ lies, and which run a checkpoint belongs to."""

import re
from pathlib import Path

CHECKPOINT = re.compile(r"step-(\d+)(\.ckpt)?")  # the name of a checkpoint, a folder or a single file


def conf_dir() -> Path:
    """The checkout's conf/ where the package lies in a checkout's src/, else the copy inside the installed package."""
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent.parent / "conf"
    return checkout if package.parent.name == "src" and (checkout / "train.yaml").is_file() else package / "conf"


def run_of(path: Path | str) -> Path:
    """The run folder that a checkpoint RUN/checkpoints/step-… lies in; any other path itself."""
    path = Path(path)
    return path.parent.parent if path.parent.name == "checkpoints" and CHECKPOINT.fullmatch(path.name) else path
