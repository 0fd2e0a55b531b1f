import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from meshformer.record import RunNotFound, atomic_write_text, find_run, new_run_folder


def a_run(runs, name):
    folder = runs / name
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    return folder


def test_new_folder_has_stamp_and_suffix(tmp_path):
    folder = new_run_folder(tmp_path / "runs", "char")
    assert folder.parent == tmp_path / "runs" / "char"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d-[0-9a-f]{4}", folder.name)


def test_jobs_that_start_together_get_folders_of_their_own(tmp_path, monkeypatch):
    # Only three suffixes exist, so that jobs collide and must try again.
    suffixes = iter(["aaaa"] * 3 + ["bbbb", "aaaa", "bbbb", "cccc"])
    monkeypatch.setattr("meshformer.record.run_folder.secrets.token_hex", lambda n: next(suffixes))
    monkeypatch.setattr("meshformer.record.run_folder.STAMP", "2026-01-01_00-00-00")
    names = {new_run_folder(tmp_path, "char").name[-4:] for _ in range(3)}
    assert names == {"aaaa", "bbbb", "cccc"}


def test_many_threads_never_share_a_folder(tmp_path):
    with ThreadPoolExecutor(16) as pool:
        folders = list(pool.map(lambda _: new_run_folder(tmp_path, "char"), range(64)))
    assert len(set(folders)) == 64


@pytest.mark.parametrize("experiment", ["", "../away", "/tmp/away"])
def test_experiment_that_leaves_runs_is_refused(tmp_path, experiment):
    with pytest.raises(ValueError, match="cannot name a folder"):
        new_run_folder(tmp_path, experiment)


def test_find_by_folder_last_and_suffix(tmp_path):
    older = a_run(tmp_path, "char/2026-01-02_10-00-00-aa3f")
    newer = a_run(tmp_path, "bpe/2026-01-02_10-00-05-00ff")
    # A later touch of the older run (an evaluation) does not make it the last one started.
    os.utime(older / "run.json", (2e9, 2e9))
    assert find_run(older, tmp_path) == older
    assert find_run(f"{newer}/", "nowhere") == newer
    assert find_run("last", tmp_path) == newer
    assert find_run("aa3f", tmp_path) == older
    assert find_run("char/2026-01-02_10-00-00-aa3f", tmp_path) == older


def test_whole_suffix_wins_over_a_mere_ending(tmp_path):
    a_run(tmp_path, "char/named-by-hand-xxab12")
    exact = a_run(tmp_path, "char/2026-01-02_10-00-00-ab12")
    assert find_run("ab12", tmp_path) == exact


def test_ambiguous_ending_lists_the_runs(tmp_path):
    a_run(tmp_path, "char/2026-01-02_10-00-00-11aa")
    a_run(tmp_path, "bpe/2026-01-02_10-00-00-22aa")
    with pytest.raises(RunNotFound, match=r"means 2 runs: .*11aa.*22aa|means 2 runs: .*22aa.*11aa"):
        find_run("aa", tmp_path)


def test_unknown_run_suggests_close_names(tmp_path):
    a_run(tmp_path, "char/2026-01-02_10-00-00-11aa")
    with pytest.raises(RunNotFound, match=r"Did you mean char/2026-01-02_10-00-00-11aa\?"):
        find_run("2026-01-02_10-00-00-11ab", tmp_path)
    with pytest.raises(RunNotFound, match="The latest are char/2026-01-02_10-00-00-11aa"):
        find_run("zzzz", tmp_path)


def test_no_runs_and_a_folder_of_runs_say_so(tmp_path):
    with pytest.raises(RunNotFound, match="holds no run yet"):
        find_run("last", tmp_path / "runs")
    a_run(tmp_path, "char/2026-01-02_10-00-00-11aa")
    with pytest.raises(RunNotFound, match="is not a run but holds 1: "):
        find_run(tmp_path / "char", tmp_path)


def test_atomic_write_replaces_and_leaves_no_litter(tmp_path):
    path = tmp_path / "run.json"
    atomic_write_text(path, "old")
    atomic_write_text(path, "new ü")
    assert path.read_text(encoding="utf-8") == "new ü"
    assert os.listdir(tmp_path) == ["run.json"]


def test_failed_write_keeps_the_old_text(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    atomic_write_text(path, "old")

    def no_space(handle):
        raise OSError("no space left")

    monkeypatch.setattr("meshformer.record.run_folder.os.fsync", no_space)
    with pytest.raises(OSError, match="no space"):
        atomic_write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["run.json"]
