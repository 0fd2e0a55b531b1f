"""Claims about checks of prepared data: what does not fit is prepared anew with one line of warning, and each check is made once."""

import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from meshformer.config.errors import ConfigError
from meshformer.data import CharTokenizer, TextData, TextFiles, checked, digests, prepare
from meshformer.data.checked import BLOCK, SUMS, built_once, check

TEXT = "To be, or not to be: that is the question.\n" * 300


@pytest.fixture
def make(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")

    def make(**changes):
        return prepare(TextFiles(str(tmp_path / "text.txt")), **{"tokenizer": "char", "vocab_size": 0, "cache": tmp_path, **changes})

    return make


def flip(path, at=-1, bit=1):
    content = bytearray(path.read_bytes())
    content[at] ^= bit
    path.write_bytes(content)


def beyond(folder):
    ids = np.load(folder / "train.npy")
    ids[7] = 60_000
    np.save(folder / "train.npy", ids)


def with_sums(damage):
    """The file, and the list of sums without its own: what a clumsy hand would leave."""

    def both(folder):
        damage(folder)
        content = json.loads((folder / SUMS).read_text())
        content["files"]["train.npy"] = checked._entry(folder / "train.npy")
        (folder / SUMS).write_text(json.dumps(content))

    return both


DAMAGE = {
    "a flipped bit": (lambda folder: flip(folder / "train.npy"), "the checksum of train.npy differs"),
    "a flipped bit of the header": (lambda folder: flip(folder / "val.npy", 20), "the checksum of val.npy differs"),
    "a truncated file": (lambda folder: os.truncate(folder / "val.npy", 140), "val.npy has 140 bytes instead of"),
    "a missing file": (lambda folder: (folder / "test.npy").unlink(), "test.npy is missing"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "another tokenizer": (lambda folder: CharTokenizer(TEXT[:1] + "xyz").save(folder / "tokenizer.json"), "tokenizer.json has"),
    "a tokenizer in another order": (
        lambda folder: (folder / "tokenizer.json").write_text(
            (folder / "tokenizer.json").read_text().replace("To", "oT").replace("ab", "ba")
        ),
        "the checksum of tokenizer.json differs",
    ),
    "an id beyond the vocabulary": (beyond, "the checksum of train.npy differs"),
    "an id beyond the vocabulary, summed": (with_sums(beyond), f"{SUMS} is damaged"),
    "a broken prepared.json": (lambda folder: (folder / "prepared.json").write_text('{"text_by'), "prepared.json has 9 bytes instead of"),
    "broken checksums": (lambda folder: (folder / SUMS).write_text('{"files": 3'), f"{SUMS} is damaged"),
    "checksums of another kind": (lambda folder: (folder / SUMS).write_text("[]"), f"{SUMS} is damaged"),
    "no checksums": (lambda folder: (folder / SUMS).unlink(), f"has no {SUMS}"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_does_not_fit_is_prepared_anew_with_one_line(make, capfd, tmp_path, name):
    damage, words = DAMAGE[name]
    folder = make().folder
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert capfd.readouterr() == ("", "")
    damage(folder)
    data = TextData(TextFiles(str(tmp_path / "text.txt")), 4, 16, "char", 0, tmp_path, seed=1)
    next(iter(data.train_dataloader()))
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and words in err and str(folder) in err and err.endswith("Preparing it anew.\n")
    assert data.prepared.folder == folder and {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [folder.name]
    make()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_id_beyond_the_vocabulary_that_no_start_has_seen_is_told(make, tmp_path, split):
    data = TextData(TextFiles(str(tmp_path / "text.txt")), 4, 16, "char", 0, tmp_path, seed=1)
    data.prepare_data()
    ids = np.load(file := data.prepared.folder / f"{split}.npy")
    ids[:] = 200
    file.write_bytes(file.read_bytes()[: -ids.nbytes] + ids.tobytes())
    loader = data.train_dataloader() if split == "train" else data.val_dataloader()
    with pytest.raises(ConfigError, match=rf"the id 200, and there are {data.vocab_size} tokens.*Delete .*{data.prepared.folder.name}"):
        next(iter(loader))


def test_a_folder_of_other_settings_under_this_name_is_not_taken(make, capfd):
    chars, words = make().folder, make(tokenizer="bpe", vocab_size=260).folder
    shutil.rmtree(chars)
    shutil.copytree(words, chars)
    assert make().tokenizer.decode(make().tokens("val")) in TEXT and make().tokens("train").max() < make().tokenizer.vocab_size
    assert "made from other data or with another tokenizer" in capfd.readouterr().err


def test_labelled_texts_are_checked_too(tmp_path, capfd):
    from meshformer.data import CsvTexts, SequenceData

    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"word {i},{'xy'[i % 2]}\n" for i in range(30)))

    def batch():
        data = SequenceData(CsvTexts(str(tmp_path / "a.csv"), label_column="label"), "label", 4, 16, "char", 0, tmp_path, seed=1)
        return data.folder, next(iter(data.train_dataloader()))[0]["tokens"].tolist()

    folder, before = batch()
    for file, damage in {"classes.json": lambda path: path.write_text("["), "train.npz": lambda path: os.truncate(path, 50)}.items():
        damage(folder / file)
        assert batch() == (folder, before)
        assert capfd.readouterr().err.count(f"{file} has") == 1


def test_a_read_only_cache_is_used_where_it_is_right(make, monkeypatch, tmp_path):
    folder = make().folder
    monkeypatch.setattr(checked, "_began", lambda: time.time() + 1)  # as for a process of tomorrow

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checked.FileLock, "acquire", refuse)
    assert make().folder == folder
    flip(folder / "train.npy")
    with pytest.raises(ConfigError, match=r"paths\.data"):
        make()


@pytest.fixture
def counted(monkeypatch):
    """The names of the files whose blocks are read, and how many of them."""
    read = []
    sums = checked._sums
    monkeypatch.setattr(checked, "_sums", lambda path, blocks: read.append((path.name, len(list(blocks)))) or sums(path, blocks))
    return read


def test_ranks_that_start_together_check_once(make, counted, monkeypatch):
    folder = make().folder
    began = time.time() + 0.01
    monkeypatch.setattr(checked, "_began", lambda: began)
    time.sleep(0.02)
    counted.clear()
    for _ in range(4):
        make()
    assert sorted(name for name, _ in counted) == sorted(path.name for path in folder.iterdir() if path.name != SUMS)
    began = time.time()  # the next job's processes
    counted.clear()
    make()
    make()
    assert len(counted) == 5


def test_processes_that_start_together_warn_once(make, tmp_path):
    flip(make().folder / "train.npy")
    script = (
        "import sys; from meshformer.data import TextFiles, prepare\n"
        "p = prepare(TextFiles(sys.argv[1]), tokenizer='char', vocab_size=0, cache=sys.argv[2])\n"
        "print(p.tokenizer.decode(p.tokens('train')[-30:]))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "text.txt"), str(tmp_path)]
    jobs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    answers = [job.communicate(timeout=60) for job in jobs]
    assert [out in TEXT + "\n" or out[:-1] in TEXT for out, _ in answers] == [True] * 3, answers
    assert "".join(err for _, err in answers).count("Preparing it anew") == 1


def test_of_a_large_file_a_start_reads_some_blocks_in_turn_and_after_a_write_all(tmp_path, monkeypatch, counted, capfd):
    monkeypatch.setattr(checked, "WHOLE", 4096)
    monkeypatch.setattr(checked, "BLOCK", 1024)
    monkeypatch.setattr(checked, "IN_TURN", 3)
    clock = iter(range(10**9, 2 * 10**9))
    monkeypatch.setattr(checked, "_began", lambda: float(next(clock)) * 10)  # each call is another process
    builds = []

    def build(folder):
        builds.append(folder)
        (folder / "large.bin").write_bytes(bytes(range(256)) * 80)  # 20 blocks

    def start():
        counted.clear()
        return built_once({"a": 1}, tmp_path, build), sum(n for _, n in counted)

    folder, n = start()
    assert n == 20 and len(builds) == 1
    assert [start()[1] for _ in range(3)] == [4, 5, 5]  # 0 1 2 19, then 0 3 4 5 19, …
    flip(folder / "large.bin", 15 * 1024)  # a write, which the system tells of
    assert start()[1] >= 20 and len(builds) == 2 and "checksum" in capfd.readouterr().err
    # A disk's own mistake leaves the times: it is found when its block's turn comes.
    flip(folder / "large.bin", 7 * 1024)
    note = json.loads((path := folder.with_name(f"{folder.name}.checked")).read_text())
    path.write_text(json.dumps({**note, "files": checked._stamps(folder, ["large.bin"])}))
    assert [len(builds) for _ in range(3) if start()] == [2, 2, 3]
    assert check(folder, "another") == "it was made from other data or with another tokenizer"


def test_the_hash_of_a_large_source_is_remembered_until_it_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "LARGE", 10)
    path, reads = tmp_path / "a.txt", []
    path.write_text(TEXT)
    read = digests._read
    monkeypatch.setattr(digests, "_read", lambda path: reads.append(path) or read(path))
    plain = TextFiles(str(path)).identity()
    for expected in (2, 3):  # just written: another write may leave no trace yet
        assert TextFiles(str(path)).identity(tmp_path) == plain and len(reads) == expected
    monkeypatch.setattr(digests, "_SETTLED", -1e12)
    for _ in range(3):
        assert TextFiles(str(path)).identity(tmp_path) == plain and len(reads) == 4
    times = path.stat()
    path.write_text(TEXT.replace("question", "Question"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert TextFiles(str(path)).identity(tmp_path) != plain
    (tmp_path / "prepared" / "digests.json").write_text("[3")
    assert TextFiles(str(path)).identity(tmp_path) != plain
    assert BLOCK == 4 << 20
