"""Claims about tokenizers: exact round trips, saved with nothing else needed, unknown characters named."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshformer.config.errors import ConfigError
from meshformer.data import BpeTokenizer, CharTokenizer, load_tokenizer
from meshformer.data.tokenizer import _pieces

SAMPLE = "To be, or not to be: that is the question.\n\n  Ätherisch – 文字 🙂\n" * 30


@pytest.fixture(scope="module")
def bpe() -> BpeTokenizer:
    return BpeTokenizer.train(SAMPLE, 300)


def test_char_ids_are_code_point_order():
    tokenizer = CharTokenizer.train("banana é🙂")
    assert tokenizer.characters == " abné🙂" and tokenizer.vocab_size == 6
    ids = tokenizer.encode("nab🙂")
    assert ids.tolist() == [3, 1, 2, 5] and ids.dtype == np.uint16
    assert tokenizer.decode(ids) == "nab🙂" and tokenizer.encode("").shape == (0,)


def test_char_names_what_it_does_not_know(caplog):
    tokenizer = CharTokenizer.train("abc?")
    with pytest.raises(ConfigError, match=r"tokenizer's 4: '\U0001f642' \(2 times\), 'é' \(1 times\).*tokenizer=bpe"):
        tokenizer.encode("ab🙂é🙂")
    assert tokenizer.decode(tokenizer.encode("ab🙂", unknown="replace")) == "ab?"
    assert "'\U0001f642' (1 times); each becomes '?'" in caplog.text
    assert CharTokenizer("xy").encode("yz", unknown="replace").tolist() == [1, 0]
    with pytest.raises(ConfigError):
        tokenizer.encode("a\udce9")  # a byte that the terminal's encoding could not read


def test_more_than_65536_entries_need_wider_ids():
    tokenizer = CharTokenizer("".join(chr(i) for i in range(0x10000, 0x10000 + 65_537)))
    last = tokenizer.characters[-1]
    assert tokenizer.encode(last).dtype == np.uint32 and tokenizer.decode(tokenizer.encode(last)) == last


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_bpe_round_trips_any_text(bpe, text):
    assert bpe.decode(bpe.encode(text)) == text


def test_bpe_merges_and_counts(bpe):
    assert bpe.vocab_size == 300 and len(bpe.encode(SAMPLE)) < 0.8 * len(SAMPLE.encode())
    assert bpe.encode("").shape == (0,) and bpe.encode("a").dtype == np.uint16
    assert bpe.decode(bpe.encode("a\udce9")) == "a?"
    with pytest.raises(ConfigError, match=r"data\.vocab_size=255"):
        BpeTokenizer.train(SAMPLE, 255)


def test_bpe_in_pieces_gives_the_tokens_of_the_whole(bpe):
    text = SAMPLE * 3 + " tail   "
    pieces = list(_pieces(text, size=50))
    assert len(pieces) > 50 and "".join(pieces) == text
    assert np.concatenate([bpe.encode(piece) for piece in pieces]).tolist() == bpe.encode(text).tolist()


def test_saved_tokenizers_load_equal(tmp_path, bpe):
    for tokenizer in (CharTokenizer.train(SAMPLE), bpe):
        tokenizer.save(tmp_path / "tokenizer.json")
        loaded = load_tokenizer(tmp_path / "tokenizer.json")
        assert type(loaded) is type(tokenizer) and loaded.to_json() == tokenizer.to_json()
        assert loaded.encode(SAMPLE).tolist() == tokenizer.encode(SAMPLE).tolist()


NOT_TOKENIZERS = [None, "", "[]", '{"kind": "word"}', '{"kind": "bpe", "model": {}}', '{"kind": "char", "characters": "aa"}']


@pytest.mark.parametrize("content", NOT_TOKENIZERS)
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        load_tokenizer(path)
