"""TFRecord files as data: running text, token ids, labelled texts or labelled images, by the features that are named. Imports no torch.

It can be built by hand: ``TFRecords(["a.tfrecord"], "~/.cache/meshformer", text_feature="text").text()``.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from meshformer.config.errors import ConfigError
from meshformer.data.checked import built_once
from meshformer.data.labelled import Examples, class_names, split_at_random
from meshformer.data.tf_example import Feature, parse_example
from meshformer.data.tfrecord import RecordFiles, read_records
from meshformer.data.tokenizer import IdTokenizer, Tokenizer, Tokens, load_tokenizer

LARGEST = "largest_id"  # file in a cached folder
TOGETHER = 1 << 20  # characters or ids that are yielded together
KINDS = {"text": "bytes", "tokens": "int64", "image": "bytes, float or int64", "label": "bytes or int64"}
MAGIC = (b"\x89PNG", b"\xff\xd8\xff")
Images = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], list[str]]


class TFRecords:
    """Files of ``tf.train.Example``. With ``text_feature`` or ``tokens_feature`` alone it is a corpus, with ``text_feature`` and ``label_feature``
    a source of labelled texts, with ``image_feature`` and ``label_feature`` one of labelled images.

    Args:
        files: the training records. Without ``validation_files``, a share of them is held out.
        cache: where the index of each file is kept.
        text_feature: UTF-8, one value in each record. A corpus joins them by a line end.
        tokens_feature: token ids, concatenated over all records. A ``tokenizer.json`` beside the first file says what they mean.
        label_feature: a class, by its name or number; several values are tags, one for each word.
        image_feature: a PNG or JPEG file, or pixels as bytes, floats or integers of a square image with 1 or 3 colours, rows first.
        validation_fraction: the share of labelled examples held out, drawn with ``split_seed``.
        classes: the names of the classes, where the labels are their numbers; or the names in their order.
    """

    reads_records = True  # data/check.py looks at the first record before a job starts

    def __init__(
        self,
        files: str | list[str],
        cache: str | Path,
        text_feature: str | None = None,
        tokens_feature: str | None = None,
        label_feature: str | None = None,
        image_feature: str | None = None,
        validation_files: str | list[str] | None = None,
        test_files: str | list[str] | None = None,
        validation_fraction: float = 0.2,
        split_seed: int = 0,
        classes: list[str] | None = None,
    ) -> None:
        self.cache = cache
        names = {"train": files, "val": validation_files, "test": test_files}
        self.files = {split: [own] if isinstance(own, str) else [*own] for split, own in names.items() if own}
        self.records = {split: RecordFiles(own, cache) for split, own in self.files.items()}
        self.features = {"text": text_feature, "tokens": tokens_feature, "label": label_feature, "image": image_feature}
        self.fraction, self.split_seed, self.wanted = validation_fraction, split_seed, classes
        self._kinds: dict[str, str] = {}  # of each feature: the kind of its first value, which all others must have

    def identity(self) -> dict[str, Any]:
        # Not `wanted`: a resumed run gets the recorded classes, where the first start had None.
        contents = {split: records.identity() for split, records in self.records.items()}
        tokens = {"tokenizer": self.tokenizer.to_json()} if self.features["tokens"] else {}
        return {"records": contents, "features": self.features, "split": [self.fraction, self.split_seed], **tokens}

    # --- a corpus of text or of ids

    @property
    def holds_ids(self) -> bool:
        return self.features["tokens"] is not None

    def text(self) -> str:
        return "".join(self.pieces())

    def pieces(self) -> Iterator[str]:
        """The text of all files, the training files first."""
        for split in self.records:
            yield from self._texts(split)

    @cached_property
    def lengths(self) -> dict[str, int] | None:
        """Characters (or ids) of each part, where the files say which part they are; None where one text is to be divided."""
        if len(self.records) == 1:
            return None
        size = self._id_pieces if self.holds_ids else self._texts
        return {split: sum(map(len, size(split))) for split in self.records}

    def id_pieces(self) -> Iterator[Tokens]:
        """The ids of all files, the training files first. ConfigError for one that is no token of the tokenizer."""
        size = self.tokenizer.vocab_size
        for split in self.records:
            for ids in self._id_pieces(split):
                if len(ids) and not 0 <= ids.min() <= ids.max() < size:
                    strange = ids.max() if ids.max() >= size else ids.min()
                    message = f"the files hold the id {strange}, and {self._tokenizer_file} has {size} tokens"
                    raise ConfigError(message, "data.tokens_feature", self.features["tokens"], "Put the tokenizer of these ids there.")
                yield ids

    @property
    def _tokenizer_file(self) -> Path:
        return Path(self.files["train"][0]).expanduser().with_name("tokenizer.json")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer beside the first file; without one, ids are shown as numbers."""
        if self._tokenizer_file.is_file():
            return load_tokenizer(self._tokenizer_file)
        contents = {split: records.identity() for split, records in self.records.items()}
        settings = {"largest_id": contents, "feature": self.features["tokens"]}  # a start must not read all ids again
        folder = built_once(settings, self.cache, self._write_largest)
        return IdTokenizer(int((folder / LARGEST).read_text()) + 1)

    def _write_largest(self, folder: Path) -> None:
        (folder / LARGEST).write_text(str(self._largest_id()), encoding="ascii")

    def _largest_id(self) -> int:
        largest = -1
        for split in self.records:
            for ids in self._id_pieces(split):
                if len(ids) and ids.min() < 0:
                    message = f"the files hold the id {ids.min()}, and ids start at 0"
                    raise ConfigError(message, "data.tokens_feature", self.features["tokens"])
                largest = max(largest, int(ids.max(initial=-1)))
        if largest < 0:
            raise ConfigError("the files hold no ids", "data.tokens_feature", self.features["tokens"])
        return largest

    def _id_pieces(self, split: str) -> Iterator[Any]:
        held, have = [], 0
        for number in range(len(self.records[split])):
            ids, _ = self._value(split, number, "tokens")
            held.append(ids)
            have += len(ids)
            if have >= TOGETHER:
                yield np.concatenate(held)
                held, have = [], 0
        if held:
            yield np.concatenate(held)

    def _texts(self, split: str) -> Iterator[str]:
        """The texts of a part, each after a line end but for the first of all, a megabyte at a time."""
        held, have, begun = [], 0, split != next(iter(self.records))
        for number in range(len(self.records[split])):
            text = self._text(split, number)
            held.append(f"\n{text}" if begun else text)
            have, begun = have + len(text), True
            if have >= TOGETHER:
                yield "".join(held)
                held, have = [], 0
        if held:
            yield "".join(held)

    # --- labelled texts

    def examples(self) -> Examples:
        texts: list[str] = []
        labels: list[str] = []
        where: list[str] = []
        for split, records in self.records.items():
            for number in range(len(records)):
                texts.append(self._text(split, number))
                labels.append(self._label(split, number))
                where.append(records.place(number))
        return Examples(texts, self._splits(), labels, where=where)

    def _splits(self) -> list[str]:
        splits: list[str] = []
        for split, records in self.records.items():
            own = split == "train" and "val" not in self.records
            splits += split_at_random(len(records), self.fraction, 0.0, self.split_seed) if own else [split] * len(records)
        return splits

    # --- labelled images

    @cached_property
    def _images(self) -> tuple[npt.NDArray[np.float32], list[str]]:
        images: list[npt.NDArray[np.float32]] = []
        labels: list[str] = []
        for split, records in self.records.items():
            for number in range(len(records)):
                image = self._image(split, number)
                if images and image.shape != images[0].shape:
                    message = f"{records.place(number)} holds an image of {_shape(image)}, and those before have {_shape(images[0])}"
                    raise ConfigError(message, "data.image_feature", self.features["image"], "Make all of one size and kind.")
                images.append(image)
                labels.append(self._label(split, number))
        if not images:
            raise ConfigError("the files hold no records", "data.files")
        return np.stack(images), labels

    @cached_property
    def classes(self) -> list[str]:
        """The names of the classes of labelled images, in the order of their numbers: those given, or those of the training part."""
        return class_names((label for label, split in zip(self._images[1], self._splits(), strict=True) if split == "train"), self.wanted)

    def read(self) -> Images:
        images, labels = self._images
        numbers = {name: number for number, name in enumerate(self.classes)}
        strange = next((label for label in labels if label not in numbers), None)
        if strange is not None:
            place = self._place_of(labels.index(strange))
            message = f"{place} has the label {strange}, which is none of the classes {', '.join(self.classes)}"
            raise ConfigError(message, "data.label_feature", self.features["label"], "Correct it, or name all classes in data.classes.")
        return images, np.array([numbers[label] for label in labels], np.int64), self._splits()

    def _place_of(self, number: int) -> str:
        for records in self.records.values():
            if number < len(records):
                return records.place(number)
            number -= len(records)
        raise IndexError(number)

    def _image(self, split: str, number: int) -> npt.NDArray[np.float32]:
        value, place = self._value(split, number, "image")
        if isinstance(value, list):
            data = self._single(value, place, "image")
            pixels = _decoded(data, place) if data.startswith(MAGIC) else np.frombuffer(data, np.uint8)
            return (_square(pixels, place) / 255).astype(np.float32)
        if not np.isfinite(value).all():
            raise ConfigError(f"{place} holds an image with values that are not finite", "data.image_feature", self.features["image"])
        return (_square(value, place) / (1 if value.dtype == np.float32 else 255)).astype(np.float32)

    # --- one value

    def _text(self, split: str, number: int) -> str:
        value, place = self._value(split, number, "text")
        data = self._single(value, place, "text")
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            message = f"{place} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start} of its text"
            raise ConfigError(message, "data.text_feature", self.features["text"]) from None

    def _label(self, split: str, number: int) -> str:
        value, place = self._value(split, number, "label")
        if not len(value):
            raise ConfigError(f"{place} has no label", "data.label_feature", self.features["label"])
        if isinstance(value, list):
            return " ".join(label.decode("utf-8", "replace") for label in value)
        return " ".join(self._named(int(label)) for label in value)

    def _named(self, label: int) -> str:
        by_number = self.wanted is not None and str(label) not in self.wanted and 0 <= label < len(self.wanted)
        return self.wanted[label] if by_number and self.wanted is not None else str(label)

    def _single(self, value: Feature, place: str, use: str) -> Any:
        if len(value) != 1:
            raise ConfigError(f"{place} holds {len(value)} values, not one", f"data.{use}_feature", self.features[use])
        return value[0]

    def _value(self, split: str, number: int, use: str) -> tuple[Any, str]:
        """(the values of the feature for `use`, the record's place)."""
        records, name = self.records[split], self.features[use]
        place = records.place(number)
        value = feature_of(records[number], str(name), use, place)
        kind = kind_of(value)
        if len(value) and self._kinds.setdefault(use, kind) != kind:
            message = f"{place} holds {kind} values, and those before hold {self._kinds[use]}"
            raise ConfigError(message, f"data.{use}_feature", name, "Write all records with one type.")
        return value, place


