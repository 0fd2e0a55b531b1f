"""Where conf/ lies."""

from pathlib import Path


def conf_dir() -> Path:
    """The checkout's conf/ where the package lies in a checkout's src/, else the copy inside the installed package."""
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent.parent / "conf"
    return checkout if package.parent.name == "src" and (checkout / "train.yaml").is_file() else package / "conf"
