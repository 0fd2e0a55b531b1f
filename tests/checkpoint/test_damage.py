"""No checkpoint is ever half written, lost or loaded damaged: crashes, damaged files, full disks, and which checkpoints are kept."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from harness import _fork, free_port, run_ranks
from jobs import TINY, run_tiny, text_file, tiny_config
from meshformer.callbacks import Checkpoint
from meshformer.checkpoint.find import MANIFEST, VERIFIED, checkpoint_name, checkpoints, damage, latest_checkpoint, read_manifest, step_of
from meshformer.checkpoint.read import read_rest, read_tensors
from meshformer.checkpoint.single_file import write_single
from meshformer.checkpoint.write import StepFailed, tidy, write_folder
from meshformer.cli import main
from meshformer.config.errors import ConfigError
from meshformer.record.metrics_csv import read_metrics

# --- kill -9


def save(run: Path, step: int, x: Any = None, group: Any = None) -> None:
    x = torch.full((50, 40), float(step)) if x is None else x
    write_folder(run / "checkpoints" / checkpoint_name(step), {"model.x": x}, {"step": step}, group)


def assert_whole(run: Path) -> int:
    """The step of the newest checkpoint, whose content is that of its step."""
    newest = latest_checkpoint(run)
    step = step_of(newest)
    assert read_rest(newest) == {"step": step}
    assert torch.equal(read_tensors(newest)["model.x"], torch.full((50, 40), float(step)))
    return step


def run_until_killed(work: Callable[[], None]) -> int:
    """In a forked process; its exit code."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


CALLS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "ctypes.dlsym"}


@pytest.mark.parametrize("what", ["a new step", "the same step again", "the same step, no exchange", "a new step that removes the old"])
def test_a_kill_before_any_operation_on_files_leaves_a_whole_checkpoint(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if what.endswith("no exchange"):
        monkeypatch.setattr("meshformer.checkpoint.write.exchange", lambda a, b: False)
    callback = Checkpoint(keep_last=1)
    new = 1 if what.startswith("the same") else 2
    survived = 0
    for kill_at in range(1, 200):
        run = tmp_path / str(kill_at)
        save(run, 1)

        def work(run: Path = run, kill_at: int = kill_at) -> None:
            count = 0

            def hook(event: str, arguments: Any) -> None:
                nonlocal count
                count += event in CALLS
                if count == kill_at and event in CALLS:  # killing is an event too
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)
            save(run, new)
            if what.endswith("removes the old"):
                callback._remove_old(run / "checkpoints" / checkpoint_name(new))
            os._exit(0)

        code = run_until_killed(work)
        tidy(run / "checkpoints")  # what the next process to train in it does
        found = assert_whole(run)
        survived += found == 1
        assert all(not path.name.endswith(".tmp") for path in (run / "checkpoints").iterdir())
        shutil.rmtree(run)
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert kill_at > 12 and survived > 8


def keep_saving(run: Path, pipe: int, first: int) -> None:
    group, x = None, None
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        mesh, group = init_device_mesh("cpu", (dist.get_world_size(),)), dist.group.WORLD
    callback = Checkpoint(keep_last=1)
    for step in range(first, first + 100_000):
        if group is not None:
            x = distribute_tensor(torch.full((50, 40), float(step)), mesh, [Shard(0)], src_data_rank=None)
        save(run, step, x, group)
        if group is None or dist.get_rank() == 0:
            os.write(pipe, f"{step}\n".encode())
            callback._remove_old(run / "checkpoints" / checkpoint_name(step))


@pytest.mark.parametrize("ranks", [1, 2])
def test_kills_at_random_moments_never_cost_a_complete_checkpoint(tmp_path: Path, ranks: int) -> None:
    draw = random.Random(ranks)
    run, first, inside = tmp_path / "run", 1, 0
    number = -1
    while (number := number + 1) < 12 or ((first < 2 or inside < 3) and number < 60):  # on a busy machine fewer kills meet a save
        reader, writer = os.pipe()
        scratch = tmp_path / f"logs-{number}"
        scratch.mkdir()
        port = free_port()
        pids = [_fork(rank, ranks, port, scratch, _alone if ranks == 1 else keep_saving, (run, writer, first)) for rank in range(ranks)]
        os.close(writer)
        told = os.read(reader, 100)  # the first is complete
        time.sleep(draw.uniform(0, 0.1))
        victims = pids if draw.random() < 0.5 else [draw.choice(pids)]
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        if victims != pids:  # what is left notices by itself or is stopped, as the agent does it
            time.sleep(0.05)
            for pid in set(pids) - set(victims):
                os.kill(pid, signal.SIGKILL)
        for pid in pids:
            os.waitpid(pid, 0)
        while more := os.read(reader, 65536):
            told += more
        os.close(reader)
        completed = int(told.decode().split()[-1])
        newest = assert_whole(run)
        assert newest >= completed >= first
        first = newest  # this one is written again
        inside += any((run / "checkpoints").glob("*.tmp"))
    assert first > 1 and inside > 2, "kills have met saves in progress"


