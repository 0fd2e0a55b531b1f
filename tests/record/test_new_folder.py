"""A folder that appears whole or not at all, and takes nothing from anybody."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshformer.record.run_folder import new_folder


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    mine = tmp_path / "a.tmp"  # a name that programs like to use
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    with pytest.raises(RuntimeError), new_folder(tmp_path / "a") as inside:
        (inside / "half").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == [mine]
    with new_folder(tmp_path / "in" / "a") as inside:
        (inside / "whole").write_text("whole")
        assert not (tmp_path / "in" / "a").exists()
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["a"] and (tmp_path / "in" / "a" / "whole").read_text() == "whole"
    assert (mine / "notes.txt").read_text() == "mine" and (tmp_path / "in" / "a").stat().st_mode & 0o044
