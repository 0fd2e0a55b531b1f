"""How fast records and their checksums are read."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from meshformer.data.tf_example import parse_example, serialize_example
from meshformer.data.tfrecord import RecordFiles, masked_crc, read_records, write_records

MEGABYTE = 1_000_000


def report_tfrecord(options: argparse.Namespace) -> None:
    """100 MB (of `--megabytes`, at most) in records of 1 kB and of 100 kB: checksums, reading in order, the index, reading in random order."""
    size = min(options.megabytes, 100) * MEGABYTE
    draw = np.random.default_rng(0)
    block = draw.bytes(size)
    _say("checksums of one block", size, *_timed(lambda: masked_crc(block)))
    for length in (1000, 100_000):
        with tempfile.TemporaryDirectory() as folder:
            _report(Path(folder), [block[at : at + length] for at in range(0, size, length)], size)
    ids = draw.integers(0, 50_000, 4096)
    examples = [serialize_example({"tokens": ids})] * 500
    seconds, _ = _timed(lambda: [parse_example(example) for example in examples])
    print(f"{'parse Examples of 4,096 token ids':<44}{500 * 4096 / seconds / 1e6:8.1f} million ids/s")


def _report(folder: Path, records: list[bytes], size: int) -> None:
    file, order = folder / "a", np.random.default_rng(1).permutation(len(records)).tolist()
    _say(f"write, records of {len(records[0]) / 1000:g} kB", size, *_timed(lambda: write_records(file, records)))
    _say("  read in order, all checksums", size, *_timed(lambda: sum(map(len, read_records(file)))))
    files = RecordFiles([file], folder / "cache")
    _say("  make the index, all checksums", size, *_timed(lambda: len(files)))
    _say("  read in random order, all checksums", size, *_timed(lambda: [files[number] for number in order]))
    files.close()


def _timed(work: Any) -> tuple[float, Any]:
    begun = time.perf_counter()
    result = work()
    return time.perf_counter() - begun, result


def _say(what: str, size: int, seconds: float, _: Any) -> None:
    print(f"{what:<44}{size / MEGABYTE:6.0f} MB in {seconds:6.3f} s{size / MEGABYTE / seconds:9.0f} MB/s")
