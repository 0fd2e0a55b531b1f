"""TFRecord files and the Examples in them, against files that TensorFlow wrote (tensorflow/write.py), and what is said about damaged ones."""

from __future__ import annotations

import gzip
import pickle
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from meshformer.config.errors import ConfigError
from meshformer.data import RecordFiles, TFRecords
from meshformer.data.images import ImageData
from meshformer.data.prepared import prepare
from meshformer.data.tf_example import parse_example, serialize_example
from meshformer.data.tfrecord import is_compressed, masked_crc, read_records, write_records, write_shards
from meshformer.data.tokenizer import IdTokenizer, load_tokenizer

THEIRS = Path(__file__).parent / "tensorflow"
PLAIN, GZIP, ZLIB = (THEIRS / name for name in ("plain.tfrecord", "gzip.tfrecord.gz", "zlib.tfrecord.z"))


def expected(number: int) -> dict:
    """What tensorflow/write.py says of a record, but for the image file."""
    dark = number % 2
    brightness = 40 + 150 * (1 - dark) + number % 10
    return {
        "text": [f"First came the seed, then the rain. It was {'dark' if dark else 'light'}, day {number}: é ü 雨".encode()],
        "mood": [b"dark" if dark else b"light"],
        "label": [dark],
        "tokens": [(number * 7 + k) % 200 for k in range(number % 9 + 4)],
        "edges": [0, -1, 127, 128, 2**63 - 1, -(2**63)],
        "floats": np.array([0.5, -number, 1e-38, 3e38], np.float32).tolist(),
        "pixels": [np.float32(np.float32(brightness) / 255)] * 16,
        "empty": [],
        "two": [b"", b"\x00\xff"],
    }


def plain(features: dict) -> dict:
    return {name: value if isinstance(value, list) else value.tolist() for name, value in features.items() if name != "image"}


@pytest.mark.parametrize("file", [PLAIN, GZIP, ZLIB], ids=lambda file: file.name)
def test_what_tensorflow_wrote_is_read_as_it_was(file: Path, tmp_path: Path) -> None:
    records = RecordFiles([file], tmp_path)
    assert len(records) == 24 and is_compressed(file) == (file != PLAIN)
    for number in (23, 0, 11, *range(24)):  # in any order
        assert plain(parse_example(records[number])) == expected(number)
    assert list(read_records(file)) == [records[i] for i in range(24)]


def test_what_is_written_is_what_tensorflow_writes(tmp_path: Path) -> None:
    """The same bytes around the same records; `make tensorflow` has TensorFlow read ours."""
    places = write_records(tmp_path / "ours", read_records(PLAIN))
    assert (tmp_path / "ours").read_bytes() == PLAIN.read_bytes()
    offset, size = places[5]
    assert struct.unpack("<Q", PLAIN.read_bytes()[offset : offset + 8])[0] == size - 16
    with pytest.raises(FileExistsError):
        write_records(tmp_path / "ours", [])


def test_every_feature_comes_back_packed_or_not() -> None:
    numbers = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 500)
    features = {"a": [b"x" * 300, b""], "b": np.array([1.5, -2], np.float32), "c": numbers, "d": np.zeros(0, np.int64), "ü": [b"name"]}
    found = parse_example(serialize_example(features))
    assert {name: list(value) for name, value in found.items()} == {name: list(value) for name, value in features.items()}

    def field(number: int, wire: int, data: bytes) -> bytes:
        return bytes([number << 3 | wire]) + (bytes([len(data)]) + data if wire == 2 else data)

    ints = field(1, 0, b"\x96\x01") + field(1, 0, b"\x03") + field(1, 2, b"\x07\x08")  # not packed, not packed, packed
    floats = field(1, 5, struct.pack("<f", 0.25)) + field(1, 2, struct.pack("<2f", 1, 2))
    unknown = field(9, 1, b"12345678") + field(8, 5, b"1234")
    entries = [field(1, 2, b"i") + field(2, 2, field(3, 2, ints)) + unknown, field(1, 2, b"f") + field(2, 2, field(2, 2, floats))]
    found = parse_example(field(1, 2, b"".join(field(1, 2, entry) for entry in entries)))
    assert found["i"].tolist() == [150, 3, 7, 8] and found["f"].tolist() == [0.25, 1, 2]  # pyright: ignore


