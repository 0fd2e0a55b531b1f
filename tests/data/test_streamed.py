"""Claims about preparing in pieces: the tokens are those of the whole text, whatever the pieces, and memory does not grow with the text."""

import io
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshformer.config.errors import ConfigError
from meshformer.data import BpeTokenizer, CharTokenizer, TextFiles, corpus, prepare, streamed, tokenizer, workers
from meshformer.data.streamed import Stream, write_tokens
from meshformer.data.tokenizer import _pieces

TEXT = "".join(f"Zeile {i}: «Größe» – 文字 🙂, it's {i * 7919 % 1000}\r\n\r\n  \u3000tab\t{'x' * (i % 40)}\u00a0.\n" for i in range(150))


class Cut:
    """TEXT in pieces of `size` characters."""

    def __init__(self, text: str, size: int) -> None:
        self.content, self.size = text, size

    def pieces(self):
        yield from (self.content[i : i + self.size] for i in range(0, len(self.content), self.size))

    def text(self):
        raise AssertionError("a corpus that has pieces is not asked for its text")

    def identity(self):
        return {"text": self.content, "size": self.size}


def whole(text: str, kind: str, vocab_size: int) -> tuple[list[bytes], str]:
    """As it was done in memory: the three files and the tokenizer."""
    first, second = len(text) * 90 // 100, len(text) * 95 // 100
    parts = text[:first], text[first:second], text[second:]
    chosen = CharTokenizer.train(text) if kind == "char" else BpeTokenizer.train(parts[0], vocab_size)
    files = []
    for part in parts:
        ids = [chosen.characters.index(c) for c in part] if kind == "char" else chosen._model.encode(part).ids
        np.save(file := io.BytesIO(), np.array(ids, np.uint16))
        files.append(file.getvalue())
    return files, chosen.to_json()


@pytest.mark.parametrize("kind", ["char", "bpe"])
@pytest.mark.parametrize("size", [1, 7, 64, 1000, 10**6])
def test_pieces_give_byte_for_byte_what_the_whole_gives(tmp_path, monkeypatch, kind, size):
    monkeypatch.setattr(tokenizer, "BATCH", 2)
    monkeypatch.setattr(_pieces, "__defaults__", (50, 1 << 22))
    monkeypatch.setattr(streamed, "PIECE", 300)
    prepared = prepare(Cut(TEXT, size), tokenizer=kind, vocab_size=300, cache=tmp_path)
    files, saved = whole(TEXT, kind, 300)
    assert [(prepared.folder / f"{split}.npy").read_bytes() for split in ("train", "val", "test")] == files
    assert prepared.tokenizer.to_json() == saved
    assert sum(prepared.text_bytes.values()) == len(TEXT.encode())


@pytest.mark.parametrize("read", [1, 2, 3, 5, 1 << 20])
def test_a_file_is_the_same_text_however_it_is_read(tmp_path, monkeypatch, read):
    monkeypatch.setattr(corpus, "READ", read)
    path = tmp_path / "a.txt"
    for content in ("\ufeff" + TEXT + "\r", "a\r\r\n\n\r", "", "\ufeff", "\r\n", "é"):
        path.write_bytes(content.encode())
        assert TextFiles(str(path)).text() == content.removeprefix("\ufeff").replace("\r\n", "\n")
        assert TextFiles([str(path), str(path)]).text() == 2 * content.removeprefix("\ufeff").replace("\r\n", "\n")


@pytest.mark.parametrize("read", [1, 2, 4, 1 << 20])
@pytest.mark.parametrize(
    "content, words",
    [
        ("éé".encode() + b"a\xe9b", ["0xe9 at offset 5", "latin1"]),
        ("é".encode() + "文".encode()[:2], ["0xe6 at offset 2"]),
        ("文".encode()[:2] + b"a", ["0xe6 at offset 0"]),
        ("ab".encode("utf-16"), ["0xff at offset 0", "utf-16"]),
    ],
)
def test_an_invalid_byte_is_named_with_its_offset_in_the_file(tmp_path, monkeypatch, read, content, words):
    monkeypatch.setattr(corpus, "READ", read)
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        TextFiles(str(tmp_path / "a.txt")).text()
    assert all(word in str(caught.value) for word in ["a.txt", *words]), str(caught.value)


SPACES = "ab'sdt1.,é文🙂 \n\t\r\x0b\x0c\x1c\x1f\x00\x85\xa0\u1680\u180e\u2003\u200b\u2028\u202f\u205f\u2060\u3000\ufeff"


@pytest.fixture(scope="module")
def bpe() -> BpeTokenizer:
    return BpeTokenizer.train(TEXT, 300)


@pytest.fixture(scope="module")
def mixed() -> BpeTokenizer:
    """One that has learnt to merge whatever two characters may stand side by side."""
    return BpeTokenizer.train("".join(random.Random(0).choices(SPACES, k=100_000)), 3000)


@settings(max_examples=500, deadline=None)
@given(text=st.text(st.sampled_from(SPACES), max_size=30))
def test_words_have_the_tokens_of_the_whole_text(mixed, text):
    bpe = mixed
    assert bpe.encode(text).tolist() == bpe._model.encode(text).ids


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.sampled_from("ab \n"), max_size=60), cuts=st.integers(1, 9), size=st.integers(1, 9))
def test_pieces_for_bpe_do_not_depend_on_where_the_text_was_cut(text, cuts, size):
    cut = [text[i : i + cuts] for i in range(0, len(text), cuts)]
    assert list(_pieces(cut, size, longest=12)) == list(_pieces((text,), size, longest=12))
    assert "".join(_pieces(cut, size)) == text and list(_pieces(cut, size)) == list(_pieces((text,), size))


