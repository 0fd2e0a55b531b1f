"""Recordings with their transcripts: where they come from. `clips()` returns all of them, and `identity()` what goes into the cache key. No torch."""

from __future__ import annotations

import gzip
import hashlib
import re
import shutil
import subprocess
import tempfile
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from filelock import FileLock

from meshformer.config.errors import ConfigError
from meshformer.data.check import no_such_column
from meshformer.data.labelled import read_table, read_text
from meshformer.record.run_folder import new_folder


@dataclass(frozen=True)
class Clip:
    file: Path
    text: str  # normalised, see `letters`
    split: str  # train, val or test
    name: str  # for error messages


class Recordings(Protocol):
    """What ``SpeechData`` needs from a source."""

    def clips(self) -> list[Clip]: ...

    def identity(self) -> dict[str, Any]: ...


def letters(text: str) -> str:
    """The text as it is said: lower-case letters, digits and apostrophes, with single spaces; hyphens separate words."""
    text = unicodedata.normalize("NFC", text).lower().replace("’", "'")
    kept = (c if c == "'" or unicodedata.category(c)[0] in "LMN" else " " for c in text)
    return " ".join("".join(kept).split())


def split_of(text: str, validation_fraction: float, test_fraction: float) -> str:
    """The part that a transcript belongs to, by its hash: recordings of the same words are never in two parts, and new ones move no others."""
    digits = str(int(hashlib.sha256(text.encode()).hexdigest(), 16))[-6:]
    place = int(digits[::-1]) / 10**6  # the last decimal digit decides first
    return "val" if place < validation_fraction else "test" if place < validation_fraction + test_fraction else "train"


class Prompts:
    """The recorded prompts of the telephone exchange Asterisk, 8 kHz, read by one voice a language: of English, 461 clips of 16 minutes.

    They are packages of Debian and Ubuntu: fetched with ``apt-get download`` and unpacked into the cache, or read from ``folder``.

    Prompts that are no speech, that hold digits, or that are read at an unlikely speed (their transcript differs from what is said) are left out.

    Args:
        language: en, es, fr, it or ru.
        folder: where ``asterisk-core-sounds-XX`` and ``asterisk-core-sounds-XX-wav`` are unpacked, ``/`` where they are installed.
        validation_fraction, test_fraction: shares held out, by transcript.
    """

    LANGUAGES: ClassVar[tuple[str, ...]] = ("en", "es", "fr", "it", "ru")
    SPEED: ClassVar[tuple[float, float]] = (3, 25)  # characters a second

    def __init__(
        self,
        cache: str | Path,
        language: str = "en",
        folder: str | None = None,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.0,
    ) -> None:
        if language not in self.LANGUAGES:
            raise ConfigError(f"there are {', '.join(self.LANGUAGES)}", "data.language", language)
        self.cache, self.language, self.folder = Path(cache).expanduser(), language, folder
        self.shares = validation_fraction, test_fraction
        self.packages = (f"asterisk-core-sounds-{language}", f"asterisk-core-sounds-{language}-wav")

    def clips(self) -> list[Clip]:
        root = Path(self.folder).expanduser() if self.folder is not None else unpacked(self.packages, self.cache)
        texts = self._texts(root)
        files = sorted((root / "usr/share/asterisk/sounds").glob(f"{self.language}_*/**/*.wav"))
        found = []
        for file in files:
            name = "/".join(file.relative_to(root / "usr/share/asterisk/sounds").parts[1:]).removesuffix(".wav")
            said = texts.get(name, "")
            text = letters(re.sub(r"\[.*?\]|\(.*?\)|<.*?>", " ", said))  # remarks that nobody reads out
            speed = len(text) / max((file.stat().st_size - 44) / 16000, 0.1)  # 16-bit samples after a header of 44 bytes
            if text and not said.startswith("[") and not re.search(r"\d", said) and self.SPEED[0] <= speed <= self.SPEED[1]:
                found.append(Clip(file, text, split_of(text, *self.shares), name))
        if not found:
            fix = f"It should hold usr/share/asterisk/sounds/ and usr/share/doc/{self.packages[0]}/: unpack both packages there."
            raise ConfigError(f"holds no prompts of {' and '.join(self.packages)}", "data.folder", str(root), fix)
        return found

    def _texts(self, root: Path) -> dict[str, str]:
        """Name of a prompt -> its transcript."""
        base = root / f"usr/share/doc/{self.packages[0]}/core-sounds-{self.language}.txt"
        for file, reader in ((base.with_suffix(".txt.gz"), gzip.open), (base, open)):
            if file.is_file():
                with reader(file, "rt", encoding="utf-8", errors="replace") as lines:
                    pairs = [line.split(":", 1) for line in lines if ":" in line and not line.startswith(";")]
                return {name.strip(): text.strip() for name, text in pairs}
        raise ConfigError(f"holds no transcripts, {base.relative_to(root)}.gz", "data.folder", str(root))

    def identity(self) -> dict[str, Any]:
        return {"speech": "prompts", "language": self.language, "folder": _stamps(self.clips()) if self.folder else None, "split": self.shares}


