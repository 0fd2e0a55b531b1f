"""`make tensorflow`: 10,000 records both ways between TensorFlow and meshformer, plain and compressed; the files of the tests written again.
Runs with TensorFlow in an environment of its own: PYTHONPATH=src .venv-tensorflow/bin/python tests/data/tensorflow/check.py"""

import filecmp
import gzip
import os
import sys
import tempfile
import time
import zlib
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
import numpy as np
import tensorflow as tf

sys.path.insert(0, str(Path(__file__).parent))
from write import feature, write

from meshformer.data.tf_example import parse_example, serialize_example
from meshformer.data.tfrecord import RecordFiles, write_records

RECORDS, SEED = 10_000, 5
COMPRESSION = {"": lambda data: data, "GZIP": gzip.compress, "ZLIB": zlib.compress}


def features(number: int) -> dict:
    draw = np.random.default_rng([SEED, number])
    return {
        "bytes": [draw.bytes(int(size)) for size in draw.integers(0, 40, draw.integers(0, 4))],
        "float": draw.normal(size=int(draw.integers(0, 20))).astype(np.float32) * np.float32(10.0) ** int(draw.integers(-30, 30)),
        "int64": draw.integers(-(2**63), 2**63 - 1, int(draw.integers(0, 20))) >> draw.integers(0, 63),
    }


def same(found: dict, wanted: dict) -> bool:
    """`parse_example` gives an empty list for a feature without values of whatever kind."""
    return found.keys() == wanted.keys() and all(list(found[name]) == list(wanted[name]) for name in wanted)


def parsed_by_tensorflow(data: bytes) -> dict:
    example = tf.train.Example.FromString(data)
    return {name: list(getattr(value, value.WhichOneof("kind")).value) for name, value in example.features.feature.items()}


def check(folder: Path, compression: str) -> None:
    wanted = [features(number) for number in range(RECORDS)]
    theirs, ours = folder / f"theirs{compression}", folder / f"ours{compression}"
    with tf.io.TFRecordWriter(str(theirs), tf.io.TFRecordOptions(compression_type=compression)) as writer:
        for values in wanted:
            made = {name: feature(name, list(value)) for name, value in values.items()}
            writer.write(tf.train.Example(features=tf.train.Features(feature=made)).SerializeToString())
    records = RecordFiles([theirs], folder / "cache")
    assert len(records) == RECORDS
    order = np.random.default_rng(SEED).permutation(RECORDS).tolist()
    begun = time.perf_counter()
    assert all(same(parse_example(records[number]), wanted[number]) for number in order)
    seconds = time.perf_counter() - begun

    write_records(folder / "plain", [serialize_example(values) for values in wanted])
    ours.write_bytes(COMPRESSION[compression]((folder / "plain").read_bytes()))
    (folder / "plain").unlink()
    dataset = tf.data.TFRecordDataset(str(ours), compression_type=compression)
    read = [record.numpy() for record in dataset]
    assert len(read) == RECORDS and all(same(parsed_by_tensorflow(record), values) for record, values in zip(read, wanted, strict=True))
    theirs_read = f"{RECORDS:,} records of TensorFlow read in random order in {seconds:.1f} s, equal"
    print(f"{compression or 'plain':<6} {theirs_read}; {RECORDS:,} of ours read by it, equal")


def main() -> None:
    print(f"TensorFlow {tf.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        for compression in COMPRESSION:
            check(Path(folder), compression)
        write(Path(folder))
        for name in ("plain.tfrecord", "gzip.tfrecord.gz", "zlib.tfrecord.z"):
            equal = filecmp.cmp(Path(folder) / name, Path(__file__).with_name(name), shallow=False)
            print(f"{name} of the tests: {'the same bytes' if equal else 'other bytes, as a new zlib may write'}")
        assert filecmp.cmp(Path(folder) / "plain.tfrecord", Path(__file__).with_name("plain.tfrecord"), shallow=False)
        assert "torch" not in sys.modules


if __name__ == "__main__":
    main()
