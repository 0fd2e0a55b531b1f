"""Claims about prepared data: the split, the cache key, the race of a grid's jobs, and errors."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from meshformer.config.errors import ConfigError
from meshformer.data import CharTokenizer, Shakespeare, TextFiles, prepare
from meshformer.data.tokenizer import BpeTokenizer


class Words:
    """A corpus in memory that counts how often its text is asked for."""

    def __init__(self, text: str) -> None:
        self.content, self.reads = text, 0

    def text(self) -> str:
        self.reads += 1
        return self.content

    def identity(self) -> dict[str, str]:
        return {"words": self.content}


def char(source, cache, **settings):
    return prepare(source, tokenizer="char", vocab_size=0, cache=cache, **settings)


def test_shakespeare_splits_90_5_5_by_characters(data_cache):
    text = Shakespeare(data_cache).text()
    prepared = char(Shakespeare(data_cache), data_cache)
    assert prepared.tokenizer.vocab_size == 84
    assert [len(prepared.tokens(split)) for split in ("train", "val", "test")] == [4_551_478, 252_860, 252_860]
    assert prepared.tokenizer.decode(prepared.tokens("val")) == text[4_551_478:4_804_338]
    assert prepared.bytes_per_token("val") == 1.0


def test_splits_join_to_the_text_and_characters_come_from_all_of_it(tmp_path):
    text = "abcdefghij" * 10 + "é" + "xyz"  # é and xyz occur in the test part alone
    prepared = char(Words(text), tmp_path)
    assert "".join(prepared.tokenizer.decode(prepared.tokens(split)) for split in ("train", "val", "test")) == text
    assert prepared.text_bytes == {"train": 93, "val": 5, "test": 7}
    assert isinstance(prepared.tokens("train"), np.memmap) and not prepared.tokens("train").flags.writeable


def test_bpe_learns_from_the_training_part_alone(tmp_path):
    source = Words("ab " * 300 + "zq " * 30)
    prepared = prepare(source, tokenizer="bpe", vocab_size=260, cache=tmp_path)
    vocabulary = prepared.tokenizer.to_json()
    assert "ab" in vocabulary and "zq" not in vocabulary
    assert prepared.bytes_per_token("val") == pytest.approx(prepared.text_bytes["val"] / len(prepared.tokens("val")))


def test_the_second_call_reads_the_cache(tmp_path):
    source = Words("abcdefghij" * 10)
    assert char(source, tmp_path).folder == char(source, tmp_path).folder
    assert source.reads == 1


def test_every_setting_that_changes_the_tokens_changes_the_folder(tmp_path):
    text = "abcdefghij?" * 100
    wide, narrow = CharTokenizer.train(text + "z"), CharTokenizer.train("abc?")
    prepared = [
        char(Words(text), tmp_path),
        char(Words(text + "a"), tmp_path),
        prepare(Words(text), tokenizer="bpe", vocab_size=256, cache=tmp_path),
        prepare(Words(text), tokenizer="bpe", vocab_size=257, cache=tmp_path),
        char(Words(text), tmp_path, fixed_tokenizer=wide),
        char(Words(text), tmp_path, fixed_tokenizer=narrow, unknown="replace"),
    ]
    assert len({each.identity for each in prepared}) == len(prepared)
    # and one that does not change them does not
    assert prepare(Words(text), tokenizer="char", vocab_size=512, cache=tmp_path).identity == prepared[0].identity


def test_a_fixed_tokenizer_keeps_its_ids(tmp_path):
    known = CharTokenizer.train("0123abcdefghij?")
    prepared = char(Words("abcdefghij" * 10), tmp_path, fixed_tokenizer=known)
    assert prepared.tokenizer.to_json() == known.to_json()
    assert prepared.tokens("train")[:3].tolist() == known.encode("abc").tolist()
    with pytest.raises(ConfigError, match="'é'"):
        char(Words("abcé" * 25), tmp_path, fixed_tokenizer=known)
    replaced = char(Words("abcé" * 25), tmp_path, fixed_tokenizer=known, unknown="replace")
    assert known.decode(replaced.tokens("train")[:4]) == "abc?"
    with pytest.raises(ConfigError, match="'é'"):  # still, though there is a folder with the replaced text now
        char(Words("abcé" * 25), tmp_path, fixed_tokenizer=known)


def test_threads_racing_build_once(tmp_path):
    source = Words("abcdefghij" * 10_000)
    with ThreadPoolExecutor(4) as pool:
        folders = {each.folder for each in pool.map(lambda _: char(source, tmp_path), range(8))}
    assert len(folders) == 1 and source.reads == 1


def test_processes_racing_share_one_complete_folder(tmp_path, text_file):
    script = (
        "import sys; from meshformer.data import TextFiles, prepare\n"
        "p = prepare(TextFiles([sys.argv[1]]), tokenizer='bpe', vocab_size=400, cache=sys.argv[2])\n"
        "assert 'torch' not in sys.modules\n"
        "print(p.folder, len(p.tokens('train')), p.tokenizer.vocab_size)"
    )
    command = [sys.executable, "-c", script, str(text_file), str(tmp_path / "cache")]
    jobs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    answers = [job.communicate(timeout=60) for job in jobs]
    assert all(job.returncode == 0 for job in jobs), answers
    assert len({out for out, _ in answers}) == 1
    assert [str(p) for p in (tmp_path / "cache" / "prepared").iterdir() if p.is_dir()] == [answers[0][0].split()[0]]


def test_a_failed_or_killed_build_leaves_nothing_in_the_way(tmp_path, monkeypatch):
    source = Words("abcdefghij" * 10)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(CharTokenizer, "save", lambda *_: (_ for _ in ()).throw(RuntimeError("pulled the plug")))
        char(source, tmp_path)
    assert not [p for p in (tmp_path / "prepared").iterdir() if p.is_dir()]
    prepared = char(source, tmp_path)
    prepared.folder.rename(leftover := prepared.folder.with_name(f".{prepared.folder.name}-left"))  # as a killed process leaves it
    char(source, tmp_path)
    assert not leftover.exists()


@pytest.mark.parametrize("text, words", [("", "empty"), ("a" * 30, "30 characters are too few")])
def test_too_little_text_is_refused(tmp_path, text, words):
    with pytest.raises(ConfigError, match=words):
        char(Words(text), tmp_path)
    assert char(Words("a" * 40), tmp_path).tokens("test").shape == (2,)


def test_an_unknown_tokenizer_and_an_unwritable_cache_are_named(tmp_path, text_file):
    with pytest.raises(ConfigError, match=r"data\.tokenizer=word"):
        prepare(TextFiles([str(text_file)]), tokenizer="word", vocab_size=0, cache=tmp_path)
    with pytest.raises(ConfigError, match=r"paths\.data"):
        char(TextFiles([str(text_file)]), text_file)


def test_bpe_of_real_text_round_trips(data_cache):
    prepared = prepare(Shakespeare(data_cache), tokenizer="bpe", vocab_size=1024, cache=data_cache)
    text = Shakespeare(data_cache).text()
    assert isinstance(prepared.tokenizer, BpeTokenizer) and prepared.tokenizer.vocab_size == 1024
    assert prepared.tokenizer.decode(prepared.tokens("test")) == text[len(text) * 95 // 100 :]
