"""Asynchronous saving: what is written is the state at the time of the save, failures are raised, old checkpoints wait for the new one."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from harness import run_ranks
from jobs import run_tiny, text_file
from meshformer.checkpoint.find import checkpoints
from meshformer.checkpoint.lightning_io import Background
from meshformer.checkpoint.read import read_rest, read_tensors
from meshformer.checkpoint.write import StepFailed


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing is written before it is set."""
    event = threading.Event()
    write = dcp.FileSystemWriter.write_data

    def wait_and_write(self: Any, *arguments: Any) -> Any:
        assert event.wait(30)
        return write(self, *arguments)

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", wait_and_write)
    return event


def test_the_state_at_the_time_of_the_save_is_written(tmp_path: Path, gate: threading.Event) -> None:
    x, rest, done = torch.arange(4.0), {"step": 1, "list": [1]}, []
    background = Background()
    background.save(tmp_path / "a", {"x": x, "view": x[1:3]}, rest, then=lambda: done.append((tmp_path / "a").is_dir()))
    x.zero_()
    rest["list"].append(2)
    assert not (tmp_path / "a").exists() and not done, "the save returned before anything was written"
    gate.set()
    background.wait()
    assert done == [True], "`then` comes after completion"
    assert read_tensors(tmp_path / "a")["x"].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert read_tensors(tmp_path / "a")["view"].tolist() == [1.0, 2.0]
    assert read_rest(tmp_path / "a") == {"step": 1, "list": [1]}


def test_a_second_save_waits_for_the_first(tmp_path: Path, gate: threading.Event) -> None:
    background = Background()
    background.save(tmp_path / "a", {"x": torch.zeros(1)}, {})
    threading.Timer(0.3, gate.set).start()
    started = time.monotonic()
    background.save(tmp_path / "b", {"x": torch.ones(1)}, {}, then=lambda: None)
    assert time.monotonic() - started > 0.25
    assert (tmp_path / "a").is_dir()
    background.wait()
    assert read_tensors(tmp_path / "b")["x"].tolist() == [1.0]


def test_a_failure_is_raised_once_and_the_next_save_works(tmp_path: Path) -> None:
    background = Background()
    (tmp_path / "file").touch()
    background.save(tmp_path / "file" / "a", {"x": torch.zeros(1)}, {}, then=lambda: pytest.fail("nothing was completed"))
    with pytest.raises(StepFailed, match="Not a directory"):
        background.save(tmp_path / "b", {"x": torch.zeros(1)}, {})
    background.save(tmp_path / "b", {"x": torch.zeros(1)}, {"lock": threading.Lock()})
    with pytest.raises(TypeError, match="pickle"):
        background.wait()
    background.wait()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def save_while_communicating(folder: Path) -> list[float]:
    dist.init_process_group("gloo")
    mesh, group = init_device_mesh("cpu", (2,)), dist.new_group(backend="gloo")
    x = distribute_tensor(torch.arange(10.0).view(5, 2), mesh, [Shard(0)], src_data_rank=None)
    done: list[float] = []
    background = Background()
    for number in range(3):
        background.save(folder / f"step-{number}", {"x": x}, {"step": number}, group, lambda: done.append(time.monotonic()))
        for _ in range(50):  # training goes on in groups of its own
            total = torch.ones(1)
            dist.all_reduce(total)
            assert total.item() == 2
        x.to_local().add_(100)
    background.wait()
    with pytest.raises(RuntimeError, match="rank 1: RuntimeError: no memory"):
        if dist.get_rank() == 1:
            x.__class__.detach = lambda self: (_ for _ in ()).throw(RuntimeError("no memory"))  # pyright: ignore
        background.save(folder / "step-3", {"x": x}, {"step": 3}, group)
        background.wait()
    return done


def test_ranks_save_together_while_they_communicate(tmp_path: Path) -> None:
    done = run_ranks(2, save_while_communicating, tmp_path, timeout=60)
    assert [len(times) for times in done] == [3, 3]
    for number in range(3):
        assert torch.equal(read_tensors(tmp_path / f"step-{number}")["x"], torch.arange(10.0).view(5, 2) + 100 * number)
        assert read_rest(tmp_path / f"step-{number}") == {"step": number}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-0", "step-1", "step-2"]


# --- in training

SETTINGS = ("schedule=constant", "callbacks.checkpoint.every_n_steps=2", "callbacks.checkpoint.keep_last=2", "trainer.max_steps=7")
ASYNCHRONOUS = "callbacks.checkpoint.asynchronous=true"


