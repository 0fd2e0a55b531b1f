"""The pages for users of other trainers: every line of them that names settings of ours composes, with values that the schema takes."""

from __future__ import annotations

import re
import shlex

import pytest

from meshformer.command.compose import compose_config, make_hydra, plain
from meshformer.config import ConfigError, validate
from meshformer.huggingface.transformers_config import from_the_folder
from pages import ROOT

PAGES = [ROOT / "docs" / "guides" / name for name in ("coming_from.md", "tensorflow.md")]
RUNS = ("resume=",)  # name runs, of which there is none here
SIZES = ["model.n_layers=2", "model.n_heads=2", "model.d_model=32"]


def rows() -> list[str]:
    """Our side of the tables, without commands, which tests/test_docs.py runs."""
    tables = [table for page in PAGES for table in page.read_text(encoding="utf-8").split("| there | here |\n")[1:]]
    lines = [line for table in tables for line in table.partition("\n\n")[0].splitlines()]
    cells = [line.split(" | ")[-1].rstrip(" |") for line in lines]
    spans = [span for cell in cells for span in re.findall(r"`([^`]+)`", cell)]
    return [span for span in spans if not span.startswith(("meshformer", "hf ", *RUNS))]


def test_the_pages_have_lines_for_five_trainers() -> None:
    assert len(rows()) > 110


@pytest.mark.parametrize("row", rows())
def test_every_line_of_the_page_composes(row: str) -> None:
    words = shlex.split(row)
    many = "-m" in words
    words = [word for word in words if word != "-m"]
    first = [word.partition(",")[0] for word in words] if many else words
    extra = SIZES if "model=custom" in first and "model.n_layers=12" not in first else []
    extra = extra + (["model.config=x", "model.path=null"] if "model=transformers" in first and not any("model.path" in w for w in first) else [])
    validate(from_the_folder(plain(compose_config(make_hydra(), "train", [*first, *extra]))))


def test_a_key_that_is_not_ours_is_found() -> None:
    with pytest.raises(ConfigError, match="max_iters"):
        validate(plain(compose_config(make_hydra(), "train", ["+trainer.max_iters=3"])))