def _alone(*arguments: Any) -> None:
    del os.environ["RANK"]
    keep_saving(*arguments)


# --- damaged files


def truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 100)


def bit_flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def emptied(file: Path) -> None:
    os.truncate(file, 0)


DAMAGE = [
    (truncated, "__0_0.distcp", r"__0_0\.distcp: [\d,]+ bytes instead of [\d,]+"),
    (bit_flipped, "__0_0.distcp", r"__0_0\.distcp: checksum differs"),
    (bit_flipped, "__1_0.distcp", r"__1_0\.distcp: checksum differs"),
    (Path.unlink, "__1_0.distcp", r"__1_0\.distcp: missing"),
    (emptied, ".metadata", r"\.metadata: 0 bytes instead of [\d,]+"),
    (bit_flipped, ".metadata", r"\.metadata: checksum differs"),
    (bit_flipped, "trainer.pt", r"trainer\.pt: checksum differs"),
    (Path.unlink, "trainer.pt", r"trainer\.pt: missing"),
    (Path.unlink, MANIFEST, r"manifest\.json: missing"),
    (truncated, MANIFEST, r"manifest\.json: no whole manifest"),
    (emptied, MANIFEST, r"manifest\.json: no whole manifest"),
]


def save_on_two(run: Path) -> None:
    dist.init_process_group("gloo")
    for step in (400, 500):
        mesh = init_device_mesh("cpu", (2,))
        save(run, step, distribute_tensor(torch.full((50, 40), float(step)), mesh, [Shard(0)], src_data_rank=None), dist.group.WORLD)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 400 and 500, saved by two ranks."""
    run = tmp_path_factory.mktemp("two")
    run_ranks(2, save_on_two, run)
    return run


@pytest.mark.parametrize(("how", "name", "words"), DAMAGE, ids=[f"{how.__name__} {name}" for how, name, _ in DAMAGE])
def test_a_damaged_checkpoint_is_skipped_and_said(
    two: Path, tmp_path: Path, how: Callable[[Path], None], name: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(two, run)
    how(run / "checkpoints" / "step-00000500" / name)
    assert assert_whole(run) == 400
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(rf"damaged checkpoint skipped: {run}/checkpoints/step-00000500/{words}", line), line
    assert latest_checkpoint(run).name == "step-00000400" and not capsys.readouterr().err, "said once"
    how(run / "checkpoints" / "step-00000400" / name)
    with pytest.raises(ConfigError, match=r"every checkpoint of the run is damaged: step-00000500/.*; step-00000400/") as raised:
        latest_checkpoint(run, "resume")
    assert raised.value.key == "resume"
    with pytest.raises(ConfigError, match=f"the checkpoint is damaged: step-00000400/{words}"):
        latest_checkpoint(run / "checkpoints" / "step-00000400")


def test_any_flipped_bit_is_found(two: Path, tmp_path: Path) -> None:
    run, draw = tmp_path / "run", random.Random(0)
    shutil.copytree(two, run)
    checkpoint = run / "checkpoints" / "step-00000500"
    for file in sorted(checkpoint.iterdir()):
        whole = file.read_bytes()
        for _ in range(25):
            content = bytearray(whole)
            content[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
            file.write_bytes(content)
            VERIFIED.clear()
            said = damage(checkpoint)
            same = file.name == MANIFEST and _parsed(content) == json.loads(whole)  # white space
            assert same or (said is not None and file.name in said), file
        file.write_bytes(whole)
    VERIFIED.clear()
    assert damage(checkpoint) is None


def _parsed(content: bytearray) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None


def test_what_was_verified_is_read_again_when_it_changes(two: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(two, run)
    checkpoint = run / "checkpoints" / "step-00000500"
    assert damage(checkpoint) is None
    file = checkpoint / "__0_0.distcp"
    file.chmod(0o400)
    assert damage(checkpoint) is None
    bit_flipped(file)
    assert damage(checkpoint) == "step-00000500/__0_0.distcp: checksum differs"


def test_single_files_are_checked_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 1)
    file = tmp_path / "checkpoints" / "step-00000002.ckpt"
    write_single(file, {"model.x": torch.full((50, 40), 2.0)}, {"step": 2})
    assert latest_checkpoint(tmp_path) == file
    for how, words in ((bit_flipped, "checksum of .* differs"), (truncated, "no whole archive"), (emptied, "no whole archive")):
        write_single(file, {"model.x": torch.full((50, 40), 2.0)}, {"step": 2})
        how(file)
        assert assert_whole(tmp_path) == 1
        said = capsys.readouterr().err
        assert f"step-00000002.ckpt: {words.split(' of ')[0]}" in said
        with pytest.raises(ConfigError, match=f"step-00000002.ckpt: {words}"):
            latest_checkpoint(file)


def choose(run: Path) -> tuple[str, str]:
    with contextlib.redirect_stderr(io.StringIO()) as said:
        return latest_checkpoint(run).name, said.getvalue()


def test_ranks_choose_alike_and_one_speaks(two: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(two, run)
    bit_flipped(run / "checkpoints" / "step-00000500" / "trainer.pt")
    (first, said), (second, silent) = run_ranks(2, choose, run)
    assert first == second == "step-00000400" and "trainer.pt: checksum differs" in said and silent == ""


# --- in training

SETTINGS = ("schedule=constant", "callbacks.checkpoint.every_n_steps=2", "trainer.max_steps=6")
LAYOUTS = {"single": (), "fsdp": ("strategy=fsdp", "trainer.devices=2")}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    text_file(folder)
    return folder


def command(work: Path, *words: str) -> list[str]:
    return ["train", *TINY, f"data.files=[{work}/text.txt]", f"paths.data={work}/cache", f"paths.runs={work}/runs", *SETTINGS, *words]


@pytest.mark.slow
def test_the_command_resumes_from_the_checkpoint_before_a_damaged_one(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In two processes of our own agent: the parent verifies and speaks, once."""
    run = work / "command"
    assert main(command(work, f"hydra.run.dir={run}", *LAYOUTS["fsdp"])) == 0
    rows = read_metrics(run / "metrics.csv")
    bit_flipped(run / "checkpoints" / "step-00000006" / "__1_0.distcp")
    capfd.readouterr()
    assert main(["train", f"resume={run}"]) == 0
    assert capfd.readouterr().err.count("step-00000006/__1_0.distcp: checksum differs") == 1
    assert damage(run / "checkpoints" / "step-00000006") is None, "it was written again"
    again = read_metrics(run / "metrics.csv")
    assert [r["train/loss"] for r in again] == [r["train/loss"] for r in rows]
    assert [r["step"] for r in again] == [1, 2, 3, 4, 5, 6]


