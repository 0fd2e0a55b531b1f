"""Recorded steps of real training: what was made slow is found in its part and on its rank, and without the setting nothing is recorded."""

from __future__ import annotations

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

SLEEP = 0.2  # seconds, in every second step, every second pair of steps, every second four: long beside what another process on the cores takes
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


def sleeps(step: int, digit: int) -> bool:
    """Whether the step sleeps; for other digits the steps are divided otherwise, so that one run serves several sleeps."""
    return bool(step >> digit & 1)


def work(folder: Path, name: str, overrides: list[str], slow: dict[int, list[Callable[[Sleep], None]]]) -> None:
    with (folder / f"slept{os.environ['RANK']}.csv").open("w", buffering=1) as slept:

        def sleep(step: int, digit: int) -> None:
            begun = time.perf_counter()
            time.sleep(SLEEP if sleeps(step, digit) else 0)
            slept.write(f"{digit},{step},{1e3 * (time.perf_counter() - begun)}\n")  # on a busy machine it may be longer than asked for

        for digit, slow_part in enumerate(slow.get(int(os.environ["RANK"]), [])):
            slow_part(partial(sleep, digit=digit))
        run_tiny(folder, name, *overrides)


def record(folder: Path, ranks: int, overrides: list[str], slow: dict[int, list[Callable[[Sleep], None]]]) -> Path:
    tiny_config(folder, *overrides)
    run_ranks(ranks, work, folder, "run", overrides, slow)
    return folder / "run" / "profile"


def slept_in(profile: Path, rank: int, digit: int = 0) -> dict[int, float]:
    """step -> ms that the rank slept, for the recorded steps."""
    lines = [line.split(",") for line in (profile.parents[1] / f"slept{rank}.csv").read_text().splitlines()]
    recorded = {row.step for row in read_parts(profile / TABLE)}
    return {int(step): float(ms) for own, step, ms in lines if int(own) == digit and int(step) in recorded}


def holds_the_sleep(profile: Path, rank: int, part: str, digit: int = 0) -> bool:
    """Whether the part is in every step at least as long as the rank slept there. As the parts of a step add up to the step, no other holds it too;
    so the answer does not depend on what else runs on these cores."""
    found, slept = of_part(profile, rank, part), slept_in(profile, rank, digit)
    return all(found[step] >= slept[step] - 0.1 for step in slept) and max(slept.values()) >= 1e3 * SLEEP


def found_share(profile: Path, values: dict[int, float], sleeper: int) -> float:
    """How much longer the values are in steps in which the rank slept, as a share of its sleep: medians, which single disturbed steps do not move."""
    slept = slept_in(profile, sleeper)
    long = [step for step in slept if slept[step] >= 1e3 * SLEEP]
    short = slept.keys() - long
    return (median(values[step] for step in long) - median(values[step] for step in short)) / median(slept[step] for step in long)


def of_part(profile: Path, rank: int, part: str) -> dict[int, float]:
    return {row.step: row.milliseconds for row in read_parts(profile / TABLE) if (row.rank, row.part) == (rank, part)}


SMALL = ["model.n_layers=1", "optimizer=sgd", "data.batch_size=4", "trainer.max_steps=15", "callbacks.profile.steps=[3,14]"]


def sums(profile: Path) -> dict[tuple[int, int], float]:
    found: dict[tuple[int, int], float] = {}
    for row in read_parts(profile / TABLE):
        found[row.rank, row.step] = found.get((row.rank, row.step), 0.0) + (row.milliseconds if row.part in SUM else 0.0)
    return found


def test_what_sleeps_in_one_process_is_found_in_its_part(tmp_path: Path):
    profile = record(tmp_path, 1, SMALL, {0: [slow_data, slow_forward, slow_optimizer]})
    for digit, part in enumerate((DATA, FORWARD, OPTIMIZER)):
        assert holds_the_sleep(profile, 0, part, digit), part
    trace = read_trace(trace_files(profile)[0])
    assert sorted(trace.steps) == list(range(3, 15))
    for (_, step), milliseconds in sums(profile).items():
        start, end = trace.steps[step]
        assert milliseconds == pytest.approx(end - start, rel=0.02)
    assert {file.name for file in profile.iterdir()} == {"rank0.json.gz", "parts.csv", "memory.csv", "parts.svg", "memory.svg"}
    assert trace.memory and trace.sizes["weights"] > 0


def test_one_of_two_ranks_that_sleeps_is_found_where_it_is_waited_for(tmp_path: Path):
    """Rank 1 sleeps in its forward passes: there they take longer, and rank 0 waits as long."""
    overrides = ["strategy=ddp", "trainer.devices=2", *SMALL]
    profile = record(tmp_path, 2, overrides, {1: [slow_forward]})
    assert holds_the_sleep(profile, 1, FORWARD)
    is_waited_for(profile, 0, slow=1)


def is_waited_for(profile: Path, rank: int, slow: int) -> None:
    """The rank waits when the slow one sleeps, and nothing else that it does takes longer; other processes on these cores may make it late by
    less than a quarter of the sleep."""
    assert found_share(profile, of_part(profile, rank, WAITING), slow) > 0.75
    for part in (DATA, FORWARD, BACKWARD, OPTIMIZER):
        assert abs(found_share(profile, of_part(profile, rank, part), slow)) < 0.25, part


@pytest.mark.slow
def test_one_of_four_ranks_that_sleeps_is_found_where_it_is_waited_for(tmp_path: Path):
    overrides = ["strategy=fsdp", "trainer.devices=4", *SMALL]
    profile = record(tmp_path, 4, overrides, {2: [slow_optimizer]})
    assert holds_the_sleep(profile, 2, OPTIMIZER)
    for rank in (0, 1, 3):
        is_waited_for(profile, rank, slow=2)


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
