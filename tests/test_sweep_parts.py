"""The parts of a sweep by themselves: points, quoting, packing, the record, the table. No job is run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from jobs import TINY, run_tiny
from meshformer.cli import main
from meshformer.command.compose import compose
from meshformer.command.recorded import read_overrides
from meshformer.command.sweep import results
from meshformer.command.sweep.local import JobResult
from meshformer.command.sweep.points import differences
from meshformer.command.sweep.record import Point, SweepRecord
from meshformer.command.sweep.resources import Machine, Need
from meshformer.config import ConfigError


class FakeLauncher:
    """Takes jobs as the local launcher does; `outcomes` says how each ends. Whatever runs ends at the next wait."""

    outcomes: ClassVar[dict[int, Any]] = {}
    started: ClassVar[list[tuple[int, Any, Need]]] = []
    most = 0

    def __init__(self, machine: Machine, inherit: int, preload: list[str], warm: bool) -> None:
        self.machine, self.running, self.needs = machine, [], {}

    def reserve(self, number: int, need: Need) -> bool:
        share = self.machine.take(need)
        self.needs[number] = (need, share)
        return share is not None

    def release(self, number: int) -> None:
        self.machine.release(self.needs[number][1])

    def start(self, number: int, order: Any) -> None:
        self.running.append(number)
        FakeLauncher.most = max(FakeLauncher.most, len(self.running))
        FakeLauncher.started.append((number, order, self.needs[number][0]))

    def wait(self, seconds: float) -> list[JobResult]:
        number = self.running.pop(0)
        self.release(number)
        return [JobResult(number, self.outcomes.get(number, ("done", {"val/loss": 2.0 + number / 10})), 1.0)]

    def ask_to_stop(self) -> None: ...
    def kill(self) -> None: ...
    def close(self) -> None: ...


@pytest.fixture
def launched(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "HYDRA_FULL_ERROR"):
        monkeypatch.delenv(name, raising=False)
    FakeLauncher.outcomes, FakeLauncher.started, FakeLauncher.most = {}, [], 0
    monkeypatch.setattr("meshformer.command.sweep.run.LocalLauncher", FakeLauncher)
    return FakeLauncher


CORES = "hydra.launcher.cores=4"


def points(folder: str | Path) -> list[dict[str, Any]]:
    return json.loads((Path(folder) / "sweep.json").read_text())["points"]


def test_commas_spaces_and_quotes_arrive_as_they_were_typed(launched, tmp_path):
    odd = tmp_path / "a b, c"
    odd.mkdir()
    (odd / "it's.txt").write_text("some words")
    prompts = ['it\'s, "so" [x] {y}', "a=b, c\\"]
    quoted = ",".join("'" + prompt.replace("\\", "\\\\").replace("'", "\\'") + "'" for prompt in prompts)
    words = ["data=text", f'data.files=["{odd}/it\'s.txt"]', f"callbacks.samples.prompt={quoted}", "seed=3"]
    assert main(["train", "-m", *words, f"hydra.sweep.dir='{odd}/s w'", CORES]) == 0
    assert [order.config["callbacks"]["samples"]["prompt"] for _, order, _ in launched.started] == prompts
    for number, order, _ in launched.started:
        folder = odd / "s w" / str(number)
        assert Path(order.folder) == folder and order.config["data"]["files"] == [f"{odd}/it's.txt"]
        assert yaml.safe_load((folder / "config.yaml").read_text())["callbacks"]["samples"]["prompt"] == prompts[number]
        assert compose(read_overrides(folder)[0])["callbacks"] == order.config["callbacks"], "overrides.txt says the same"
    assert (odd / "s w" / "results.csv").read_text().count("\n") == 3
    launched.started.clear()
    assert main(["train", "-m", *words, f"sweep.resume={odd}/s w"]) == 0, "the same grid, quotes and all"
    assert main(["train", "-m", f"sweep.resume={odd}/s w"]) == 0
    assert launched.started == [], "nothing was left"


def test_cores_are_shared_out_and_never_oversubscribed(launched):
    assert main(["train", "-m", "strategy=single,ddp", "seed=1,2,3", CORES, "hydra.sweep.dir=s"]) == 0
    needs = [(need.processes, need.threads) for _, _, need in launched.started]
    assert sorted(needs) == [(1, 1)] * 3 + [(2, 1)] * 3
    assert launched.most == 3, "three single processes leave one core, on which no pair fits"
    assert all(order.config["trainer"]["threads"] == need.threads for _, order, need in launched.started)


def test_few_jobs_get_more_threads_each(launched):
    assert main(["train", "-m", "seed=1,2", CORES, "hydra.sweep.dir=s"]) == 0
    assert main(["train", "-m", "seed=1,2", CORES, "hydra.sweep.dir=t", "sweep.jobs=1"]) == 0
    assert main(["train", "-m", "seed=1,2", CORES, "hydra.sweep.dir=u", "trainer.threads=3"]) == 0
    assert [need.threads for _, _, need in launched.started] == [2, 2, 4, 4, 3, 3]


def test_gpus_are_named_and_given_back():
    machine = Machine(8, ["3", "5", "7"])
    two, one = Need(2, 1, gpu=True), Need(1, 1, gpu=True)
    first = machine.take(two)
    assert first is not None and first.gpus == ("3", "5") and machine.take(two) is None
    last = machine.take(one)
    assert last is not None and last.gpus == ("7",)
    machine.release(first)
    again = machine.take(two)
    assert again is not None and again.gpus == ("3", "5")
    assert machine.take(Need(2, 3, gpu=False)).cores == 6 and machine.take(Need(1, 3, gpu=False)) is None  # pyright: ignore[reportOptionalMemberAccess]
    assert Machine(2, []).take(Need(4, 1, gpu=False)).cores == 2, "more than there is: all of it"  # pyright: ignore[reportOptionalMemberAccess]


def test_with_fail_fast_the_rest_waits_for_a_resume(launched, capsys):
    launched.outcomes = {1: ("failed", "boom\nmore")}
    assert main(["train", "-m", "seed=1,2,3,4", CORES, "sweep.jobs=1", "sweep.fail_fast=true", "hydra.sweep.dir=s"]) == 1
    assert [point["state"] for point in points("s")] == ["done", "failed", "queued", "queued"]
    assert "sweep.resume=" in capsys.readouterr().out
    launched.outcomes = {}
    assert main(["train", "-m", "sweep.resume=s"]) == 1
    assert [point["state"] for point in points("s")] == ["done", "failed", "done", "done"]
    assert main(["train", "-m", "sweep.resume=s", "sweep.retry_failed=true"]) == 0
    assert [number for number, _, _ in launched.started] == [0, 1, 2, 3, 1]


@pytest.mark.parametrize("search", [[], ["sweep.search=random", "sweep.trials=3"]], ids=["grid", "search"])
def test_a_sweep_from_the_last_run_keeps_to_it(launched, tmp_path, search):
    """Also when it goes on later: its own points are runs too, and newer ones."""
    source = tmp_path / "other" / "text" / "source"
    source.parent.mkdir(parents=True)
    run_tiny(tmp_path, "other/text/source", "trainer.max_steps=2")
    words = [*TINY, f"data.files=[{tmp_path}/text.txt]", "paths.runs=other", "stage=finetune", "stage.init_from=last", *search]
    words.append("optimizer.lr=0.01,0.02,0.03")

    class Trains(FakeLauncher):
        def start(self, number: int, order: Any) -> None:
            super().start(number, order)
            if number not in self.outcomes:
                shutil.copytree(source, order.folder, dirs_exist_ok=True)
                record = Path(order.folder, "run.json")  # a run, newer than the source
                record.write_text(json.dumps({**json.loads(record.read_text()), "started": "2100-01-01T00:00:00+00:00"}))

    launched.outcomes = {} if search else {0: ("failed", "boom")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("meshformer.command.sweep.run.LocalLauncher", Trains)
        found = main(["train", "-m", *words, CORES, "sweep.jobs=1", "sweep.fail_fast=true", "hydra.sweep.dir=other/text/s"])
        assert found == (0 if search else 1)
        launched.outcomes = {}
        assert main(["train", "-m", "sweep.resume=other/text/s", *([] if search else ["sweep.retry_failed=true"])]) == 0
    assert {Path(order.config["stage"]["init_from"]) for _, order, _ in launched.started} == {source}
    assert len(launched.started) == (3 if search else 4), "every point, and the failed one once more"


def test_impossible_points_are_told_first_and_all_of_them_are_an_error(launched, capsys):
    assert main(["train", "-m", "model.n_heads=3,4", CORES, "hydra.sweep.dir=s"]) == 1
    assert [point["state"] for point in points("s")] == ["failed", "done"]
    assert "model.n_heads=3" in points("s")[0]["error"]
    for words in (["model.n_heads=3,5"], ["model.n_heads=4,3", "sweep.fail_fast=true"], ["seeds=1,2"], ["model=nano,nanoo", "seed=x"]):
        assert main(["train", "-m", *words, "hydra.sweep.dir=t"]) == 2
        assert not Path("t").exists()
    assert "Did you mean seed?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-m", "sweep.resume=nowhere"], "is not the folder of a sweep"),
        (["-m", "optimizer.lr=interval(0.1,1)"], "Add sweep.search=tpe"),
        (["-m", "sweep.search=tpe"], "nothing to choose"),
        (["-m", "sweep.search=tpo", "seed=1,2"], "one of tpe, random"),
        (["-m", "sweep.job=2", "seed=1,2"], "Did you mean"),
        (["-m", "sweep.retry_failed=true", "seed=1,2"], "Add sweep.resume=DIR"),
        (["-m", "sweep=pareto", "sweep.pruner=median"], "Use sweep.pruner=null"),
        (["-m", "sweep.pruner=median", "seed=1,2"], "Add sweep.search"),
        (["sweep.jobs=2"], "Add -m"),
    ],
)
def test_mistakes_are_told_in_a_sentence(launched, capsys, words, expected):
    assert main(["train", *words]) == 2
    assert expected in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_search_asks_optuna_and_tells_it(launched, capsys):
    optuna = pytest.importorskip("optuna")
    launched.outcomes = {1: ("failed", "boom")}
    words = ["sweep=search", "sweep.trials=4", "hydra.sweep.dir=s", CORES, "sweep.jobs=1"]
    assert main(["train", "-m", *words]) == 1
    assert "best trial" in capsys.readouterr().out
    study = optuna.load_study(study_name=None, storage="sqlite:///s/study.db")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    for (_, order, _), trial in zip(launched.started, study.trials, strict=True):
        assert set(trial.params) == {"optimizer.lr", "model.d_model", "schedule.warmup_steps", "model/position"}
        assert order.config["optimizer"]["lr"] == trial.params["optimizer.lr"]
        assert order.config["model"]["d_model"] == int(trial.params["model.d_model"])
        assert order.config["schedule"]["warmup_steps"] == trial.params["schedule.warmup_steps"]
        assert order.config["callbacks"]["pruning"]["trial"] == trial.number and order.config["trainer"]["max_steps"] == 400
    assert main(["train", "-m", "sweep.resume=s", "sweep.retry_failed=true", "sweep.trials=5"]) == 1
    assert len(points("s")) == 6, "one more, and one in place of the failed"
    assert main(["train", "-m", *words, "sweep.resume=s", "model.n_layers=2"]) == 2
    assert main(["train", "-m", "sweep.resume=s", "seed=1,2"]) == 2
    assert "no model.n_layers there, model.n_layers=2 here" in capsys.readouterr().err


def test_a_search_with_two_aims_names_the_front(launched, capsys):
    pytest.importorskip("optuna")
    found = enumerate([(1, 5), (2, 9), (3, 7)])
    launched.outcomes = {n: ("done", {"val/loss": loss, "train/tokens_per_second": speed}) for n, (loss, speed) in found}
    assert main(["train", "-m", "sweep=pareto", "sweep.trials=3", "hydra.sweep.dir=s", CORES, "sweep.jobs=1"]) == 0
    front = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Pareto-optimal trials"))
    assert "/s/0" in front and "/s/1" in front and "/s/2" not in front


def test_rows_group_seeds_and_put_the_best_first(tmp_path):
    def point(number: int, lr: str, seed: int, loss: float | None) -> Point:
        final = {} if loss is None else {"val/loss": loss, results.SPEED: 100.0}
        return Point(
            number,
            [f"optimizer.lr={lr}", f"seed={seed}", "model=nano"],
            "failed" if loss is None else "done",
            str(number),
            None,
            2.0,
            final,
        )

    found = [point(0, "0.1", 0, 3.0), point(1, "0.1", 1, 5.0), point(2, "0.2", 0, 1.0), point(3, "0.2", 1, None), point(4, "0.3", 0, None)]
    rows = results.rows(found, ["val/loss"])
    assert [row.settings for row in rows] == [{"optimizer.lr": "0.2"}, {"optimizer.lr": "0.1"}, {"optimizer.lr": "0.3"}]
    assert rows[0].metrics["val/loss"] == (1.0, None) and rows[1].metrics["val/loss"] == (4.0, pytest.approx(2**0.5))
    assert [row.settings["optimizer.lr"] for row in results.rows(found, ["val/loss"], largest_first=True)] == ["0.1", "0.2", "0.3"]
    results.write(tmp_path, found, ["val/loss"])
    assert (tmp_path / "results.csv").read_text().splitlines()[1] == "0,done,0,2.0,0.1,0,3.0,100.0,"


def test_differences_name_the_keys():
    there = [["a=1", "b=x"], ["a=2", "b=x"]]
    assert differences(there, there) == []
    assert differences(there, [["a=1"], ["a=3"]]) == ["a=1,2 there, a=1,3 here", "b=x there, no b here"]
    assert differences(there, there[::-1]) == ["a=1,2 there, a=2,1 here"]


def test_a_running_sweep_cannot_be_resumed(tmp_path):
    record = SweepRecord(tmp_path / "s", [], {}, [Point(0, ["seed=1"])])
    record.claim()
    record.lock()
    record.write()
    with pytest.raises(ConfigError, match="already used"):
        SweepRecord(tmp_path / "s", [], {}, []).claim()
    with pytest.raises(ConfigError, match="still running"):
        SweepRecord.read(tmp_path / "s").lock(patience=0)
    record.unlock()
    SweepRecord.read(tmp_path / "s").lock(patience=0)


def test_a_sweep_that_is_resumed_keeps_the_time_of_its_start(tmp_path: Path):
    record = SweepRecord(tmp_path / "s", [], {"config_dir": None, "config_name": None}, [Point(0, ["seed=1"])])
    record.folder.mkdir()
    record.started = "2026-01-01T00:00:00+00:00"
    record.write("failed")
    assert SweepRecord.read(record.folder).started == record.started
