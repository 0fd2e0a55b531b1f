"""Claims about fetching pinned files, with a pip of our own in place of the network."""

import hashlib
import stat
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from meshformer.config.errors import ConfigError
from meshformer.data.pinned_package import PinnedPackage, fetch

CONTENT = b"not really an archive"
PACKAGE = PinnedPackage("parcel", "1.0", "parcel-1.0.tar.gz", hashlib.sha256(CONTENT).hexdigest(), sdist=True)


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Call with a shell body: it stands for pip; `$dest` is where pip should leave files. Returns the log of its calls."""
    log = tmp_path / "calls.txt"

    def install(body: str) -> Path:
        program = tmp_path / "python"
        find_dest = 'while [ $# -gt 0 ]; do [ "$1" = --dest ] && dest=$2; [ "$1" = --requirement ] && requirements=$2; shift; done'
        program.write_text(f'#!/bin/sh\necho "$@" >> {log}\n{find_dest}\n{body}\n')
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(sys, "executable", str(program))
        return log

    return install


def deliver(content: bytes = CONTENT) -> str:
    return f"printf '{content.decode()}' > $dest/parcel-1.0.tar.gz"


def test_pip_gets_a_pinned_hash_and_no_dependencies(pip, tmp_path):
    log = pip(f"cat $requirements > {tmp_path}/seen.txt; {deliver()}")
    path = fetch(PACKAGE, tmp_path / "cache")
    assert path.read_bytes() == CONTENT
    assert (tmp_path / "seen.txt").read_text() == f"parcel==1.0 --hash=sha256:{PACKAGE.sha256}\n"
    arguments = log.read_text().split()
    assert {"--no-deps", "--require-hashes"} <= set(arguments) and "--no-binary parcel" in log.read_text()
    assert not [p for p in path.parent.iterdir() if p.name.startswith(".download")]


def test_a_cached_file_needs_no_pip(pip, tmp_path):
    pip(deliver())
    fetch(PACKAGE, tmp_path / "cache")
    log = pip("echo 'ERROR: no network' >&2; exit 1")
    log.unlink()
    assert fetch(PACKAGE, tmp_path / "cache").read_bytes() == CONTENT
    assert not log.exists()


def test_a_damaged_cached_file_is_fetched_again(pip, tmp_path):
    pip(deliver())
    fetch(PACKAGE, tmp_path / "cache").write_bytes(b"half a fi")
    assert fetch(PACKAGE, tmp_path / "cache").read_bytes() == CONTENT


def test_racing_callers_download_once(pip, tmp_path):
    log = pip(f"sleep 0.2; {deliver()}")
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda _: fetch(PACKAGE, tmp_path / "cache"), range(4)))) == 1
    assert len(log.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    "body, words",
    [
        ("echo 'ERROR: No matching distribution' >&2; exit 1", ["not in the cache", "network", "put parcel-1.0.tar.gz at"]),
        ("echo 'python: No module named pip' >&2; exit 1", ["ensurepip", "parcel-1.0.tar.gz"]),
        ("echo 'ERROR: THESE PACKAGES DO NOT MATCH THE HASHES' >&2; exit 1", [PACKAGE.sha256, "Do not use it"]),
        (deliver(b"something else"), ["does not match", "parcel-1.0.tar.gz"]),
        ("true", ["brought nothing"]),
    ],
)
def test_each_failure_says_why_and_leaves_nothing(pip, tmp_path, body, words):
    pip(body)
    with pytest.raises(ConfigError) as caught:
        fetch(PACKAGE, tmp_path / "cache")
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache" / "carriers" / PACKAGE.filename).exists()


def test_without_network_the_real_pip_fails_in_words_and_soon(tmp_path, monkeypatch):
    for name, value in {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_CONFIG_FILE": "/dev/null", "PIP_RETRIES": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"parcel-1\.0\.tar\.gz is not in the cache and pip could not download it"):
        fetch(PACKAGE, tmp_path / "cache")
    assert time.monotonic() - started < 20


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(ConfigError, match=r"paths\.data"):
        fetch(PACKAGE, tmp_path / "cache")
