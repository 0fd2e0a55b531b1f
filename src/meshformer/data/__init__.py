"""Where text comes from, how it becomes tokens, and how tokens become batches.

The names below load on first use: reading a config or listing ``--help`` must not import torch, and only ``TextData`` needs it.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "Shakespeare": "corpus",
    "KingJames": "corpus",
    "TextFiles": "corpus",
    "HubText": "corpus",
    "TFRecords": "records",
    "RecordFiles": "tfrecord",
    "CharTokenizer": "tokenizer",
    "BpeTokenizer": "tokenizer",
    "load_tokenizer": "tokenizer",
    "Prepared": "prepared",
    "prepare": "prepared",
    "TextData": "datamodule",
    "SampledData": "base",
    "Sentiment": "labelled",
    "CsvTexts": "labelled",
    "HubTexts": "labelled",
    "Examples": "labelled",
    "SequenceData": "sequences",
    "Digits": "images",
    "Mnist5k": "images",
    "ImageData": "images",
    "Prompts": "recordings",
    "AudioTable": "recordings",
    "Features": "audio",
    "SpeechData": "speech",
    "OwnData": "own",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