def feature_of(record: bytes, name: str, use: str, place: str) -> Feature:
    """The values of a feature. ConfigError where the record is no Example, lacks the feature, or holds it with a type that is of no use."""
    try:
        features = parse_example(record)
    except ValueError as error:
        raise ConfigError(f"{place} cannot be read: {error}", "data.files") from None
    if name not in features:
        known = ", ".join(sorted(features)) or "none"
        raise ConfigError(f"{place} has no such feature", f"data.{use}_feature", name, f"Its features are: {known}.")
    value = features[name]
    if len(value) and kind_of(value) not in KINDS[use]:
        message = f"{place} holds it with {kind_of(value)} values, and {use} is {KINDS[use]}"
        raise ConfigError(message, f"data.{use}_feature", name)
    return value if len(value) or use != "tokens" else np.zeros(0, np.int64)


def check_first_record(file: str, features: dict[str, str]) -> None:
    """ConfigError where the first record of a file is damaged or lacks one of the features (use -> name). Reads little of the file."""
    try:
        record = next(read_records(file), None)
    except OSError as error:
        raise ConfigError(f"cannot read it ({error.strerror})", "data.files", file) from error
    if record is None:
        raise ConfigError("it holds no records", "data.files", file)
    for use, name in features.items():
        feature_of(record, name, use, f"record 1 of {file}")