def test_a_memory_of_words_that_is_full_is_emptied(bpe, monkeypatch):
    expected = bpe.encode(TEXT).tolist()
    monkeypatch.setattr(tokenizer, "REMEMBERED", 5)
    monkeypatch.setattr(tokenizer, "BATCH", 1)
    monkeypatch.setattr(_pieces, "__defaults__", (50, 1 << 22))
    assert bpe.encode(TEXT).tolist() == expected


def test_unknown_characters_are_counted_over_all_pieces(tmp_path, caplog):
    known = CharTokenizer("abc?")
    text = "abcé" * 100
    with pytest.raises(ConfigError, match=r"'é' \(90 times\)"):  # of the training part
        prepare(Cut(text, 7), tokenizer="char", vocab_size=0, cache=tmp_path, fixed_tokenizer=known)
    prepared = prepare(Cut(text, 7), tokenizer="char", vocab_size=0, cache=tmp_path, fixed_tokenizer=known, unknown="replace")
    assert known.decode(prepared.tokens("test")) == "abc?" * 5
    assert [record.getMessage().count("times") for record in caplog.records] == [1, 1, 1]  # one line a part, not a piece


def test_a_text_that_changes_while_it_is_read_is_an_error():
    class Shrinking(Cut):
        def pieces(self):
            self.content = self.content[:-50]
            return super().pieces()

    stream = Stream(Shrinking(TEXT, 100))
    with pytest.raises(ConfigError, match="shorter"):
        list(stream.part(0, stream.length))


@pytest.mark.parametrize("n, vocab_size", [(0, 10), (7, 10), (123_456, 10), (5, 70_000)])
def test_a_token_file_written_in_parts_is_numpys(tmp_path, n, vocab_size):
    ids = np.arange(n, dtype=np.uint16 if vocab_size == 10 else np.uint32)
    np.save(expected := io.BytesIO(), ids)
    write_tokens(tmp_path / "a.npy", (ids[i : i + 1000] for i in range(0, n, 1000)), vocab_size)
    assert (tmp_path / "a.npy").read_bytes() == expected.getvalue()


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("kind, limit", [("char", 25), ("bpe", 80)])
def test_memory_does_not_grow_with_the_text(tmp_path, kind, limit):
    """24 MB against 3 MB; a fresh process each, for its peak is what counts."""
    script = (
        "import sys; from meshformer.data import TextFiles, prepare\n"
        "prepare(TextFiles(sys.argv[1]), tokenizer=sys.argv[3], vocab_size=260, cache=sys.argv[2])\n"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    peaks = []
    line = "The quick brown fox jumps over the lazy dog.\n"
    for millions in (3, 24):
        path = tmp_path / f"{millions}.txt"
        path.write_text(line * (millions * 10**6 // len(line)))
        command = [sys.executable, "-c", script, str(path), str(tmp_path), kind]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 1024)
    assert peaks[1] - peaks[0] < limit, peaks


def test_worker_processes_give_the_same_tokens_and_are_done_without_when_they_die(bpe, monkeypatch):
    expected = bpe.encode(TEXT * 3).tolist()
    monkeypatch.setattr(tokenizer, "BATCH", 4)
    monkeypatch.setattr(tokenizer, "ALONE", 2)
    monkeypatch.setattr(_pieces, "__defaults__", (50, 1 << 22))
    monkeypatch.setattr(tokenizer, "cores", lambda: 3)
    started, encode, open_process = [], workers.Workers.encode, subprocess.Popen

    def start(*arguments, **settings):
        started.append(open_process(*arguments, **settings))
        return started[-1]

    monkeypatch.setattr(workers.subprocess, "Popen", start)
    assert bpe.encode(TEXT * 3).tolist() == expected and len(started) == 3
    assert all(process.returncode is not None for process in started)

    def kill(self, pieces):
        for process in started[3:5]:
            process.kill()
        return encode(self, pieces)

    monkeypatch.setattr(workers.Workers, "encode", kill)
    assert bpe.encode(TEXT * 3).tolist() == expected and len(started) == 6
    monkeypatch.setattr(workers.subprocess, "Popen", lambda *_, **__: (_ for _ in ()).throw(OSError(11, "no process")))
    assert bpe.encode(TEXT * 3).tolist() == expected


def test_a_pretrained_tokenizer_is_given_pieces_only_where_its_tokens_stay(monkeypatch):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    text = TEXT.replace("\r", "") * 4
    monkeypatch.setattr(tokenizer, "CUT", 500)
    for splitter, few in ((pre_tokenizers.Whitespace(), False), (pre_tokenizers.Metaspace(prepend_scheme="always"), False), (None, True)):
        model = Tokenizer(models.BPE(unk_token="?"))
        if splitter is not None:
            model.pre_tokenizer = splitter
        model.decoder = decoders.BPEDecoder()
        model.train_from_iterator([text], trainers.BpeTrainer(vocab_size=400, special_tokens=["?"], show_progress=False))
        pretrained = tokenizer.PretrainedTokenizer(model.to_str())
        monkeypatch.setattr(tokenizer, "UNCUT", 1 << 23)
        pieces = [text[i : i + 700] for i in range(0, len(text), 700)]
        expected = model.encode(text, add_special_tokens=False).ids
        assert [ids.tolist() for ids in pretrained.encode_pieces(pieces)] == [expected]
        monkeypatch.setattr(tokenizer, "UNCUT", 100)
        assert np.concatenate(list(pretrained.encode_pieces(pieces))).tolist() == expected
        assert (len(list(pretrained._cut(pieces))) < 10) == few