@pytest.mark.parametrize("data", [b"\x0a", b"\x0a\x05ab", b"\x0b", b"\x08\x80", b"\x12\x00", b"\x08\x01", b"\x0a\x02\x08\x01", b"not a message"])
def test_bytes_that_are_no_example_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"Example|beyond|cut off"):
        parse_example(data)


def test_no_cut_of_an_example_goes_unnoticed_or_crashes() -> None:
    whole = next(iter(read_records(PLAIN)))
    for size in range(1, len(whole), 7):
        with pytest.raises(ValueError):
            parse_example(whole[:size])


# --- damage


def flipped(path: Path, offset: int) -> Path:
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    path.write_bytes(data)
    return path


def offset_of(number: int) -> int:
    return write_at(number)[0]


def write_at(number: int) -> tuple[int, int]:
    at = 0
    for i, record in enumerate(read_records(PLAIN)):
        if i == number:
            return at, len(record)
        at += len(record) + 16
    raise IndexError


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (0, "the checksum of the length of record 3 differs, at offset {at:,}"),
        (8, "the checksum of the length of record 3 differs, at offset {at:,}"),
        (12, "the checksum of record 3 differs, at offset {at:,}"),
        (-1, "the checksum of record 3 differs, at offset {at:,}"),
    ],
)
def test_every_flipped_byte_names_file_and_offset(part: int, message: str, tmp_path: Path) -> None:
    at, size = write_at(2)
    file = flipped(Path(shutil.copy(PLAIN, tmp_path / "a.tfrecord")), at + (part if part >= 0 else size + 16 + part))
    with pytest.raises(ConfigError, match=message.format(at=at)) as caught:
        len(RecordFiles([file], tmp_path / "cache"))
    assert str(file) in str(caught.value)
    assert not list((tmp_path / "cache" / "prepared").glob("*[!k]")), "no index of a damaged file is kept"


def test_damage_after_the_index_was_made_is_found_where_it_is_read(tmp_path: Path) -> None:
    file = Path(shutil.copy(PLAIN, tmp_path / "a.tfrecord"))
    records = RecordFiles([file], tmp_path / "cache")
    assert len(records) == 24
    flipped(file, offset_of(7) + 20)
    assert plain(parse_example(records[6])) == expected(6)
    with pytest.raises(ConfigError, match=f"checksum of record 8 differs, at offset {offset_of(7):,}"):
        records[7]


def test_files_that_end_early_or_are_none(tmp_path: Path) -> None:
    file, at = tmp_path / "a", offset_of(3)
    for size, message in ((at + 5, "ends inside the header of record 4, at offset"), (at + 50, "ends inside record 4, which starts at offset")):
        file.write_bytes(PLAIN.read_bytes()[:size])
        with pytest.raises(ConfigError, match=message):
            list(read_records(file))
    file.write_bytes(b"text,label\nand more\n")
    with pytest.raises(ConfigError, match="is no TFRecord file, or damaged"):
        list(read_records(file))


def test_damaged_compressed_files(tmp_path: Path) -> None:
    whole, file = GZIP.read_bytes(), tmp_path / "a.gz"
    file.write_bytes(whole[:-400])
    with pytest.raises(ConfigError, match="compressed bytes end early, at offset 1,065"):
        list(read_records(file))
    for offset in (300, len(whole) - 6):  # in the data, and in the checksum behind it
        file.write_bytes(whole)
        with pytest.raises(ConfigError, match="damaged"):
            list(read_records(flipped(file, offset)))
    inside = bytearray(PLAIN.read_bytes())
    inside[offset_of(1) + 30] ^= 1
    file.write_bytes(gzip.compress(bytes(inside)))
    with pytest.raises(ConfigError, match=f"checksum of record 2 differs, at offset {offset_of(1)}"):
        list(read_records(file))