def test_when_all_are_damaged_nothing_is_touched(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = work / "hopeless"
    assert main(command(work, f"hydra.run.dir={run}")) == 0
    for checkpoint in checkpoints(run):
        truncated(checkpoint / "trainer.pt")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    runs = sorted(work.iterdir())
    resume, fork = ["train", f"resume={run}", "trainer.max_steps=9"], ["train", f"fork={run}"]
    for typed in (resume, fork, command(work, "stage=finetune", f"stage.init_from={run}")):
        assert main(typed) == 2
        assert "every checkpoint of the run is damaged: step-00000006/trainer.pt" in capsys.readouterr().err
    for words in (["evaluate", f"run={run}"], ["generate", f"run={run}", "prompt=a"], ["convert", f"run={run}", "to=single"]):
        assert main(words) == 2
        assert "is damaged: step-00000006/trainer.pt" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before and sorted(work.iterdir()) == runs


# --- a full disk

Usage = namedtuple("Usage", "total used free")


def fill_the_disk(free: int = 1000) -> None:
    shutil.disk_usage = lambda path: Usage(10**9, 10**9 - free, free)  # pyright: ignore


def full(run: Path) -> tuple[str, list[str]]:
    dist.init_process_group("gloo")
    mesh, before = init_device_mesh("cpu", (2,)), shutil.disk_usage
    x = distribute_tensor(torch.ones(50, 40), mesh, [Shard(0)], src_data_rank=None)
    save(run, 1, x, dist.group.WORLD)
    fill_the_disk(8500)  # enough for the half of one rank, not for both
    with pytest.raises(StepFailed) as raised:
        save(run, 2, x, dist.group.WORLD)
    dist.barrier()  # the first rank removes what was begun
    left = sorted(os.listdir(run / "checkpoints"))
    dist.barrier()
    shutil.disk_usage = before
    save(run, 3, x, dist.group.WORLD)
    return str(raised.value), left


def test_space_is_checked_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "one", 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 1000, 1000))
    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", lambda *_: pytest.fail("something is written"))
    with pytest.raises(
        StepFailed, match=r"step-00000002 could not be written: .*not enough disk space: 1\d,\d{3} bytes needed, 1,000 free"
    ):
        save(tmp_path / "one", 2)
    assert os.listdir(tmp_path / "one" / "checkpoints") == ["step-00000001"]
    monkeypatch.undo()
    for message, left in run_ranks(2, full, tmp_path / "two"):
        assert "rank 0: OSError" in message and "8,500 free" in message and left == ["step-00000001"]
    assert latest_checkpoint(tmp_path / "two").name == "step-00000003"


