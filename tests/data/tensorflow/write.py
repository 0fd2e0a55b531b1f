"""Wrote the files beside it, with TensorFlow 2.21 (`make tensorflow` writes them again elsewhere and compares): python write.py FOLDER."""

import sys
from pathlib import Path

import tensorflow as tf

LETTERS = "First came the seed, then the rain. "


def feature(kind: str, values: list) -> tf.train.Feature:
    made = {"bytes": tf.train.BytesList, "float": tf.train.FloatList, "int64": tf.train.Int64List}[kind](value=values)
    return tf.train.Feature(**{f"{kind}_list": made})


def example(number: int) -> tf.train.Example:
    """Text of two classes, ids, all extremes of each kind, an image of 4 × 4 pixels as a PNG file and as floats."""
    dark = number % 2
    pixels = tf.fill((4, 4, 1), tf.constant(40 + 150 * (1 - dark) + number % 10, tf.uint8))
    features = {
        "text": feature("bytes", [f"{LETTERS}It was {'dark' if dark else 'light'}, day {number}: é ü 雨".encode()]),
        "mood": feature("bytes", [b"dark" if dark else b"light"]),
        "label": feature("int64", [dark]),
        "tokens": feature("int64", [(number * 7 + k) % 200 for k in range(number % 9 + 4)]),
        "edges": feature("int64", [0, -1, 127, 128, 2**63 - 1, -(2**63)]),
        "floats": feature("float", [0.5, -float(number), 1e-38, 3e38]),
        "pixels": feature("float", tf.reshape(tf.cast(pixels, tf.float32) / 255, [-1]).numpy().tolist()),
        "image": feature("bytes", [tf.io.encode_png(pixels).numpy()]),
        "empty": feature("bytes", []),
        "two": feature("bytes", [b"", b"\x00\xff"]),
    }
    return tf.train.Example(features=tf.train.Features(feature=features))


def write(folder: Path) -> None:
    for name, compression in (("plain.tfrecord", ""), ("gzip.tfrecord.gz", "GZIP"), ("zlib.tfrecord.z", "ZLIB")):
        with tf.io.TFRecordWriter(str(folder / name), options=tf.io.TFRecordOptions(compression_type=compression)) as writer:
            for number in range(24):
                writer.write(example(number).SerializeToString(deterministic=True))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