def kind_of(value: Feature) -> str:
    return "bytes" if isinstance(value, list) else "float" if value.dtype == np.float32 else "int64"


def _decoded(data: bytes, place: str) -> npt.NDArray[Any]:
    """The pixels of a PNG or JPEG file, (H, W) or (H, W, 3)."""
    try:
        from PIL import Image, UnidentifiedImageError  # an optional dependency
    except ImportError as error:
        raise ConfigError("PNG and JPEG need the package pillow", "data.image_feature", fix="Run `pip install 'meshformer[tfrecord]'`.") from error
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            return np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{place} holds an image that cannot be read ({error})", "data.image_feature") from None


def _square(pixels: npt.NDArray[Any], place: str) -> npt.NDArray[Any]:
    """Pixels without a shape as (H, H) or (H, H, 3)."""
    if pixels.ndim > 1:
        return pixels
    for colours in (1, 3):
        side = round((len(pixels) / colours) ** 0.5)
        if side and side * side * colours == len(pixels):
            return pixels.reshape((side, side) if colours == 1 else (side, side, colours))
    message = f"{place} holds {len(pixels):,} pixels: no PNG or JPEG, and no square image with 1 or 3 colours"
    raise ConfigError(message, "data.image_feature")


def _shape(image: npt.NDArray[Any]) -> str:
    return " × ".join(map(str, image.shape[:2])) + (" pixels in grey" if image.ndim == 2 else " pixels in colour")