def test_what_is_needed_is_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"model.{i}": torch.zeros(300, 1000) for i in range(20)}
    write_folder(tmp_path / "a", tensors, {})
    written = sum(f.stat().st_size for f in (tmp_path / "a").iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, written - 1))
    with pytest.raises(StepFailed, match="not enough disk space"):
        write_folder(tmp_path / "b", tensors, {})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, int(written * 1.01)))
    write_folder(tmp_path / "b", tensors, {})


def run_on_a_disk_that_is_full_once(folder: Path, name: str, at: int, *settings: str) -> tuple[list[Any], str]:
    """The `at`-th save meets an error when rank 0 writes; the rows, and what was said."""
    write, count = dcp.FileSystemWriter.write_data, 0

    def failing(self: Any, *arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == at and os.environ.get("RANK", "0") == "0":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, *arguments)

    dcp.FileSystemWriter.write_data = failing  # pyright: ignore
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            rows = run_tiny(folder, name, *SETTINGS, *settings)
    finally:
        dcp.FileSystemWriter.write_data = write  # pyright: ignore
    return rows, said.getvalue()


@pytest.mark.parametrize("at", [2, 3], ids=["in the middle", "at the end"])
@pytest.mark.parametrize("how", ["single", "single, background", "ddp", "fsdp, background"])
def test_a_failed_save_can_be_a_warning(work: Path, how: str, at: int) -> None:
    name = f"warned {how} {at}"
    settings = ["callbacks.checkpoint.on_failure=warn", *(["callbacks.checkpoint.asynchronous=true"] if "background" in how else [])]
    if how.startswith("single"):
        told = [run_on_a_disk_that_is_full_once(work, name, at, *settings)]
    else:
        layout = [f"strategy={how.partition(',')[0]}", "trainer.devices=2"]
        told = run_ranks(2, run_on_a_disk_that_is_full_once, work, name, at, *settings, *layout, timeout=60)
    step = 2 * at
    assert f"warning: the checkpoint {work / name}/checkpoints/step-0000000{step} could not be written" in told[0][1]
    assert "No space left" in told[0][1] and all("warning" not in said for _, said in told[1:])
    assert [row["step"] for row in told[0][0]] == [1, 2, 3, 4, 5, 6]
    names = [p.name for p in checkpoints(work / name)]
    assert names == [f"step-0000000{s}" for s in (2, 4, 6) if s != step or at == 3], "at the end it is tried once more"


def test_by_default_a_failed_save_ends_the_run_and_older_checkpoints_stay(work: Path) -> None:
    with pytest.raises(StepFailed, match=r"step-00000004 could not be written: OSError: .*No space left"):
        run_on_a_disk_that_is_full_once(work, "stopped", 2)
    assert [p.name for p in checkpoints(work / "stopped")] == ["step-00000002"] and damage(checkpoints(work / "stopped")[0]) is None
    rows = run_tiny(work, "stopped", *SETTINGS, resume=True)
    assert rows == run_tiny(work, "never stopped", *SETTINGS)


# --- which are kept


def kept(tmp_path: Path, losses: dict[int, float | None], **rules: Any) -> list[int]:
    shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
    callback = Checkpoint(every_n_steps=1, **rules)
    for step, loss in losses.items():
        path = tmp_path / "checkpoints" / checkpoint_name(step)
        write_folder(path, {"x": torch.zeros(1)}, {"metrics": {} if loss is None else {"val/loss": loss}})
        callback._remove_old(path)
    return [step_of(p) for p in checkpoints(tmp_path)]


