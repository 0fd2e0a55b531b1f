"""Labelled texts. ``examples()`` returns all examples of a source, and ``identity()`` the values that go into the cache key. Imports no torch.

Every class can be built by hand: ``Sentiment("~/.cache/meshformer").examples()``.
"""

from __future__ import annotations

import csv
import hashlib
import io
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

from meshformer.config.errors import ConfigError
from meshformer.config.pinned_package import PinnedPackage, fetch
from meshformer.data.check import no_such_column, separator_of
from meshformer.data.corpus import HubText

VADER = PinnedPackage(
    "vaderSentiment", "3.3.2", "vaderSentiment-3.3.2.tar.gz", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9", sdist=True
)


@dataclass(frozen=True)
class Examples:
    """Lists with one entry for each example. ``splits``: train, val or test. ``labels``: a class, or space-separated tags, one for each word.
    ``partners``: the second text of a pair. ``where``: its place, for error messages ("row 7 of a.csv")."""

    texts: list[str]
    splits: list[str]
    labels: list[str] | None = None
    partners: list[str] | None = None
    where: list[str] | None = None

    def place(self, index: int) -> str:
        return self.where[index] if self.where else f"example {index + 1}"


class LabelledSource(Protocol):
    """What ``SequenceData`` needs from a source of labelled texts."""

    def examples(self) -> Examples: ...

    def identity(self) -> dict[str, Any]: ...


def split_at_random(n: int, validation_fraction: float, test_fraction: float, seed: int) -> list[str]:
    """The split (train, val or test) of each of ``n`` examples, drawn at random; the given shares are held out."""
    n_val, n_test = round(n * validation_fraction), round(n * test_fraction)
    parts = np.array(["train"] * n, dtype=object)
    order = np.random.default_rng(seed).permutation(n)
    parts[order[:n_val]] = "val"
    parts[order[n_val : n_val + n_test]] = "test"
    return parts.tolist()


class Sentiment:
    """Snippets with mean human ratings (Hutto & Gilbert 2014): the label is the rating's sign; ratings of 0 are left out.

    Args:
        collection: movies (10,568 review sentences), tweets (4,196), amazon (3,610 product review sentences), nyt (4,946 editorial sentences),
            or all of them; each is then split by itself.
        validation_fraction, test_fraction: shares held out. They are drawn with ``split_seed``, so they do not depend on the run's seed.
    """

    FILES: ClassVar[dict[str, str]] = {
        "movies": "movieReviewSnippets", "tweets": "tweets", "amazon": "amazonReviewSnippets", "nyt": "nytEditorialSnippets",
    }  # fmt: skip

    def __init__(
        self,
        cache: str | Path,
        collection: Literal["movies", "tweets", "amazon", "nyt", "all"] = "movies",
        validation_fraction: float = 0.2,
        test_fraction: float = 0.0,
        split_seed: int = 0,
    ) -> None:
        self.cache, self.collection = Path(cache), collection
        self.shares = validation_fraction, test_fraction, split_seed

    def examples(self) -> Examples:
        texts: list[str] = []
        labels: list[str] = []
        splits: list[str] = []
        for collection in self.FILES if self.collection == "all" else [self.collection]:
            rows = [line.split("\t") for line in self._lines(collection)]
            rated = [(float(rating), text.strip()) for _, rating, text in rows if float(rating) != 0]
            texts += [text for _, text in rated]
            labels += ["positive" if rating > 0 else "negative" for rating, _ in rated]
            splits += split_at_random(len(rated), *self.shares)
        return Examples(texts, splits, labels)

    def identity(self) -> dict[str, Any]:
        return {"texts": "sentiment", "sha256": VADER.sha256, "collection": self.collection, "split": self.shares}

    def _lines(self, collection: str) -> list[str]:
        """The lines of one member of the archive inside the archive; nothing is unpacked to disk."""
        wanted = f"hutto_ICWSM_2014/{self.FILES[collection]}_GroundTruth.txt"
        with tarfile.open(fetch(VADER, self.cache)) as outer:
            inner = outer.extractfile(f"{VADER.filename.removesuffix('.tar.gz')}/additional_resources/hutto_ICWSM_2014.tar.gz")
            assert inner is not None  # the hash of the archive is pinned
            with tarfile.open(fileobj=inner) as archive:
                file = archive.extractfile(wanted)
                assert file is not None
                return file.read().decode("utf-8", errors="replace").splitlines()


