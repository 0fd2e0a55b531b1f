"""`meshformer convert to=tfrecord`: the prepared data of a run as TFRecord files, in one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from meshformer.config.errors import ConfigError
from meshformer.data import ImageData, SampledData, SequenceData, TextData, load_tokenizer
from meshformer.data.prepared import SPLITS
from meshformer.data.tf_example import serialize_example
from meshformer.data.tfrecord import write_shards
from meshformer.job.build import build_data
from meshformer.printing import say
from meshformer.record.run_folder import new_folder

RECORD = 4096  # tokens in a record
OPTIONS = {"train": "files", "val": "validation_files", "test": "test_files"}


def convert_data(config: dict[str, Any], run: Path, target: Path) -> None:
    """Write the data of `run`, whose settled configuration is `config`, into the folder `target`, which must be free; print how to read it.

    Running text becomes its token ids (feature `tokens`), with the tokenizer beside them; single texts become `text` and `label`; images become
    `image` (floats in 0 … 1, rows first) and `label`. ConfigError if the folder cannot be written.
    """
    images = config["data"]["kind"] == "images"
    data = build_data(config, None if images else load_tokenizer(run / "tokenizer.json"))
    data.prepare_data()
    try:
        with new_folder(target) as aside:
            counts = {split: len(write_shards(aside, split, records)) for split, records in _records(data).items()}
            if isinstance(data, TextData):
                data.tokenizer.save(aside / "tokenizer.json")
    except OSError as error:
        raise ConfigError(f"it cannot be written ({error})", "output", str(target)) from error
    say(_usage(data, target, counts))


def _records(data: SampledData) -> dict[str, Iterator[bytes]]:
    if isinstance(data, TextData):
        return {split: _token_records(data.prepared.tokens(split)) for split in SPLITS}
    if isinstance(data, SequenceData):
        examples = data.source.examples()

        def texts(split: str) -> Iterator[bytes]:
            columns = {"text": examples.texts, "label": examples.labels, "pair": examples.partners}
            for i in (i for i, own in enumerate(examples.splits) if own == split):
                yield serialize_example({name: [column[i].encode("utf-8", "replace")] for name, column in columns.items() if column is not None})

        return {split: texts(split) for split in SPLITS}
    assert isinstance(data, ImageData)
    pixels, labels, splits = data.source.read()
    names = data.source.classes

    def images(split: str) -> Iterator[bytes]:
        for i in (i for i, own in enumerate(splits) if own == split):
            yield serialize_example({"image": np.asarray(pixels[i], np.float32).ravel(), "label": [names[labels[i]].encode()]})

    return {split: images(split) for split in SPLITS}


def _token_records(tokens: Any) -> Iterator[bytes]:
    for first in range(0, len(tokens), RECORD):
        yield serialize_example({"tokens": np.asarray(tokens[first : first + RECORD], np.int64)})


def _usage(data: SampledData, target: Path, counts: dict[str, int]) -> str:
    size = sum(file.stat().st_size for file in target.iterdir()) / 1e6
    features = {TextData: "data.tokens_feature=tokens", ImageData: "data.image_feature=image data.label_feature=label"}
    named = features.get(type(data), "data.text_feature=text" + (" data.label_feature=label" if data.classes is not None else ""))
    files = " ".join(f"'data.{OPTIONS[split]}={target}/{split}-*.tfrecord'" for split, count in counts.items() if count)
    shards = ", ".join(f"{count} of {split}" for split, count in counts.items() if count)
    return f"{target}\n  {size:.1f} MB; shards: {shards}; an index beside each\n  read    data=tfrecord {files} {named}"
