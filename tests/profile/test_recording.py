"""Recorded steps of real training: what was made slow is found in its part and on its rank, and without the setting nothing is recorded."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import yaml

from harness import run_ranks
from jobs import before_the_norm, run_tiny, tiny_config
from meshformer.callbacks import Profile
from meshformer.cli import main
from meshformer.config.errors import ConfigError
from meshformer.data.base import Steps
from meshformer.profile.figure import COLOURS, draw_all
from meshformer.profile.parts import (
    BACKWARD,
    CHECKPOINT,
    DATA,
    FORWARD,
    OPTIMIZER,
    PARTS,
    SUM,
    TABLE,
    VALIDATION,
    WAITING,
    means,
    read_parts,
)
from meshformer.profile.trace import read_trace, trace_files
from meshformer.tasks import LanguageModelling

SLEEPS = (0.0, 0.02, 0.05)  # seconds, one for each of three kinds of steps
Sleep = Callable[[int], None]  # sleeps, for a step's number


def slow_data(sleep: Sleep) -> None:
    fetch = Steps.__iter__

    def slowly(self: Any) -> Iterator[Any]:
        for number, batch in enumerate(fetch(self)):
            sleep(number + 1)
            yield batch

    Steps.__iter__ = slowly


def slow_forward(sleep: Sleep) -> None:
    score = LanguageModelling.score

    def slowly(self: Any, output: Any, batch: Any, phase: str) -> Any:
        if phase == "train":
            sleep(self.trainer.global_step + 1)
        return score(self, output, batch, phase)

    LanguageModelling.score = slowly


def slow_optimizer(sleep: Sleep) -> None:
    before_the_norm(lambda task: sleep(task.trainer.global_step + 1))


def kind(step: int, digit: int) -> int:
    """Which of the three kinds a step is of; for other digits the steps are divided otherwise, so that one run serves several sleeps."""
    return step // 3**digit % 3


def work(folder: Path, name: str, overrides: list[str], slow: dict[int, list[Callable[[Sleep], None]]]) -> None:
    with (folder / f"slept{os.environ['RANK']}.csv").open("w", buffering=1) as slept:

        def sleep(step: int, digit: int) -> None:
            begun = time.perf_counter()
            time.sleep(SLEEPS[kind(step, digit)])
            slept.write(f"{digit},{step},{1e3 * (time.perf_counter() - begun)}\n")  # on a busy machine it may be longer than asked for

        for digit, slow_part in enumerate(slow.get(int(os.environ["RANK"]), [])):
            slow_part(partial(sleep, digit=digit))
        run_tiny(folder, name, *overrides)


def record(folder: Path, ranks: int, overrides: list[str], slow: dict[int, list[Callable[[Sleep], None]]]) -> Path:
    tiny_config(folder, *overrides)
    run_ranks(ranks, work, folder, "run", overrides, slow)
    return folder / "run" / "profile"


def found_share(profile: Path, values: dict[int, float], sleeper: int, digit: int = 0) -> float:
    """How many ms the values (step -> ms) grow for each ms that the rank slept: the median over all pairs of steps of different kinds (Theil-Sen),
    which other processes on the same cores hardly move. 1: the sleep is found whole."""
    lines = [line.split(",") for line in (profile.parents[1] / f"slept{sleeper}.csv").read_text().splitlines()]
    slept = {int(step): float(ms) for own, step, ms in lines if int(own) == digit}
    pairs = [(a, b) for a, b in itertools.combinations(sorted(values), 2) if abs(slept[a] - slept[b]) > 10]
    return median((values[a] - values[b]) / (slept[a] - slept[b]) for a, b in pairs)


def of_part(profile: Path, rank: int, part: str) -> dict[int, float]:
    return {row.step: row.milliseconds for row in read_parts(profile / TABLE) if (row.rank, row.part) == (rank, part)}


def waited(profile: Path, rank: int, slow: int) -> dict[int, float]:
    """How much longer the rank waits than the slow one: ranks that share cores are now late, now early."""
    mine, other = of_part(profile, rank, WAITING), of_part(profile, slow, WAITING)
    return {step: mine[step] - other[step] for step in mine}


SMALL = ["model.n_layers=1", "optimizer=sgd", "data.batch_size=4", "trainer.max_steps=48", "callbacks.profile.steps=[3,47]"]
WHOLE = pytest.approx(1, abs=0.15)


def sums(profile: Path) -> dict[tuple[int, int], float]:
    found: dict[tuple[int, int], float] = {}
    for row in read_parts(profile / TABLE):
        found[row.rank, row.step] = found.get((row.rank, row.step), 0.0) + (row.milliseconds if row.part in SUM else 0.0)
    return found


def test_what_sleeps_in_one_process_is_found_in_its_part(tmp_path: Path):
    profile = record(tmp_path, 1, SMALL, {0: [slow_data, slow_forward, slow_optimizer]})
    for digit, part in enumerate((DATA, FORWARD, OPTIMIZER)):
        assert found_share(profile, of_part(profile, 0, part), 0, digit) == WHOLE, part
    trace = read_trace(trace_files(profile)[0])
    assert sorted(trace.steps) == list(range(3, 48))
    for (_, step), milliseconds in sums(profile).items():
        start, end = trace.steps[step]
        assert milliseconds == pytest.approx(end - start, rel=0.02)
    assert {file.name for file in profile.iterdir()} == {"rank0.json.gz", "parts.csv", "memory.csv", "parts.svg", "memory.svg"}
    assert trace.memory and trace.sizes["weights"] > 0


def test_one_of_two_ranks_that_sleeps_is_found_where_it_is_waited_for(tmp_path: Path):
    """Rank 1 sleeps in its forward passes: there they take longer, and rank 0 waits as long."""
    overrides = ["strategy=ddp", "trainer.devices=2", *SMALL]
    for attempt in range(3):  # other processes on these cores may make a rank late for as long as a recording takes, but hardly three times
        (tmp_path / str(attempt)).mkdir()
        profile = record(tmp_path / str(attempt), 2, overrides, {1: [slow_forward]})
        shares = [found_share(profile, of_part(profile, 1, FORWARD), 1), found_share(profile, waited(profile, 0, slow=1), 1)]
        elsewhere = [found_share(profile, of_part(profile, 0, part), 1) for part in (DATA, FORWARD, OPTIMIZER)]
        if all(share == WHOLE for share in shares) and all(abs(share) < 0.15 for share in elsewhere):
            return
    pytest.fail(f"of each ms that it slept, its forward passes hold and the other rank waits {shares}; in the other's own parts {elsewhere}")


@pytest.mark.slow
def test_one_of_four_ranks_that_sleeps_is_found_where_it_is_waited_for(tmp_path: Path):
    overrides = ["strategy=fsdp", "trainer.devices=4", *SMALL]
    profile = record(tmp_path, 4, overrides, {2: [slow_optimizer]})
    assert found_share(profile, of_part(profile, 2, OPTIMIZER), 2) == WHOLE
    for rank in (0, 1, 3):
        assert found_share(profile, waited(profile, rank, slow=2), 2) == WHOLE, rank


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [["strategy=pipeline", "trainer.devices=2", "data.batch_size=16"], ["strategy=fsdp_tensor", "trainer.devices=4"],
     ["strategy=pipeline", "trainer.devices=2", "data.batch_size=16", "strategy.schedule=interleaved_zero_bubble", "model.n_layers=4"]],
    ids=["pipeline", "fsdp_tensor", "zero_bubble"],
)  # fmt: skip
def test_every_layout_is_split_and_drawn(tmp_path: Path, overrides: list[str]):
    ranks = int(overrides[1].partition("=")[2])
    profile = record(tmp_path, ranks, [*overrides, "trainer.max_steps=6", "callbacks.profile.steps=[4,6]"], {})
    assert set(means(read_parts(profile / TABLE))) == set(range(ranks))
    traces = {rank: read_trace(file) for rank, file in trace_files(profile).items()}
    for (rank, step), milliseconds in sums(profile).items():
        start, end = traces[rank].steps[step]
        assert milliseconds == pytest.approx(end - start, rel=0.02)
    assert all(collective.group is not None for trace in traces.values() for collective in trace.collectives)
    if "pipeline" in overrides[0]:
        assert {box.kind for box in traces[0].boxes} == {"forward", "backward", *(["inputs", "weights"] if len(overrides) > 3 else [])}
        assert (profile / "pipeline.svg").is_file()


def test_checkpoints_and_validations_have_their_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """At the last step too, behind which no batch is fetched. The command and the report show what was recorded."""
    overrides = ["trainer.max_steps=8", "callbacks.profile.steps=[5,8]", "callbacks.checkpoint.every_n_steps=2", "trainer.val_check_interval=4"]
    profile = record(tmp_path, 1, overrides, {})
    by_step = {(row.step, row.part): row.milliseconds for row in read_parts(profile / TABLE)}
    assert [step for step in range(5, 9) if by_step[step, CHECKPOINT] > 0] == [6, 8]
    assert [step for step in range(5, 9) if by_step[step, VALIDATION] > 0] == [8]
    assert main(["profile", f"run={profile.parent}"]) == 0
    said = capsys.readouterr().out
    assert "the mean of steps 5 to 8" in said and "callbacks.checkpoint.asynchronous=true" in said
    assert all(part in said for part in (DATA, FORWARD, BACKWARD, "step"))
    before = (profile / TABLE).read_text()
    (profile / TABLE).unlink()
    assert main(["profile", f"run={profile.parent}"]) == 0
    assert (profile / TABLE).read_text() == before, "made anew from the trace"
    draw_all(profile)
    assert main(["report", str(profile.parent)]) == 0
    page = (profile.parent / "report.html").read_text()
    assert "Recorded steps" in page and "callbacks.checkpoint.asynchronous=true" in page
    (profile / TABLE).write_text("step,rank,part,milliseconds\n5,0,sleep,1\n")
    assert main(["profile", f"run={profile.parent}"]) == 2
    assert "damaged" in capsys.readouterr().err


def test_without_the_setting_nothing_is_recorded_and_nothing_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run_ranks(1, run_tiny, tmp_path, "run", "trainer.max_steps=3")
    assert not (tmp_path / "run" / "profile").exists()
    assert main(["profile", f"run={tmp_path / 'run'}"]) == 2
    assert "no steps of this run were recorded" in capsys.readouterr().err
    idle = Profile()
    idle.on_train_start(None, None)  # pyright: ignore[reportArgumentType]
    assert not idle._replaced


def check_restored(folder: Path) -> None:
    kept: list[Profile] = []
    begin = Profile._begin
    Profile._begin = lambda self, trainer, task: (kept.append(self), begin(self, trainer, task))[1]
    run_tiny(folder, "run", "trainer.max_steps=5", "callbacks.profile.steps=[2,3]")
    (profile,) = kept
    assert profile._profiler is None and not profile._replaced and not profile._open


def test_the_marks_are_taken_off_again(tmp_path: Path):
    run_ranks(1, check_restored, tmp_path)


@pytest.mark.parametrize(
    ("steps", "message"),
    [([24, 20], "ends before it begins"), ([5], "two whole numbers"), ([5, 6, 7], "two whole numbers"), ([1.5, 2], "list of whole numbers"),
     (["a", "b"], "whole numbers"), ([0, 2], "from 1"), ([9, 11], "the run ends at step 10"), ([1, 200], "records 200 steps"), (5, "list")],
)  # fmt: skip
def test_steps_that_cannot_be_recorded_are_refused(tmp_path: Path, steps: Any, message: str, capsys: pytest.CaptureFixture[str]):
    text = str(steps).replace(" ", "")
    longest = "trainer.max_steps=300" if steps == [1, 200] else "trainer.max_steps=10"
    with pytest.raises(ConfigError) as caught:
        tiny_config(tmp_path, longest, f"callbacks.profile.steps={text}")
    assert str(caught.value).startswith("callbacks.profile.steps"), caught.value
    print(caught.value)
    assert yaml.safe_load(text) == steps


def test_every_part_has_a_colour():
    assert set(COLOURS) == set(PARTS)
    assert len(set(COLOURS.values())) == len(PARTS)