def unpacked(packages: tuple[str, ...], cache: Path) -> Path:
    """The folder below the cache that holds the files of these Debian packages; apt-get downloads and verifies them at first use.

    They are unpacked, not installed: no script of theirs runs. ConfigError where there is no apt-get, or it cannot get them.
    """
    target = cache / "debian" / packages[-1]
    if target.is_dir():  # it was renamed to this name when it was complete
        return target
    by_hand = f"Unpack the packages {' and '.join(packages)} into a folder and use data.folder=FOLDER."
    if None in (shutil.which("apt-get"), shutil.which("dpkg-deb")):
        raise ConfigError("the recordings are Debian packages, and this machine has no apt-get", "data", "prompts", by_hand)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"), tempfile.TemporaryDirectory(dir=target.parent, prefix=".unpack-") as temporary:
            if target.is_dir():
                return target
            done = subprocess.run(
                ["apt-get", "download", *packages], cwd=temporary, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL
            )
            archives = sorted(Path(temporary).glob("*.deb"))
            if done.returncode or len(archives) != len(packages):
                why = next((line for line in done.stderr.splitlines() if line.startswith("E:")), "no reason given").removeprefix("E: ")
                raise ConfigError(f"apt-get could not download them ({why})", "data", "prompts", f"Run apt-get update. Or u{by_hand[1:]}")
            with new_folder(target) as inside:
                for archive in archives:
                    subprocess.run(["dpkg-deb", "-x", str(archive), str(inside)], check=True, capture_output=True)
    except OSError as error:
        raise ConfigError(f"cannot write the data cache ({error})", "paths.data", cache, "Name a folder you may write to") from error
    except subprocess.CalledProcessError as error:
        raise ConfigError(f"dpkg-deb could not unpack them ({error.stderr!r})", "data", "prompts", by_hand) from None
    return target


class AudioTable:
    """A CSV file (or tabs, in a ``.tsv``) with a column of audio files and one of transcripts. Files are named relative to the table's folder.

    Args:
        validation_file: a table of its own for validation; without it, a share of the rows is held out, by transcript.
    """

    def __init__(
        self,
        file: str,
        audio_column: str = "file",
        text_column: str = "text",
        validation_file: str | None = None,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.0,
    ) -> None:
        self.files = {"train": file, "val": validation_file}
        self.columns = {"data.audio_column": audio_column, "data.text_column": text_column}
        self.shares = validation_fraction, test_fraction

    def clips(self) -> list[Clip]:
        found = []
        for split, table in self.files.items():
            if table is None:
                continue
            file = Path(table)
            for number, (name, said) in enumerate(self._rows(file, "data.file" if split == "train" else "data.validation_file"), start=2):
                text = letters(said)
                own = split_of(text, *self.shares) if self.files["val"] is None else split
                place = Path.home() / name[2:] if name.startswith("~/") else file.parent / name
                found.append(Clip(place, text, own, f"{name} (row {number} of {file.name})"))
        return found

    def _rows(self, table: Path, key: str) -> list[tuple[str, str]]:
        header, rows = read_table(read_text(table, key), table, key)
        for own, column in self.columns.items():
            if column not in header and header:
                raise no_such_column(table, header, own, column)
        if not rows:
            raise ConfigError("holds no rows below a header line" if header else "is empty", key, table)
        audio, said = self.columns.values()
        return [(row[audio].strip(), row[said].strip()) for row in rows]

    def identity(self) -> dict[str, Any]:
        return {"speech": "table", "sha256": _stamps(self.clips())}


def _stamps(clips: list[Clip]) -> str:
    """A hash that changes when a recording or transcript does: of names, texts, sizes and times of modification."""
    found = []
    for clip in clips:
        try:
            stat = clip.file.stat()
            found.append([clip.name, clip.text, clip.split, stat.st_size, stat.st_mtime_ns])
        except OSError:
            found.append([clip.name, clip.text, clip.split, None, None])
    return hashlib.sha256(repr(found).encode("utf-8", "surrogatepass")).hexdigest()
