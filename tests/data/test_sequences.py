"""Claims about labelled texts as batches: padding, order by length, packing, tags, pairs, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from meshformer.config.errors import ConfigError
from meshformer.data import CsvTexts, HubTexts, Sentiment, SequenceData, load_tokenizer
from meshformer.data.labelled import Examples
from meshformer.data.objectives import PADDING, packed
from meshformer.data.windows import IGNORED, GlobalBatchSampler

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wizards", "box"]


class Given:
    """A source of what the test gives."""

    def __init__(self, **lists: Any) -> None:
        self.given = Examples(**lists)

    def examples(self) -> Examples:
        return self.given

    def identity(self) -> dict[str, Any]:
        return {"given": repr(self.given)}


def source(n: int = 120, held_out: int = 20, **more: Any) -> Given:
    texts = [" ".join(WORDS[(i * k) % len(WORDS)] for k in range(1 + i * 7 % 9)) for i in range(n)]
    labels = [("even", "odd")[len(text.split()) % 2] for text in texts]
    return Given(texts=texts, splits=["val"] * held_out + ["train"] * (n - held_out), **({"labels": labels} | more))


@pytest.fixture
def build(tmp_path: Path):
    def build(given: Any, objective: str = "label", **changes: Any) -> SequenceData:
        settings = {"batch_size": 10, "context_length": 64, "tokenizer": "char", "vocab_size": 0, "seed": 1, "cache": tmp_path}
        return SequenceData(given, objective, **(settings | changes))  # pyright: ignore[reportArgumentType]

    return build


def texts_of(data: SequenceData, batch: dict[str, torch.Tensor]) -> list[str]:
    real = batch["documents"] != PADDING
    return [data.tokenizer.decode(row[own].tolist()) for row, own in zip(batch["tokens"], real, strict=True)]


def test_a_batch_holds_whole_texts_with_their_labels_and_no_more_padding_than_needed(build):
    given = source()
    data = build(given)
    label_of = dict(zip(given.given.texts, given.given.labels, strict=True))
    seen = []
    for (batch,) in data.train_dataloader():
        texts = texts_of(data, batch)
        assert [data.classes[k] for k in batch["labels"]] == [label_of[text] for text in texts]
        longest = max(map(len, texts))
        assert batch["tokens"].shape == (10, min(64, -(-longest // 16) * 16)) and bool((batch["documents"] <= 0).all())
        seen += texts
    cut = [text[:64] for text in given.given.texts[20:]]
    assert sorted(seen) == sorted(cut)


def test_batches_are_of_like_length_yet_random_and_reproducible(build):
    data = build(source(640, 40), batch_size=20)
    order = data.order()
    first, again, other = order.starts(0), data.order().starts(0), order.starts(1)
    assert np.array_equal(first, again) and not np.array_equal(first[:, 0], other[:, 0])
    assert len(set(first[:, 0])) == 600 and set(first[:, 2]).isdisjoint(other[:, 2])
    lengths = data._rows("train").lengths
    spread = np.ptp(lengths[first[:, 0]].reshape(-1, 20), axis=1).mean()
    assert spread < np.ptp(lengths) / 4
    means = lengths[first[:, 0]].reshape(-1, 20).mean(axis=1)
    assert not (np.diff(means) >= 0).all(), "batches come in random order, not from short to long"


def test_ranks_and_micro_batches_are_slices_of_the_same_steps_and_equally_wide(build):
    data = build(source())
    whole = list(GlobalBatchSampler(data.order(), 10))
    parts = [list(GlobalBatchSampler(data.order(), 10, data_rank=r, data_world=5)) for r in range(5)]
    for step, keys in enumerate(whole):
        together = np.concatenate([part[step] for part in parts])
        assert np.array_equal(together, keys) and len(set(keys[:, 1])) == 1
    resumed = list(GlobalBatchSampler(data.order(), 10, start_sample=40))
    assert all(np.array_equal(a, b) for a, b in zip(resumed, whole[4:], strict=True))


@pytest.mark.parametrize(("batch", "world"), [(7, 1), (3, 2), (20, 3)])
def test_evaluation_counts_every_text_once(build, batch, world):
    given = source()
    data = build(given)
    seen, ignored = [], 0
    for rank in range(world):
        batches = data.eval_batches("val", batch, rank, world)
        assert len(batches) == -(-20 // (batch * world))
        for i in range(len(batches)):
            kept = batches[i]["labels"] != IGNORED
            seen += [text for text, keep in zip(texts_of(data, batches[i]), kept, strict=True) if keep]
            ignored += int((~kept).sum())
    assert sorted(seen) == sorted(text[:64] for text in given.given.texts[:20])
    assert ignored == -(-20 // (batch * world)) * batch * world - 20


def test_packed_samples_keep_texts_apart_and_lose_none(build):
    given = source(labels=None)
    data = build(given, "next", packing=True, batch_size=4, context_length=48)
    found: list[str] = []
    for batch in data.eval_batches("train", 4, 0, 1):
        for tokens, documents, positions, targets in zip(*(batch[k] for k in ("tokens", "documents", "positions", "targets")), strict=True):
            for document in set(documents.tolist()) - {PADDING}:
                own = documents == document
                ids = tokens[own]
                found.append(data.tokenizer.decode(ids.tolist()))
                assert positions[own].tolist() == list(range(int(own.sum())))
                assert targets[own].tolist() == [*ids[1:].tolist(), IGNORED], "the end of a text predicts nothing"
            assert (targets[documents == PADDING] == IGNORED).all()
    pieces = [text[k : k + 48] for text in given.given.texts[20:] for k in range(0, len(text), 48)]
    assert sorted(found) == sorted(pieces)


def test_packing_fills_the_rows():
    lengths = np.random.default_rng(0).integers(1, 40, 500)
    rows = packed(lengths, 64)
    sums = [int(lengths[row].sum()) for row in rows]
    assert sorted(i for row in rows for i in row) == list(range(500)) and max(sums) <= 64
    assert len(rows) <= 1.02 * lengths.sum() / 64 + 1


def test_each_word_has_its_tag_at_its_last_token(build):
    given = Given(texts=["the cat sat", "a dog"] * 5, labels=["D N V", "D N"] * 5, splits=["train"] * 8 + ["val"] * 2)
    data = build(given, "tags", batch_size=8)
    batch = next(iter(data.train_dataloader()))[0]
    row = texts_of(data, batch).index("the cat sat")
    marks = {k: data.classes[v] for k, v in enumerate(batch["targets"][row].tolist()) if v != IGNORED}
    assert marks == {2: "D", 6: "N", 10: "V"}
    with pytest.raises(ConfigError, match=r"example 2 has 2 words and 1 tags"):
        build(Given(texts=["the cat", "a dog"], labels=["D N", "D"], splits=["train", "val"]), "tags").prepare_data()


def test_a_text_that_is_cut_keeps_its_end_mark_and_its_tags_their_words(build, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: i for i, word in enumerate([*WORDS, "[CLS]", "[SEP]"])}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[SEP]"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    marks = [(mark, vocabulary[mark]) for mark in ("[CLS]", "[SEP]")]
    library.post_processor = tokenizers.processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    library.save(str(tmp_path / "tokenizer.json"))
    fixed, splits = load_tokenizer(tmp_path / "tokenizer.json"), ["train"] * 2 + ["val"]
    labelled = Given(texts=["the quick brown fox"] * 3, labels=["a", "b", "a"], splits=splits)
    (batch,) = next(iter(build(labelled, batch_size=1, context_length=4, fixed_tokenizer=fixed).train_dataloader()))
    assert batch["tokens"].tolist() == [[vocabulary[word] for word in ("[CLS]", "the", "quick", "[SEP]")]]
    tagged = Given(texts=["the quick brown fox"] * 3, labels=["D A A N"] * 3, splits=splits)
    (batch,) = next(iter(build(tagged, "tags", batch_size=1, context_length=3, fixed_tokenizer=fixed).train_dataloader()))
    assert batch["tokens"].tolist() == [[vocabulary[word] for word in ("the", "quick", "brown")]]
    assert batch["targets"].tolist() == [[1, 0, 0]]  # of the classes A, D, N


def test_texts_with_labels_are_not_packed(build):
    with pytest.raises(ConfigError, match=r"data\.packing=true: objective=label needs each text in a row of its own"):
        build(source(), packing=True)


def test_pairs_lie_side_by_side(build):
    texts = [f"{word} one" for word in WORDS]
    given = Given(texts=texts, partners=[f"{word} two" for word in WORDS], splits=["train"] * 10 + ["val"] * 3)
    data = build(given, "pairs", batch_size=5)
    rows = texts_of(data, next(iter(data.train_dataloader()))[0])
    assert len(rows) == 10 and all(a.replace("one", "two") == b for a, b in zip(rows[::2], rows[1::2], strict=True))


def test_hidden_tokens_depend_on_the_sample_alone(build):
    data = build(source(labels=None), "mask", batch_size=20)
    (whole,) = [batch for (batch,), _ in zip(data.train_dataloader(), range(1), strict=False)]
    halves = []
    for rank in range(2):
        keys = next(iter(GlobalBatchSampler(data.order(), 20, data_rank=rank, data_world=2)))
        halves.append(data.training_set().__getitems__(keys))
    for name in ("tokens", "targets"):
        assert torch.equal(torch.cat([half[name] for half in halves]), whole[name])
    short = np.array([int(data.training_set().lengths.argmin())])
    wide, narrow = (data.training_set().read(short, width, [17]) for width in (64, 48))
    assert torch.equal(wide["tokens"][:, :48], narrow["tokens"])


def test_a_seventh_is_hidden_eighty_ten_ten(build):
    data = build(Given(texts=["abcdefghij" * 6] * 300, splits=["train"] * 299 + ["val"]), "mask", batch_size=299)
    batch = next(iter(data.train_dataloader()))[0]
    original = data.tokenizer.encode("abcdefghij" * 6)
    hidden = batch["targets"] != IGNORED
    assert torch.equal(batch["targets"][hidden], torch.from_numpy(original.astype(np.int64)).expand(299, -1)[hidden[:, :60]])
    assert abs(hidden[:, :60].float().mean() - 0.15) < 0.01
    tokens = batch["tokens"][hidden]
    mask = tokens == data.tokenizer.mask_id
    same = tokens == batch["targets"][hidden]
    assert abs(mask.float().mean() - 0.8) < 0.03
    assert abs(same.float().mean() - 0.11) < 0.03  # of those that became a random token, a tenth is the same by chance
    assert not hidden[:, 60:].any(), "padding is never guessed"


@pytest.mark.parametrize(
    ("rows", "changes", "told"),
    [
        ("text,label\n", {}, "holds no rows below a header line"),
        ("", {}, "is empty"),
        ("words,label\nhi,a\n", {}, "Use one of its columns: words, label"),
        ("text,mood\nhi,a\n", {}, "data.label_column=label: a.csv has no such column"),
        ("text,label\nhi,a\nho,\n", {}, "row 3 of a.csv has nothing in column label"),
        ("text,label\n" + "hi,a\n" * 9, {}, "only one class, a"),
        ("text,label\n" + "hi,a\nho,b\n" * 9, {"classes": ["b", "c"]}, "has the label a, which is none of the classes given (b, c)"),
        ("text\n" + "hi\n" * 9, {"label_column": None}, "the data has none"),
        ("text,label\nhi,a\n", {}, "no example is left to validate on"),
    ],
)
def test_a_table_that_does_not_serve_is_refused_in_one_sentence(build, tmp_path, rows, changes, told):
    (tmp_path / "a.csv").write_text(rows)
    given = CsvTexts(str(tmp_path / "a.csv"), label_column=changes.pop("label_column", "label"))
    with pytest.raises(ConfigError) as caught:
        build(given, **changes).prepare_data()
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_a_label_that_training_never_saw_is_named_with_its_row(build, tmp_path):
    (tmp_path / "a.csv").write_text("text,label\nhi,2\nho,10\n")
    (tmp_path / "b.csv").write_text("text,label\nhi,2\nho,7\n")
    given = CsvTexts(str(tmp_path / "a.csv"), label_column="label", validation_file=str(tmp_path / "b.csv"))
    with pytest.raises(ConfigError, match=r"row 3 of .*b.csv has the label 7, which is none of those of the training part \(2, 10\)"):
        build(given).prepare_data()


def test_quoted_cells_tabs_and_bytes_that_are_no_utf8(build, tmp_path):
    (tmp_path / "a.csv").write_text('text,label\n"one, ""two""\nthree",a\nfour,b\n' * 5)
    assert CsvTexts(str(tmp_path / "a.csv"), label_column="label").examples().texts[0] == 'one, "two"\nthree'
    (tmp_path / "a.tsv").write_text("text\tlabel\none, two\ta\n")
    assert CsvTexts(str(tmp_path / "a.tsv"), label_column="label").examples().texts == ["one, two"]
    (tmp_path / "b.csv").write_bytes("text,label\ncafé,a\n".encode("latin1"))
    with pytest.raises(ConfigError, match="not UTF-8: byte 0xe9 at offset 14"):
        CsvTexts(str(tmp_path / "b.csv"), label_column="label").examples()


def test_the_sentiment_snippets_are_those_of_the_paper(data_cache):
    found = Sentiment(data_cache).examples()
    assert found.labels is not None
    assert (len(found.texts), found.splits.count("val")) == (10568, 2114)
    assert found.texts[2] == "Effective but too tepid biopic" and found.labels[2] == "negative"
    assert found.labels.count("positive") == 5242
    assert len(Sentiment(data_cache, "nyt").examples().texts) == 4946


def test_a_data_set_of_the_hub_gives_its_classes_by_name(build, tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])})
    rows = {"text": ["fine", "poor", "great", "awful", "nice"] * 2, "label": [1, 0, 1, 0, 1] * 2}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "set"))
    data = build(HubTexts(str(tmp_path / "set")), batch_size=8)
    assert data.classes == ["bad", "good"]
    batch = next(iter(data.train_dataloader()))[0]
    good = {text for text, label in zip(texts_of(data, batch), batch["labels"].tolist(), strict=True) if label == 1}
    assert good <= {"fine", "great", "nice"}
    with pytest.raises(ConfigError, match="no such column"):
        build(HubTexts(str(tmp_path / "set"), label_column="mood")).prepare_data()