def test_compressed_files_may_be_concatenated_and_a_length_may_look_like_one(tmp_path: Path) -> None:
    records = list(read_records(PLAIN))
    (tmp_path / "both").write_bytes(GZIP.read_bytes() + gzip.compress(PLAIN.read_bytes()))
    assert list(read_records(tmp_path / "both")) == records * 2
    (tmp_path / "z").write_bytes(zlib.compress(PLAIN.read_bytes() * 40))
    assert list(read_records(tmp_path / "z")) == records * 40
    alike = [b"x" * 0x8B1F]  # its length begins with gzip's mark
    write_records(tmp_path / "plain", alike)
    assert (tmp_path / "plain").read_bytes()[:2] == b"\x1f\x8b" and list(read_records(tmp_path / "plain")) == alike


def test_the_index_is_made_once_and_travels_to_other_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = RecordFiles([PLAIN, GZIP], tmp_path)
    assert len(records) == 48 and records[24] == records[0] and "record 24 of" in records.place(47)
    monkeypatch.setattr("meshformer.data.tfrecord._bytes_of", None)  # decompresses, for the index
    again = pickle.loads(pickle.dumps(records))
    assert again[30] == records[6] and RecordFiles([GZIP], tmp_path)[6] == records[6]
    with pytest.raises(IndexError):
        records[48]


def test_shards_have_a_size_and_an_index(tmp_path: Path) -> None:
    records = [bytes([i]) * 100 for i in range(10)]
    shards = write_shards(tmp_path, "train", records, shard_bytes=350)
    assert [shard.name for shard in shards] == [f"train-0000{i}-of-00004.tfrecord" for i in range(4)]
    assert [record for shard in shards for record in read_records(shard)] == records
    data, lines = shards[1].read_bytes(), Path(f"{shards[1]}.idx").read_text().splitlines()
    offset, size = map(int, lines[2].split())
    assert len(lines) == 3 and data[offset + 12 : offset + size - 4] == records[5]
    assert struct.unpack("<I", data[offset + size - 4 : offset + size])[0] == masked_crc(records[5])
    assert write_shards(tmp_path, "test", []) == []


def test_without_the_package_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"google-crc32c. Run `pip install 'meshformer\[tfrecord\]'`"):
        list(read_records(PLAIN))


# --- as data


def write(path: Path, *examples: dict) -> str:
    write_records(path, [serialize_example(example) for example in examples])
    return str(path)


def test_text_is_one_corpus_and_files_may_say_their_parts(tmp_path: Path) -> None:
    source = TFRecords([str(PLAIN), str(GZIP)], tmp_path, text_feature="text")
    lines = source.text().split("\n")
    assert len(lines) == 48 and lines[30] == expected(6)["text"][0].decode()
    assert source.identity() != TFRecords([str(PLAIN)], tmp_path, text_feature="text").identity()
    assert prepare(source, tokenizer="char", vocab_size=0, cache=tmp_path).bytes_per_token("val") > 1
    files = [write(tmp_path / f"{i}.tfrecord", *({"t": [f"{i}{k % 10}".encode()]} for k in range(n))) for i, n in enumerate((30, 4, 3))]
    parts = TFRecords(files[:1], tmp_path, text_feature="t", validation_files=files[1:2], test_files=files[2:])
    prepared = prepare(parts, tokenizer="char", vocab_size=0, cache=tmp_path)
    decoded = {split: prepared.tokenizer.decode(prepared.tokens(split)) for split in ("train", "val", "test")}
    assert decoded["train"] == "\n".join(f"0{k % 10}" for k in range(30))
    assert decoded["val"] == "\n10\n11\n12\n13" and decoded["test"] == "\n20\n21\n22"
    halves = prepare(TFRecords(files[:1], tmp_path, text_feature="t", validation_files=files[1:2]), tokenizer="char", vocab_size=0, cache=tmp_path)
    assert [len(halves.tokens(split)) for split in ("train", "val", "test")] == [89, 6, 6]


