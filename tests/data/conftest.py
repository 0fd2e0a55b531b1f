"""Small corpora for the data tests; the real ones come through pip into the user's cache, once."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

LINES = [f"Line {i}: the quick brown fox jumps over {i * 7919 % 1000} lazy dogs;\n" for i in range(400)]


@pytest.fixture(scope="session")
def data_cache() -> Path:
    return Path(os.environ.get("MESHFORMER_DATA", "~/.cache/meshformer")).expanduser()


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "lines.txt"
    path.write_text("".join(LINES), encoding="utf-8")
    return path
