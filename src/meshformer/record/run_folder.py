"""Create and find run folders, `runs/<experiment>/<stamp>-<suffix>/`."""

import difflib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

STAMP = "%Y-%m-%d_%H-%M-%S"
MARKERS = ("run.json", "config.yaml")
LISTED = 5
PENDING = ".overrides.next"  # becomes overrides.txt when a resumed run reaches its first step


class RunNotFound(ValueError):
    """What the user typed matches no run or several; the message lists the runs nearby."""


def new_run_folder(runs: Path | str, experiment: str) -> Path:
    """Create and return `runs/<experiment>/<YYYY-mm-dd_HH-MM-SS>-<4 hex>`.

    Raises ValueError if `experiment` leads out of `runs`, FileExistsError if 100 suffixes in a row are taken.
    """
    parent = experiment_folder(runs, experiment)
    parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(100):
        # Jobs of a grid may start within the same second, so stamps collide, and four hex digits may collide too.
        folder = parent / f"{datetime.now().strftime(STAMP)}-{secrets.token_hex(2)}"
        try:
            folder.mkdir(exist_ok=False)
        except FileExistsError:
            if attempt == 99:
                raise
            continue
        return folder
    raise AssertionError("unreachable")


def experiment_folder(runs: Path | str, experiment: str) -> Path:
    """Return `runs/<experiment>`. Raises ValueError if `experiment` leads out of `runs`."""
    if not experiment or Path(experiment).is_absolute() or ".." in Path(experiment).parts:
        raise ValueError(f"experiment={experiment!r} cannot name a folder below {runs}; use a plain name such as 'shakespeare_char'.")
    return Path(runs) / experiment


def is_run(folder: Path) -> bool:
    return any((folder / marker).is_file() for marker in MARKERS)


def list_runs(runs: Path | str) -> list[Path]:
    """Return every run folder below `runs`, the latest start last. Runs do not nest, so a run's own folder is not searched."""
    found: list[Path] = []
    for top, folders, files in os.walk(runs):
        if any(marker in files for marker in MARKERS):
            found.append(Path(top))
            folders.clear()
    return sorted(found, key=_started)


def find_run(spec: str | Path, runs: Path | str = "runs") -> Path:
    """Return the run folder named by `spec`: a folder, `last`, or the end of a run's path (`shakespeare_char/…-3f0a`, `3f0a`).

    Raises RunNotFound, whose message lists the runs nearby.
    """
    text = str(spec).rstrip("/")
    folder = Path(text).expanduser()
    if text and folder.is_dir():
        if is_run(folder):
            return folder
        if inside := list_runs(folder):
            raise RunNotFound(f"{folder} is not a run but holds {len(inside)}: {_names(inside, folder.parent)}. Name one of them.")
    known = list_runs(runs)
    if not known:
        raise RunNotFound(f"No run {text!r}: {runs} holds no run yet. `meshformer train` makes one.")
    if text == "last":
        return known[-1]
    matches = [run for run in known if text and run.as_posix().endswith(text)]
    # A run whose whole name or suffix is `3f0a` wins over runs whose names merely end in it.
    exact = [run for run in matches if run.name == text or run.name.rpartition("-")[2] == text]
    matches = exact or matches
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise RunNotFound(f"{text!r} means {len(matches)} runs: {_names(matches, Path(runs))}. Write more of the name.")
    names = {name: run for run in known for name in (run.name, run.relative_to(runs).as_posix(), run.name.rpartition("-")[2])}
    close = list(dict.fromkeys(names[name] for name in difflib.get_close_matches(Path(text).name, names, n=LISTED, cutoff=0.5)))
    if close:
        raise RunNotFound(f"No run {text!r} under {runs}. Did you mean {_names(close, Path(runs))}?")
    raise RunNotFound(f"No run {text!r} under {runs}. The latest are {_names(known[::-1], Path(runs))}; `last` means the first of these.")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which gets the name `path` when the context ends without an error; after an error nothing is left of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def atomic_write_text(path: Path | str, text: str) -> None:
    """Replace the file at `path` by `text` (UTF-8) atomically: readers see the old or the new text, even if this process is killed."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp creates private files; this restores the permissions that open() would give.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _started(run: Path) -> tuple[float, float, str]:
    touched = max((run / marker).stat().st_mtime for marker in MARKERS if (run / marker).is_file())
    try:
        stamp = datetime.strptime(run.name.rpartition("-")[0], STAMP).timestamp()
    except ValueError:  # hydra.run.dir named the folder
        stamp = touched
    return stamp, touched, run.name


def _names(found: list[Path], base: Path) -> str:
    shown = [run.relative_to(base).as_posix() if run.is_relative_to(base) else run.as_posix() for run in found[:LISTED]]
    more = len(found) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")
