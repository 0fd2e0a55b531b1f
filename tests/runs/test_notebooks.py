"""The notebooks are kept twice, as text and as ipynb: the same cells, no outputs. `make notebooks` runs them."""

from __future__ import annotations

from pathlib import Path

import jupytext
import pytest

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
NAMES = ("attention", "compare_runs", "layouts", "scaling", "speech")


@pytest.mark.parametrize("name", NAMES)
def test_text_and_ipynb_are_one_notebook_without_outputs(name):
    text, paired = jupytext.read(NOTEBOOKS / f"{name}.py"), jupytext.read(NOTEBOOKS / f"{name}.ipynb")
    assert [(c.cell_type, c.source) for c in text.cells] == [(c.cell_type, c.source) for c in paired.cells], "run `make pair`"
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in paired.cells)


def test_no_notebook_is_left_out():
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == sorted(NAMES) == sorted(path.stem for path in NOTEBOOKS.glob("*.py"))
