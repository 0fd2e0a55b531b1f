"""Checks of the data settings: missing files, a cache that is not writable. Imports no torch."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

from meshformer.config.errors import ConfigError
from meshformer.config.signature import attribute
from meshformer.config.suggest import did_you_mean

Config = dict[str, Any]
BYTE_TOKENS = 256  # a byte-level tokenizer starts from all bytes


def check_tokenizer(config: Config) -> None:
    """ConfigError for a BPE vocabulary smaller than the 256 bytes."""
    data = config["data"]
    if data["tokenizer"] == "bpe" and data["vocab_size"] < BYTE_TOKENS:
        message = f"byte-level BPE starts from {BYTE_TOKENS} bytes"
        raise ConfigError(message, "data.vocab_size", data["vocab_size"], fix=f"Use at least {BYTE_TOKENS}.")


def check_cache(config: Config) -> None:
    """ConfigError where `paths.data` can neither be written nor made. It holds the downloaded and prepared data of all runs."""
    folder = Path(config["paths"]["data"])
    standing = next((one for one in (folder, *folder.parents) if one.exists()), None)
    if standing is None:
        return
    fix = "Set MESHFORMER_DATA or paths.data to a folder of yours."
    if not standing.is_dir():
        raise ConfigError(f"{standing} is a file", "paths.data", str(folder), fix=fix)
    # Root passes every permission check, so a file system that takes no files (/proc, a read-only mount) shows by its flags and kind.
    unwritable = not os.access(standing, os.W_OK | os.X_OK) or str(standing).startswith(("/proc", "/sys"))
    if unwritable and not _prepared(folder):
        raise ConfigError(f"{standing} cannot be written to", "paths.data", str(folder), fix=fix)


def _prepared(folder: Path) -> bool:
    """Whether the cache already holds data: then it may be read-only."""
    return folder.is_dir() and any(folder.iterdir())


def check_files(config: Config) -> None:
    """ConfigError where a file of data.files, data.validation_files or data.test_files does not exist or cannot be read."""
    data = config["data"]
    kind, what = (".tfrecord", "records") if is_tfrecord(data) else (".txt", "texts")
    for key in ("files", "validation_files", "test_files"):
        if data[key] is not None:
            _check_each(f"data.{key}", data[key], kind, what)


def _check_each(key: str, files: list[str], kind: str, what: str) -> None:
    if not files:
        raise ConfigError("names no file", key, fix=f"Use {key}=[a{kind},b{kind}].")
    for name in files:
        path = Path(name)
        if path.is_dir():
            raise ConfigError("is a folder", key, name, fix=f"Use {key}='{name}/*{kind}' for the {what} in it.")
        if not path.exists():
            nearby = sorted(p.name for p in path.parent.iterdir() if p.is_file()) if path.parent.is_dir() else []
            raise ConfigError("there is no such file", key, name, fix=did_you_mean(path.name, nearby))
        if not os.access(path, os.R_OK):
            raise ConfigError("may not be read", key, name)
        if path.stat().st_size == 0:
            raise ConfigError("is empty", key, name)


def is_tfrecord(data: Config) -> bool:
    return bool(attribute(str(data["source"].get("_target_", "")), "reads_records"))


def check_tfrecord(config: Config) -> None:
    """ConfigError where the package for checksums is missing, or where the first record of the first file is damaged or lacks a feature that
    is named. The job reads the others. Before: `check_files`."""
    data = config["data"]
    if not is_tfrecord(data) or data["files"] is None:
        return
    from meshformer.data.records import check_first_record  # imports NumPy
    from meshformer.data.tfrecord import check_installed

    check_installed()
    named = {use: data[f"{use}_feature"] for use in ("text", "tokens", "image", "label") if data[f"{use}_feature"] is not None}
    check_first_record(data["files"][0], named)


def check_room(config: Config) -> None:
    """ConfigError where the model's context length or vocabulary is too small for the samples."""
    model, data = config["model"], config["data"]
    if model.get("context_length") is not None and model["context_length"] < data["context_length"]:
        message = f"the model sees fewer tokens than a sample has (data.context_length={data['context_length']})"
        raise ConfigError(message, "model.context_length", model["context_length"], fix="Leave it out, or make it at least as long.")
    if data["tokenizer"] == "bpe" and model.get("vocab_size") is not None and model["vocab_size"] < data["vocab_size"]:
        message = f"the tokenizer has more entries (data.vocab_size={data['vocab_size']})"
        raise ConfigError(message, "model.vocab_size", model["vocab_size"], fix="Leave it out: the tokenizer's size is taken.")


def check_labelled_files(config: Config) -> None:
    """ConfigError where a file of data=csv is missing or lacks a column. Reads the headers only; the job reads the rows."""
    for key in ("file", "validation_file"):
        name = config["data"][key]
        if name is None:
            continue
        path = Path(name)
        if path.is_dir():
            raise ConfigError("is a folder", f"data.{key}", name)
        if not path.is_file():
            nearby = sorted(p.name for p in path.parent.iterdir() if p.is_file()) if path.parent.is_dir() else []
            raise ConfigError("there is no such file", f"data.{key}", name, fix=did_you_mean(path.name, nearby))
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            try:
                header = next(csv.reader(file, delimiter=separator_of(path)), [])
            except csv.Error as error:
                raise ConfigError(f"its first line is no header ({error})", f"data.{key}", name) from None
        if not header:
            raise ConfigError("is empty", f"data.{key}", name)
        for column in ("text_column", "label_column", "pair_column"):
            wanted = config["data"][column]
            if wanted is not None and wanted not in header:
                raise no_such_column(path, header, f"data.{column}", wanted)


def separator_of(file: Path) -> str:
    return "\t" if file.suffix == ".tsv" else ","


def no_such_column(file: Path, header: list[str], key: str, column: str) -> ConfigError:
    separator = separator_of(file)
    for other, word in ((";", "semicolons"), ("\t", "tabs"), (",", "commas"), ("|", "bars")):
        if other != separator and len(header) == 1 and column in (name.strip('"') for name in header[0].split(other)):
            message = f"the columns of {file.name} are separated by {word}"
            rename = f"Call it {file.stem}.tsv." if other == "\t" else f"Write them with {'tabs' if separator == chr(9) else 'commas'} instead."
            return ConfigError(message, key, column, fix=rename)
    return ConfigError(f"{file.name} has no such column", key, column, fix=f"Use one of its columns: {', '.join(header)}.")