def test_ids_are_the_tokens_with_the_tokenizer_beside_them_or_as_numbers(tmp_path: Path) -> None:
    ids = [token for number in range(24) for token in expected(number)["tokens"]]
    source = TFRecords(str(PLAIN), tmp_path, tokens_feature="tokens")
    prepared = prepare(source, tokenizer="char", vocab_size=0, cache=tmp_path)
    assert np.concatenate([prepared.tokens(split) for split in ("train", "val", "test")]).tolist() == ids
    assert prepared.tokenizer.vocab_size == max(ids) + 1 and prepared.bytes_per_token("val") is None
    assert prepared.tokenizer.encode("3 14").tolist() == [3, 14] and prepared.tokenizer.decode([3, 14]) == "3 14"
    with pytest.raises(ConfigError, match="'x' is no token"):
        prepared.tokenizer.encode("3 x")
    folder = tmp_path / "with"
    folder.mkdir()
    shutil.copy(PLAIN, folder)
    named = TFRecords(str(folder / PLAIN.name), tmp_path, tokens_feature="tokens")
    theirs = prepare(TFRecords(str(PLAIN), tmp_path, text_feature="text"), tokenizer="char", vocab_size=0, cache=tmp_path).tokenizer
    theirs.save(folder / "tokenizer.json")
    with pytest.raises(ConfigError, match=f"hold the id .*tokenizer.json has {theirs.vocab_size} tokens"):
        prepare(named, tokenizer="char", vocab_size=0, cache=tmp_path)
    fixed = IdTokenizer(500)
    assert prepare(source, tokenizer="char", vocab_size=0, cache=tmp_path, fixed_tokenizer=fixed).tokenizer.vocab_size == 500
    with pytest.raises(ConfigError, match="of another tokenizer than the model's"):
        prepare(source, tokenizer="char", vocab_size=0, cache=tmp_path, fixed_tokenizer=IdTokenizer(100))
    masked = prepare(source, tokenizer="char", vocab_size=0, cache=tmp_path, mask=True).tokenizer
    assert masked.mask_id == max(ids) + 1 and masked.decode([1, masked.mask_id]) == "1 [MASK]"
    masked.save(tmp_path / "t.json")
    assert load_tokenizer(tmp_path / "t.json").to_json() == masked.to_json()


def test_labels_are_names_numbers_or_tags(tmp_path: Path) -> None:
    by_name = TFRecords(str(PLAIN), tmp_path, text_feature="text", label_feature="mood").examples()
    by_number = TFRecords(str(PLAIN), tmp_path, text_feature="text", label_feature="label").examples()
    named = TFRecords(str(PLAIN), tmp_path, text_feature="text", label_feature="label", classes=["light", "dark"]).examples()
    assert by_name.labels == named.labels == [["light", "dark"][i % 2] for i in range(24)]
    assert by_number.labels == [str(i % 2) for i in range(24)]
    assert by_name.texts == by_number.texts and by_name.splits.count("val") == 5
    assert by_name.place(3) == f"record 4 of {PLAIN}"
    tags = TFRecords(write(tmp_path / "a", {"t": [b"a b"], "y": [b"X", b"Y"]}), tmp_path, text_feature="t", label_feature="y").examples()
    assert tags.labels == ["X Y"]