@pytest.fixture(scope="module")
def synchronous(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synchronous")
    text_file(folder)
    run_tiny(folder, "run", *SETTINGS)
    return folder


def assert_same(run: Path, other: Path) -> None:
    assert [p.name for p in checkpoints(run)] == [p.name for p in checkpoints(other)] == ["step-00000006", "step-00000007"]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000006", "step-00000007"]
    for mine, theirs in zip(checkpoints(run), checkpoints(other), strict=True):
        a, b = read_tensors(mine), read_tensors(theirs)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        assert read_rest(mine)["optimizer_states"] == read_rest(theirs)["optimizer_states"]


def test_a_run_that_saves_in_the_background_leaves_the_same_checkpoints(synchronous: Path) -> None:
    run_tiny(synchronous, "background", *SETTINGS, ASYNCHRONOUS)
    assert_same(synchronous / "background", synchronous / "run")


def test_ddp_saves_in_the_background_too(synchronous: Path) -> None:
    layout = ("strategy=ddp", "trainer.devices=2")
    run_ranks(2, run_tiny, synchronous, "ddp", *SETTINGS, *layout)
    run_ranks(2, run_tiny, synchronous, "ddp-background", *SETTINGS, *layout, ASYNCHRONOUS)
    assert_same(synchronous / "ddp-background", synchronous / "ddp")


def run_on_a_slow_disk(folder: Path, name: str, *settings: str) -> None:
    write = dcp.FileSystemWriter.write_data

    def slow(self: Any, *arguments: Any) -> Any:
        time.sleep(0.3)  # several steps long: the next save must find this one unfinished
        return write(self, *arguments)

    dcp.FileSystemWriter.write_data = slow  # pyright: ignore[reportAttributeAccessIssue]
    run_tiny(folder, name, *settings)


@pytest.mark.parametrize("strategy", ["fsdp", "pipeline"])
def test_a_run_in_pieces_saves_in_the_background_too(synchronous: Path, strategy: str) -> None:
    layout = (f"strategy={strategy}", "trainer.devices=2")
    run_ranks(2, run_tiny, synchronous, strategy, *SETTINGS, *layout)
    run_ranks(2, run_on_a_slow_disk, synchronous, f"{strategy}-background", *SETTINGS, *layout, ASYNCHRONOUS, timeout=60)
    assert_same(synchronous / f"{strategy}-background", synchronous / strategy)


def test_old_checkpoints_are_removed_only_when_the_new_one_is_complete(synchronous: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    write = dcp.FileSystemWriter.write_data

    def slow(self: Any, *arguments: Any) -> Any:
        time.sleep(0.05)
        seen.append([p.name for p in checkpoints(synchronous / "slow")])
        return write(self, *arguments)

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", slow)
    run_tiny(synchronous, "slow", *SETTINGS, ASYNCHRONOUS)
    assert seen == [[], ["step-00000002"], ["step-00000002", "step-00000004"], ["step-00000004", "step-00000006"]]


@pytest.mark.parametrize("last", [7, 2], ids=["at the next save", "at the end"])
def test_a_checkpoint_that_could_not_be_written_ends_the_run(synchronous: Path, monkeypatch: pytest.MonkeyPatch, last: int) -> None:
    def fail(self: Any, *arguments: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", fail)
    with pytest.raises(StepFailed, match=r"checkpoints/step-00000002 could not be written: OSError: .*No space left"):
        run_tiny(synchronous, f"full-{last}", *SETTINGS, ASYNCHRONOUS, f"trainer.max_steps={last}")
    assert list((synchronous / f"full-{last}" / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("disk", ["slow", "full"])
def test_a_run_that_fails_completes_its_checkpoint_and_raises_its_own_error(
    synchronous: Path, monkeypatch: pytest.MonkeyPatch, disk: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from meshformer.tasks import LanguageModelling

    step = LanguageModelling.training_step

    def failing(self: Any, batch: Any, index: int) -> Any:
        if self.trainer.global_step == 2:
            raise ValueError("a defect")
        return step(self, batch, index)

    write = dcp.FileSystemWriter.write_data

    def hard(self: Any, *arguments: Any) -> Any:
        time.sleep(0.2)
        if disk == "full":
            raise OSError(28, "No space left on device")
        return write(self, *arguments)

    monkeypatch.setattr(LanguageModelling, "training_step", failing)
    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", hard)
    with pytest.raises(ValueError, match="a defect"):
        run_tiny(synchronous, f"failing-{disk}", *SETTINGS, ASYNCHRONOUS)
    assert [p.name for p in checkpoints(synchronous / f"failing-{disk}")] == (["step-00000002"] if disk == "slow" else [])
    assert ("a checkpoint was lost" in capsys.readouterr().err) == (disk == "full")