class CsvTexts:
    """A CSV file in UTF-8 with a header line. Columns are separated by commas, or by tabs in a ``.tsv`` file.

    Args:
        file: the training examples; without ``validation_file``, a share of them is held out for validation.
        label_column: None for texts without labels (language modelling).
        pair_column: the second text of each pair.
        validation_fraction: the share held out, drawn with ``split_seed``.
    """

    def __init__(
        self,
        file: str,
        text_column: str = "text",
        label_column: str | None = None,
        pair_column: str | None = None,
        validation_fraction: float = 0.2,
        validation_file: str | None = None,
        test_file: str | None = None,
        split_seed: int = 0,
    ) -> None:
        self.files = {"train": file, "val": validation_file, "test": test_file}
        self.columns = {"data.text_column": text_column, "data.label_column": label_column, "data.pair_column": pair_column}
        self.fraction, self.split_seed = validation_fraction, split_seed

    def examples(self) -> Examples:
        found: dict[str, list[str]] = {key: [] for key, column in self.columns.items() if column is not None}
        splits: list[str] = []
        where: list[str] = []
        for split, file in self.files.items():
            if file is None:
                continue
            rows = self._rows(Path(file).expanduser())
            for name, values in found.items():
                values += [row[name] for row in rows]
            own = split == "train" and self.files["val"] is None
            splits += split_at_random(len(rows), self.fraction, 0.0, self.split_seed) if own else [split] * len(rows)
            where += [f"row {number + 2} of {file}" for number in range(len(rows))]
        texts, labels, partners = (found.get(key) for key in self.columns)
        return Examples(texts or [], splits, labels, partners, where)

    def identity(self) -> dict[str, Any]:
        try:
            contents = {
                split: hashlib.sha256(Path(file).expanduser().read_bytes()).hexdigest()
                for split, file in self.files.items()
                if file is not None
            }
        except OSError as error:
            raise ConfigError(f"cannot read {error.filename} ({error.strerror})", "data.file") from error
        return {"texts": "csv", "sha256": contents, "columns": self.columns, "split": [self.fraction, self.split_seed]}

    def _rows(self, file: Path) -> list[dict[str, str]]:
        """The chosen columns of each row, keyed by the setting that names the column."""
        text = read_text(file)
        header, rows = read_table(text, file)
        for key, column in self.columns.items():
            if column is not None and column not in header and header:
                raise no_such_column(file, header, key, column)
        if not rows:
            raise ConfigError("holds no rows below a header line" if header else "is empty", "data.file", file)
        wanted = {key: column for key, column in self.columns.items() if column is not None}
        for number, row in enumerate(rows, start=2):
            for key, column in wanted.items():
                if not row[column].strip():
                    raise ConfigError(
                        f"row {number} of {file.name} has nothing in column {column}", key, column, "Fill it in or remove the row"
                    )
        return [{key: row[column].strip() for key, column in wanted.items()} for row in rows]


def read_text(file: Path, key: str = "data.file") -> str:
    """The text of a table. ConfigError for one that cannot be read or is not in UTF-8."""
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = f"0x{error.object[error.start]:02x} at offset {error.start}"
        raise ConfigError(f"not UTF-8: byte {byte}", key, file, f"Convert it: iconv -f latin1 -t utf-8 '{file}'") from error
    except OSError as error:
        raise ConfigError(f"cannot read it ({error.strerror})", key, file) from error


