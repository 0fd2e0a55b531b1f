"""A checkpoint written by any layout is one complete folder that any other layout reads, to the last bit."""

from __future__ import annotations

import errno
import pickle
import resource
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from harness import run_ranks
from meshformer.checkpoint.pieces import pieces_of
from meshformer.checkpoint.read import read_into, read_rest, read_tensors, tensor_sizes
from meshformer.checkpoint.weights import load_weights
from meshformer.checkpoint.write import write_folder
from meshformer.config.errors import ConfigError
from nets import LAYOUTS, Net, cut, differing, processes, states

REST = {"step": 7, "optimizer_states": [], "names": ["a"], "pair": (1, 2.5)}


def save(folder: Path, layout: str) -> None:
    net = cut(Net(), layout)
    rest = REST if layout == "one" or dist.get_rank() == 0 else {"not": object}  # only the first rank's counts
    write_folder(folder / layout, {**states(net), "step": torch.tensor(7.0)}, rest, None if layout == "one" else dist.group.WORLD)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    for layout in LAYOUTS:
        if layout == "one":
            save(folder, layout)
        else:
            run_ranks(processes(layout), save, folder, layout)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_process_reads_what_any_layout_wrote(saved: Path, layout: str) -> None:
    assert sorted(path.name for path in saved.iterdir()) == sorted(LAYOUTS), "nothing but complete checkpoints is left"
    got, expected = read_tensors(saved / layout, "model."), states(Net())
    assert list(differing(got, expected)) == []
    assert read_tensors(saved / layout, "step") == {"step": torch.tensor(7.0)}
    assert read_rest(saved / layout) == REST
    assert {k: size for k, (size, _) in tensor_sizes(saved / layout).items() if k != "step"} == {k: x.shape for k, x in expected.items()}


def read_all(folder: Path, layout: str) -> list[tuple[str, str]]:
    net, expected = cut(Net(value=-1.0), layout), states(cut(Net(), layout))
    wrong = []
    for source in LAYOUTS:
        with torch.no_grad():
            for piece in pieces_of(states(net)).values():
                piece.data.fill_(-1.0)
        assert len(list(differing(states(net), expected))) == len(pieces_of(expected)) > 0, "the comparison can fail"
        read_into(folder / source, states(net))
        wrong += [(source, name) for name in differing(states(net), expected)]
        load_weights(net, folder / source)
        wrong += [(source, name) for name in differing(states(net), expected)]
    if layout != "one":
        dist.barrier()  # reading communicates with nobody: the first rank must not close the store before others have joined
    return wrong


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_reads_what_any_other_wrote(saved: Path, layout: str) -> None:
    found = [read_all(saved, layout)] if layout == "one" else run_ranks(processes(layout), read_all, saved, layout)
    assert found == [[]] * processes(layout)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_can_read_the_folder_by_itself(saved: Path) -> None:
    tensors = {name: torch.zeros_like(x) for name, x in states(Net()).items()}
    dcp.load(tensors, checkpoint_id=saved / "shard 2, tensor 2", no_dist=True)
    assert list(differing(tensors, states(Net()))) == []


def test_copies_are_written_once(saved: Path) -> None:
    sizes = {layout: sum(f.stat().st_size for f in (saved / layout).glob("*.distcp")) for layout in LAYOUTS}
    assert sizes["replicate 2, shard 2"] == pytest.approx(sizes["shard 2"], rel=0.1)


# --- names that differ between ranks


def save_stages(folder: Path) -> None:
    """Two pipeline stages of two processes each; a third name is on both."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pipeline", "shard"))
    stage = mesh["pipeline"].get_local_rank()
    whole = torch.arange(15.0).view(5, 3) + 100 * stage
    piece = distribute_tensor(whole, mesh["shard"], [Shard(0)], src_data_rank=None)
    tensors = {f"model.blocks.{stage}.weight": piece, f"model.plain.{stage}": whole, "model.both": torch.ones(2)}
    write_folder(folder / "stages", tensors, {"step": 1}, dist.group.WORLD)


def read_stages(folder: Path) -> None:
    """One stage that holds the other half."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    tensors: dict[str, Any] = {
        f"model.blocks.{i}.weight": distribute_tensor(torch.zeros(5, 3), mesh, [Shard(1)], src_data_rank=None) for i in range(2)
    }
    read_into(folder / "stages", tensors)
    for i in range(2):
        assert torch.equal(tensors[f"model.blocks.{i}.weight"].full_tensor(), torch.arange(15.0).view(5, 3) + 100 * i)


def test_ranks_with_different_names_write_one_folder(tmp_path: Path) -> None:
    run_ranks(4, save_stages, tmp_path)
    tensors = read_tensors(tmp_path / "stages")
    assert sorted(tensors) == ["model.blocks.0.weight", "model.blocks.1.weight", "model.both", "model.plain.0", "model.plain.1"]
    for i in range(2):
        for name in (f"model.blocks.{i}.weight", f"model.plain.{i}"):
            assert torch.equal(tensors[name], torch.arange(15.0).view(5, 3) + 100 * i)
    run_ranks(2, read_stages, tmp_path)


# --- failures


