import json
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from meshformer.record import RunRecord, read_run
from meshformer.record import run_json as module


def test_a_run_from_start_to_finish(tmp_path):
    record = RunRecord(tmp_path)
    record.start(device={"name": "cpu", "threads": 2}, layout={"strategy": "single"}, seed=7)
    running = read_run(tmp_path)
    assert running["state"] == "running" and running["ended"] is None and running["seed"] == 7
    assert running["versions"]["torch"].startswith("2.")
    record.update(parameters=1234)
    record.finish("finished", **{"val/loss": 1.5})
    done = read_run(tmp_path)
    assert done["state"] == "finished" and done["parameters"] == 1234 and done["final"] == {"val/loss": 1.5}
    assert datetime.fromisoformat(done["started"]) <= datetime.fromisoformat(done["ended"])
    assert datetime.fromisoformat(done["ended"]).tzinfo is not None
    assert done["device"] == {"name": "cpu", "threads": 2} and done["layout"] == {"strategy": "single"} and done["error"] is None


def test_resume_keeps_the_earlier_segment(tmp_path):
    first = RunRecord(tmp_path)
    first.start(device="cpu")
    first.finish("preempted")
    RunRecord(tmp_path).start(device="gpu")
    fields = read_run(tmp_path)
    assert fields["state"] == "running" and fields["device"] == "gpu"
    assert [(s["state"], s["device"]) for s in fields["segments"]] == [("preempted", "cpu")]


def test_failure_records_its_error(tmp_path):
    record = RunRecord(tmp_path)
    record.start()
    record.finish("failed", ZeroDivisionError("division by zero"))
    assert read_run(tmp_path)["error"] == {"type": "ZeroDivisionError", "message": "division by zero"}


@pytest.mark.parametrize("state", ["running", "done"])
def test_only_ending_states_end_a_run(tmp_path, state):
    record = RunRecord(tmp_path)
    record.start()
    with pytest.raises(ValueError, match="does not end a run"):
        record.finish(state)
    with pytest.raises(ValueError, match="state"):
        record.update(state="finished")


def test_numbers_json_lacks_still_make_valid_json(tmp_path):
    class Scalar:  # what a NumPy or torch scalar looks like
        def item(self):
            return float("inf")

    record = RunRecord(tmp_path)
    record.start(folder=Path("a/b"))
    record.finish("finished", loss=float("nan"), norm=Scalar())

    def refuse(constant):
        raise AssertionError(constant)

    fields = json.loads((tmp_path / "run.json").read_text(), parse_constant=refuse)
    assert fields["final"] == {"loss": "nan", "norm": "inf"} and fields["folder"] == "a/b"


def test_nothing_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HUB_TOKEN", "hunter2")
    monkeypatch.setenv("USER", "somebody-known")
    RunRecord(tmp_path).start()
    text = (tmp_path / "run.json").read_text()
    assert "hunter2" not in text and "somebody-known" not in text


def test_git_state_of_a_checkout_a_change_and_an_untracked_copy(tmp_path, monkeypatch):
    source = tmp_path / "code.py"
    source.write_text("x = 1\n")

    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
        return subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("add", "code.py")
    git("commit", "-q", "-m", "one")
    monkeypatch.setattr(module, "SOURCE", tmp_path / "untracked.py")
    (tmp_path / "untracked.py").write_text("")
    assert module.git_state() is None, "as in a virtual environment inside a repository"
    monkeypatch.setattr(module, "SOURCE", source)
    # A hook's GIT_DIR must not divert the question to another repository.
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    commit = (tmp_path / ".git" / "refs" / "heads").glob("*").__next__().read_text().strip()
    assert module.git_state() == {"commit": commit, "dirty": False}
    source.write_text("x = 2\n")
    assert module.git_state() == {"commit": commit, "dirty": True}


def test_record_room_loads_no_torch():
    code = "import sys, meshformer.record as r; r.RunRecord; print('torch' in sys.modules or 'numpy' in sys.modules)"
    source = str(Path(module.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {source!r}); {code}"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("content", ["", '{"sta', "[]"])
def test_a_damaged_record_does_not_keep_a_run_from_going_on(content, tmp_path):
    (tmp_path / "run.json").write_text(content)
    record = RunRecord(tmp_path)
    record.start()
    assert read_run(tmp_path)["state"] == "running" and read_run(tmp_path)["segments"][0]["state"] == "unknown"