def read_table(text: str, file: Path, key: str = "data.file") -> tuple[list[str], list[dict[str, str]]]:
    """(header, rows). ConfigError for a row whose cells cannot be assigned to columns, with its number."""
    separator = separator_of(file)
    # The csv module refuses cells of over 131,072 characters. Long documents exceed that, and the text is in memory already.
    before = csv.field_size_limit(2**31 - 1)
    reader, lines, first = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True), [], 1
    try:
        for cells in reader:
            lines.append(cells)
            first = reader.line_num + 1
    except csv.Error as error:
        fix = 'Write " inside of a quoted text as "", and close each quoted text with ".'
        raise ConfigError(f"the row that begins in line {first} is not closed or quoted rightly ({error})", key, file, fix) from error
    finally:
        csv.field_size_limit(before)
    header, lines = (lines[0], lines[1:]) if lines else ([], [])
    if repeated := next((name for name in header if name and header.count(name) > 1), None):
        raise ConfigError(f"two columns are called {repeated}", key, file, "Give each column a name of its own")
    rows: list[dict[str, str]] = []
    for number, cells in enumerate(lines, start=2):
        if not cells:  # an empty line
            continue
        if len(cells) != len(header):
            sign, fix = ("a tab", "Take the tabs out of it") if separator == "\t" else ("a comma", 'Put quotes around it: "a, b"')
            more = len(cells) > len(header)
            message = f"row {number} has {len(cells)} cells, and the header {len(header)}"
            raise ConfigError(f"{message}: a text may hold {sign}" if more else message, key, file, fix if more else "Fill it in")
        rows.append(dict(zip(header, cells, strict=True)))
    return [name for name in header if name], rows


class HubTexts:
    """Columns of a Hugging Face dataset; needs ``pip install meshformer[hub]``.

    Args:
        path, name, revision: as for ``HubText``.
        split: the training split. Without ``validation_split``, a share of it is held out for validation.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        split: str = "train",
        validation_split: str | None = None,
        test_split: str | None = None,
        text_column: str = "text",
        label_column: str | None = "label",
        pair_column: str | None = None,
        validation_fraction: float = 0.2,
        split_seed: int = 0,
        revision: str | None = None,
    ) -> None:
        self.splits = {"train": split, "val": validation_split, "test": test_split}
        self.readers = {part: HubText(path, name, own, text_column, revision) for part, own in self.splits.items() if own is not None}
        self.columns = {"data.text_column": text_column, "data.label_column": label_column, "data.pair_column": pair_column}
        self.share = validation_fraction, 0.0, split_seed
        self._read: Examples | None = None

    def examples(self) -> Examples:
        if self._read is None:
            values: dict[str, list[str]] = {key: [] for key, column in self.columns.items() if column is not None}
            splits: list[str] = []
            for part, reader in self.readers.items():
                rows = reader.rows()
                for key, column in self.columns.items():
                    if column is None:
                        continue
                    if column not in rows.column_names:
                        raise ConfigError("no such column", key, column, f"Use one of: {', '.join(rows.column_names)}")
                    values[key] += _as_texts(rows, column)
                own = part == "train" and self.splits["val"] is None
                splits += split_at_random(len(rows), *self.share) if own else [part] * len(rows)
            texts, labels, partners = (values.get(key) for key in self.columns)
            self._read = Examples(texts or [], splits, labels, partners)
        return self._read

    def identity(self) -> dict[str, Any]:
        # A hash of the contents: a name, a revision or a path does not fix them.
        read = self.examples()
        content = repr((read.texts, read.labels, read.partners, read.splits)).encode("utf-8", "surrogatepass")
        return {"texts": "hub", "sha256": hashlib.sha256(content).hexdigest()}


def _as_texts(rows: Any, column: str) -> list[str]:
    """A column's values as strings. Class numbers become class names (ClassLabel); lists, such as tags, are joined by spaces."""
    feature: Any = rows.features[column]
    names = getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None)

    def name(value: Any) -> str:
        return names[value] if names and isinstance(value, int) and 0 <= value < len(names) else str(value)

    return [" ".join(map(name, value)) if isinstance(value, list | tuple) else name(value) for value in rows[column]]


def class_names(labels: Iterable[str], wanted: Sequence[str] | None = None) -> list[str]:
    """The class names in the order of their indices: ``wanted``, or the distinct labels, sorted as numbers if all are integers, else as strings."""
    if wanted is not None:
        return [str(name) for name in wanted]
    distinct = set(labels)
    return sorted(distinct, key=int) if all(name.lstrip("-").isdecimal() for name in distinct) else sorted(distinct)
