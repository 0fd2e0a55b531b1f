"""Claims about the corpora: the real ones hold what DATA promises, the user's files fail in words."""

import importlib.util
import sys
from pathlib import Path

import pytest

from meshformer.config.errors import ConfigError
from meshformer.data import CharTokenizer, HubText, KingJames, Shakespeare, TextFiles


def test_shakespeare_is_42_files_and_84_characters(data_cache):
    files = Shakespeare(data_cache).files()
    text = Shakespeare(data_cache).text()
    assert len(files) == 42 and list(files) == sorted(files)
    assert len(text) == 5_057_198 and len(set(text)) == 84
    assert text == "".join(files.values()) and text.startswith("ALL'S WELL THAT ENDS WELL")


def test_king_james_is_31103_verses_that_a_shakespeare_tokenizer_knows(data_cache):
    bible = KingJames(data_cache)
    assert len(bible.verses()) == 31_103
    text = bible.text()
    assert len(text) == 4_137_451 and text.startswith("In the beginning God created the heaven and the earth.\nAnd the earth")
    shakespeare = CharTokenizer.train(Shakespeare(data_cache).text())
    assert shakespeare.vocab_size == 84
    assert shakespeare.decode(shakespeare.encode(text)) == text


def test_files_are_joined_in_the_order_given(tmp_path):
    for name, text in {"b": "one\r\n", "a": "\ufefftwo\n"}.items():
        (tmp_path / f"{name}.txt").write_bytes(text.encode())
    assert TextFiles([str(tmp_path / "b.txt"), str(tmp_path / "a.txt")]).text() == "one\ntwo\n"
    assert TextFiles(str(tmp_path / "*.txt")).text() == "two\none\n"


def test_identity_is_the_content(tmp_path):
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("same")
    second.write_text("same")
    assert TextFiles([str(first)]).identity() == TextFiles([str(second)]).identity()
    second.write_text("edit")
    assert TextFiles([str(first)]).identity() != TextFiles([str(second)]).identity()


def test_bad_files_are_named(tmp_path):
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9 au lait")
    cases = {
        str(latin): ["latin.txt", "0xe9", "offset 3"],
        str(tmp_path): ["is a folder", "*.txt"],
        str(tmp_path / "missing.txt"): ["no such file", "missing.txt"],
        str(tmp_path / "*.md"): ["no such file", "*.md"],
    }
    for file, words in cases.items():
        with pytest.raises(ConfigError) as caught:
            TextFiles([file]).text()
        assert all(word in str(caught.value) for word in ["data.files", *words]), str(caught.value)
    with pytest.raises(ConfigError, match="no file"):
        TextFiles([])


def test_hub_without_its_extra_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'meshformer\[hub\]'"):
        HubText("anything").text()


needs_datasets = pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="the hub extra is not installed")


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of data files, and a `datasets` that keeps its own cache there and asks no hub."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"line": "To be", "n": 1}\n{"line": "or not", "n": 2}\n')
    return folder


@needs_datasets
def test_hub_reads_a_local_folder(offline):
    source = HubText(str(offline), column="line")
    assert source.text() == "To be\nor not"
    assert source.identity() == HubText(str(offline), column="line").identity()


@needs_datasets
def test_hub_reads_a_saved_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["a", "b"]})
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "many"))
    assert HubText(str(tmp_path / "one")).text() == HubText(str(tmp_path / "many")).text() == "a\nb"


@needs_datasets
@pytest.mark.parametrize(
    "change, words",
    [
        ({"column": "text"}, ["data.source.column=text", "line, n"]),
        ({"column": "n"}, ["text only"]),
        ({"column": "line", "split": "dev"}, ["'dev'", "data.source.path"]),
    ],
)
def test_hub_mistakes_are_named(offline, change, words):
    with pytest.raises(ConfigError) as caught:
        HubText(str(offline), **change).text()
    assert all(word in str(caught.value) for word in words), str(caught.value)


@needs_datasets
def test_hub_folder_that_is_missing_is_named(offline):
    with pytest.raises(ConfigError, match=r"data\.source\.path"):
        HubText(str(offline / "nothing")).text()
