"""A table in which a cell could belong to two columns is refused, with its row; a long text is not."""

import pytest

from meshformer.config.errors import ConfigError
from meshformer.data.labelled import CsvTexts


def examples(folder, text, name="a.csv"):
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return CsvTexts(str(file), label_column="label", validation_fraction=0.5).examples()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("text,label\ngood,yes\nwell, good,yes\n", ["row 3 has 3 cells, and the header 2", "a comma", '"a, b"']),
        ("label,text\nyes,good\nno,bad, really bad\n", ["row 3 has 3 cells"]),
        ("text,label\ngood,yes\nbad\n", ["row 3 has 1 cells, and the header 2"]),
        ('text,label\ngood,yes\n"bad,no\nworse,no\n', ["line 3", "not closed"]),
        ('text,label\ngood,yes\n"bad" news,no\n', ["line 3", 'as ""']),
        ("text;label\ngood;yes\n", ["separated by semicolons", "commas"]),
        ("text\tlabel\ngood\tyes\n", ["separated by tabs", "a.tsv"]),
        ("text,label,label\ngood,yes,no\n", ["two columns are called label"]),
    ],
)
def test_an_ambiguous_table_is_refused_with_its_row(text, words, tmp_path):
    with pytest.raises(ConfigError) as error:
        examples(tmp_path, text)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_tab_too_many_is_told_as_a_tab(tmp_path):
    with pytest.raises(ConfigError, match="row 2 has 3 cells, and the header 2: a text may hold a tab"):
        examples(tmp_path, "text\tlabel\nwell\tgood\tyes\n", "a.tsv")


def test_long_texts_quoted_commas_and_empty_lines_are_read(tmp_path):
    long = "word " * 40_000
    found = examples(tmp_path, f'text,label\n"{long}",yes\n\n"well, good",no\n"a ""quoted""\nline",no\n')
    assert found.texts == [long.strip(), "well, good", 'a "quoted"\nline'] and found.labels == ["yes", "no", "no"]