def test_images_are_files_or_pixels(tmp_path: Path) -> None:
    shown = {"label_feature": "mood", "validation_files": [str(GZIP)]}
    files, floats = (TFRecords(str(PLAIN), tmp_path, image_feature=name, **shown).read() for name in ("image", "pixels"))
    assert files[0].shape == (48, 4, 4) and np.allclose(files[0], floats[0], atol=1e-6) and files[1].tolist() == [1, 0] * 24
    assert files[0][3].max() == np.float32((40 + 3) / 255) and files[2] == ["train"] * 24 + ["val"] * 24
    raw = [{"i": [bytes([k] * 12)], "l": np.array([k])} for k in (0, 255)] * 5
    whole = [{"i": np.full(12, k), "l": np.array([k])} for k in (0, 255)] * 5
    for number, examples in enumerate((raw, whole)):
        source = TFRecords(write(tmp_path / str(number), *examples), tmp_path, image_feature="i", label_feature="l")
        images, labels, _ = source.read()
        assert images.shape == (10, 2, 2, 3) and set(images.ravel().tolist()) == {0.0, 1.0} and source.classes == ["0", "255"]
        assert labels.tolist() == [0, 1] * 5
        data = ImageData(source, batch_size=4, seed=1)
        assert next(iter(data.train_dataloader()))[0]["images"].shape == (4, 2, 2, 3)


TEXT = {"t": [b"a text"], "n": np.array([3]), "f": np.array([0.5], np.float32), "l": [b"x"]}


@pytest.mark.parametrize(
    ("examples", "features", "message"),
    [
        ([TEXT], {"text": "tt"}, "data.text_feature=tt: record 1 of .* has no such feature. Its features are: f, l, n, t"),
        ([TEXT, {"l": [b"x"]}], {"text": "t"}, "record 2 of .* has no such feature"),
        ([TEXT], {"text": "n"}, "holds it with int64 values, and text is bytes"),
        ([TEXT], {"tokens": "f"}, "holds it with float values, and tokens is int64"),
        ([{"t": [b"a", b"b"]}], {"text": "t"}, "holds 2 values, not one"),
        ([{"t": [b"\xff"]}], {"text": "t"}, "is not UTF-8: byte 0xff at offset 0"),
        ([{"n": np.array([1, -2])}], {"tokens": "n"}, "the files hold the id -2, and ids start at 0"),
        ([{"n": np.zeros(0, np.int64)}], {"tokens": "n"}, "the files hold no ids"),
        ([TEXT, {**TEXT, "l": np.array([1])}], {"text": "t", "label": "l"}, "record 2 of .* holds int64 values, and those before hold bytes"),
        ([{**TEXT, "l": []}], {"text": "t", "label": "l"}, "record 1 of .* has no label"),
        ([{"i": [b"\x89PNG\r\n"], "l": [b"x"]}], {"image": "i", "label": "l"}, "holds an image that cannot be read"),
        ([{"i": [b"abc" * 5], "l": [b"x"]}], {"image": "i", "label": "l"}, "holds 15 pixels: no PNG or JPEG, and no square image"),
        ([{"i": np.array([np.nan] * 4), "l": [b"x"]}], {"image": "i", "label": "l"}, "values that are not finite"),
        ([{"i": np.ones(n), "l": [b"x"]} for n in (4, 9)], {"image": "i", "label": "l"}, "image of 3 × 3 pixels in grey, .* before have 2 × 2"),
        ([], {"image": "i", "label": "l"}, "the files hold no records"),
    ],
)  # fmt: skip
def test_what_the_records_lack_is_one_sentence(examples: list[dict], features: dict[str, str], message: str, tmp_path: Path) -> None:
    source = TFRecords(write(tmp_path / "a", *examples), tmp_path / "cache", **{f"{use}_feature": name for use, name in features.items()})
    with pytest.raises(ConfigError, match=message):
        if "image" in features:
            source.read()
        elif "label" in features:
            source.examples()
        elif "tokens" in features:
            prepare(source, tokenizer="char", vocab_size=0, cache=tmp_path)
        else:
            source.text()


def test_a_label_that_training_never_saw_is_named(tmp_path: Path) -> None:
    seen = write(tmp_path / "a", *({"i": np.ones(4), "l": [label]} for label in (b"x", b"y")))
    other = write(tmp_path / "b", {"i": np.ones(4), "l": [b"z"]})
    source = TFRecords(seen, tmp_path, image_feature="i", label_feature="l", validation_files=other)
    with pytest.raises(ConfigError, match=r"record 1 of .*b has the label z, which is none of the classes x, y"):
        source.read()