def test_the_best_and_every_nth_are_kept_beside_the_last(tmp_path: Path) -> None:
    losses: dict[int, float | None] = {1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan"), 5: 1.5, 6: None, 7: 2.5, 8: 1.5}
    assert kept(tmp_path, losses, keep_last=2) == [7, 8]
    assert kept(tmp_path, losses, keep_last=1, keep_best=2) == [2, 8]
    assert kept(tmp_path, losses, keep_last=2, keep_best=3) == [2, 5, 7, 8]
    assert kept(tmp_path, losses, keep_last=1, keep_every_n_steps=3) == [3, 6, 8]
    assert kept(tmp_path, losses, keep_last=1, keep_best=1, keep_every_n_steps=4) == [2, 4, 8]
    assert kept(tmp_path, losses, keep_last=0) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert kept(tmp_path, losses, keep_last=1, keep_best=2, monitor="val/accuracy") == [8]


def test_damaged_checkpoints_do_not_count(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    save(tmp_path, 9)
    emptied(tmp_path / "checkpoints" / "step-00000002" / "trainer.pt")
    bit_flipped(tmp_path / "checkpoints" / "step-00000009" / "trainer.pt")  # of the right size, and later than what the run goes on from
    save(tmp_path, 3)
    Checkpoint(keep_last=2)._remove_old(tmp_path / "checkpoints" / checkpoint_name(3))
    assert sorted(os.listdir(tmp_path / "checkpoints")) == [checkpoint_name(step) for step in (1, 2, 3, 9)]
    save(tmp_path, 4)
    Checkpoint(keep_last=1)._remove_old(tmp_path / "checkpoints" / checkpoint_name(4))
    assert assert_whole(tmp_path) == 4, "the one just saved is not given up for a later, damaged one"
    assert sorted(os.listdir(tmp_path / "checkpoints")) == [checkpoint_name(step) for step in (2, 4, 9)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_validation_is_noted_in_the_checkpoint_of_its_step(work: Path, layout: str) -> None:
    name = f"validated {layout}"
    settings = (*SETTINGS, *LAYOUTS[layout], "trainer.val_check_interval=2", "trainer.max_steps=9", "optimizer.lr=0.5")
    settings += ("callbacks.checkpoint.keep_last=1", "callbacks.checkpoint.keep_best=2")
    rows = run_tiny(work, name, *settings) if layout == "single" else run_ranks(2, run_tiny, work, name, *settings)[0]
    losses = {row["step"]: row["val/loss"] for row in rows if row.get("val/loss") is not None and row["step"] < 9}
    assert sorted(losses) == [2, 4, 6, 8]
    best = sorted(losses, key=lambda step: losses[step])[:2]
    assert [step_of(p) for p in checkpoints(work / name)] == sorted({*best, 9})
    for checkpoint in checkpoints(work / name)[:-1]:
        assert read_manifest(checkpoint).metrics["val/loss"] == pytest.approx(losses[step_of(checkpoint)], rel=1e-6)
    assert read_manifest(checkpoints(work / name)[-1]).metrics == {}, "step 9 was validated after it was saved"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["keep_best=2"], "the first step that is saved .* is 3000, after the last"),
        (["keep_every_n_steps=5"], "no multiple of callbacks.checkpoint.every_n_steps=3.*Use 3 or 6"),
        (["keep_last=0", "keep_every_n_steps=6"], "keep_last=0 keeps every checkpoint"),
        (["keep_best=1", "monitor=train/loss"], "is not a validation metric"),
        (["keep_best=-1"], "at least 0"),
        (["on_failure=ignore"], "one of stop, warn"),
    ],
)
def test_rules_that_could_never_apply_are_refused(work: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(
            work, "callbacks.checkpoint.every_n_steps=3", "trainer.max_steps=100", *(f"callbacks.checkpoint.{word}" for word in words)
        )


# --- flushed to disk


def test_files_and_folders_are_flushed_before_and_after_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    fsync = os.fsync

    def watching(handle: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{handle}")).relative_to(tmp_path).as_posix())
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watching)
    save(tmp_path, 1)
    aside = "checkpoints/step-00000001.tmp"
    assert sorted(flushed[:-2]) == [f"{aside}/{name}" for name in (".metadata.tmp", "__0_0.distcp", "manifest.json", "trainer.pt")]
    assert flushed[-3:] == [f"{aside}/manifest.json", aside, "checkpoints"]
