"""Find conf/, the data cache, the run of a checkpoint, and symbolic links that lead out of a folder."""

import os
import re
from pathlib import Path

CHECKPOINT = re.compile(r"step-(\d+)(\.ckpt)?")  # the name of a checkpoint, a folder or a single file


def conf_dir() -> Path:
    """Return the checkout's conf/ if the package lies in its src/, else the copy inside the installed package."""
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent.parent / "conf"
    return checkout if package.parent.name == "src" and (checkout / "train.yaml").is_file() else package / "conf"


def run_of(path: Path | str) -> Path:
    """Return RUN for a checkpoint RUN/checkpoints/step-…, and any other path unchanged."""
    path = Path(path)
    return path.parent.parent if path.parent.name == "checkpoints" and CHECKPOINT.fullmatch(path.name) else path


def default_cache() -> str:
    """Return the default of paths.data, for corpora and prepared data: $MESHFORMER_DATA or ~/.cache/meshformer."""
    return os.environ.get("MESHFORMER_DATA", "~/.cache/meshformer")


def leads_out(path: Path, folder: Path) -> bool:
    """Whether `path`, named as something in `folder`, resolves to a place outside of it through a symbolic link."""
    return not path.resolve().is_relative_to(folder.resolve())


def _is_log_of_wandb(link: Path) -> bool:
    target = link.resolve()
    place, cache = link.parts[-4:], target.parts[-3:]
    return (place[0], *place[2:]) == ("wandb", "logs", "debug-core.log") and cache[:2] == ("wandb", "logs") and target.suffix == ".log"


def link_out_of(folder: Path) -> Path | None:
    """Return the first symbolic link at or below `folder`, by name, that leads out of it. The walk does not follow links.

    The link that Weights & Biases makes in a run, to a log file in its own cache, does not count.
    """
    for place, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(folders + files):
            path = Path(place, name)
            if path.is_symlink() and leads_out(path, folder) and not _is_log_of_wandb(path):
                return path
    return None
