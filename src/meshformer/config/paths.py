"""Where conf/ lies, where corpora are kept, which run a checkpoint belongs to, and which links lead out of a folder."""

import os
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


def default_cache() -> str:
    """Where corpora and prepared data are kept unless paths.data says otherwise: $MESHFORMER_DATA or ~/.cache/meshformer."""
    return os.environ.get("MESHFORMER_DATA", "~/.cache/meshformer")


def leads_out(path: Path, folder: Path) -> bool:
    """Whether `path`, which is named as something in `folder`, lies elsewhere because it, or a folder on the way to it, is a link."""
    return not path.resolve().is_relative_to(folder.resolve())


def link_out_of(folder: Path) -> Path | None:
    """The first link at or below `folder`, by name, that leads out of it. Links are not followed: what lies behind one inside is met by itself."""
    for place, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(folders + files):
            path = Path(place, name)
            if path.is_symlink() and leads_out(path, folder):
                return path
    return None