def fail_on_rank_1(folder: Path, how: str) -> tuple[str, list[str]]:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    x = distribute_tensor(torch.arange(4000.0).view(40, 100), mesh, [Shard(0)], src_data_rank=None)
    write_folder(folder / "step-1", {"model.x": x}, {"step": 1}, dist.group.WORLD)
    tensors: dict[str, Any] = {"model.x": x + 1}
    rest: dict[str, Any] = {"step": 2}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if how == "full disk" and rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limit[1]))
    if how == "pending sum" and rank == 1:
        from torch.distributed.tensor import Partial

        tensors["model.x"] = DTensor.from_local(torch.ones(40, 100), mesh, [Partial()])
    if how == "other shape" and rank == 1:
        tensors["model.x"] = distribute_tensor(torch.ones(40, 99), mesh, [Replicate()], src_data_rank=None)
    if how == "rest" and rank == 0:
        rest["lock"] = threading.Lock()  # cannot be pickled
    try:
        for name in ("step-1", "step-2"):
            with pytest.raises(RuntimeError, match="could not be written") as raised:
                write_folder(folder / name, tensors, rest, dist.group.WORLD)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    dist.barrier()  # the first rank removes what was begun
    left = sorted(path.name for path in folder.iterdir())
    dist.barrier()
    write_folder(folder / "step-3", {"model.x": x + 2}, {"step": 3}, dist.group.WORLD)  # and the group still works
    return str(raised.value), left


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("full disk", f"rank 1: OSError: [Errno {errno.EFBIG}]"),
        ("pending sum", "rank 1: ValueError: a sum that is pending"),
        ("other shape", "rank 0: ValueError: Failed to validate"),
        ("rest", "rank 0: "),
    ],
)
def test_what_fails_on_one_rank_raises_on_all_and_old_checkpoints_stay(tmp_path: Path, how: str, words: str) -> None:
    for message, left in run_ranks(2, fail_on_rank_1, tmp_path, how, timeout=30):
        assert words in message, message
        assert left == ["step-1"]
    expected = torch.arange(4000.0).view(40, 100)
    assert torch.equal(read_tensors(tmp_path / "step-1")["model.x"], expected)
    assert torch.equal(read_tensors(tmp_path / "step-3")["model.x"], expected + 2)
    assert read_rest(tmp_path / "step-3") == {"step": 3}


def test_misfits_are_listed(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", states(Net()), REST)
    wanted = {"model.up.weight": torch.zeros(7, 6), "model.other": torch.zeros(1), "model.gain.weight": torch.zeros(3)}
    with pytest.raises(ConfigError) as raised:
        read_into(tmp_path / "a", wanted)
    assert "model.other: missing in the checkpoint" in str(raised.value)
    assert "model.up.weight: (7, 5) in the checkpoint, (7, 6) in the model" in str(raised.value)
    assert not wanted["model.gain.weight"].any(), "nothing is read when something does not fit"


def test_values_take_the_type_of_what_they_are_read_into(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", {"x": torch.tensor([1.0, 2.5])}, REST)
    x = torch.zeros(2, dtype=torch.bfloat16)
    read_into(tmp_path / "a", {"x": x})
    assert x.tolist() == [1.0, 2.5]


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("executed",))


def test_a_strangers_checkpoint_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "a", states(Net()), REST)
    whole = (tmp_path / "a" / ".metadata").read_bytes()
    for content in (pickle.dumps(Evil()), pickle.dumps({"a": 1}), whole[:-20], b""):
        (tmp_path / "a" / ".metadata").write_bytes(content)
        with pytest.raises(ConfigError, match="is damaged"):
            read_tensors(tmp_path / "a")
    torch.save({"a": Evil()}, tmp_path / "a" / "trainer.pt")
    with pytest.raises(ConfigError, match="no checkpoint of ours"):
        read_rest(tmp_path / "a")
    assert "executed" not in capsys.readouterr().out


# --- parts of a model


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = torch.nn.Embedding(4, 3), torch.nn.Linear(3, 4, bias=False)
        self.head.weight = self.embedding.weight


def test_a_part_of_a_tied_model_reads_its_part(tmp_path: Path) -> None:
    whole = Tied()
    both = {f"model.{k}": x for k, x in whole.state_dict().items()}
    write_folder(tmp_path / "both", both, REST)
    write_folder(tmp_path / "once", {"model.embedding.weight": whole.embedding.weight.detach()}, REST)
    part = Tied()
    part.head.weight = torch.nn.Parameter(torch.zeros(4, 3))
    part.embedding = None  # pyright: ignore[reportAttributeAccessIssue]
    for source in ("both", "once"):
        part.head.weight.data.zero_()
        load_weights(part, tmp_path / source, partial=True, aliases={"head.weight": "embedding.weight"})
        assert torch.equal(part.head.weight, whole.head.weight)
        again = Tied()
        load_weights(again, tmp_path / source)
        assert torch.equal(again.embedding.weight, whole.embedding.weight) and again.head.weight is again.embedding.weight
    with pytest.raises(ConfigError, match=r"embedding\.weight: unknown to the model"):
        load_weights(part, tmp_path / "both")
    with pytest.raises(ConfigError, match=r"head\.weight: missing in the checkpoint"):
        load_weights(part, tmp_path / "once", partial=True)


def test_two_parameters_that_one_saved_weight_belongs_to_are_both_read(tmp_path: Path) -> None:
    whole = Tied()
    write_folder(tmp_path / "once", {"model.embedding.weight": whole.embedding.weight.detach()}, REST)
    part = Tied()
    part.head.weight = torch.nn.Parameter(torch.zeros(4, 3))
    load_weights(part, tmp_path / "once", aliases={"head.weight": "embedding.weight"})
    assert torch.equal(part.head.weight, whole.head.weight) and torch.equal(part.embedding.weight, whole.head.weight)
