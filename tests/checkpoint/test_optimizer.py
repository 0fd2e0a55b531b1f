"""Optimizer state follows its parameter's name into any layout, and back."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import lr_scheduler as schedules

from harness import run_ranks
from meshformer.checkpoint.lightning_io import FolderCheckpointIO, split, without_optimizer
from meshformer.checkpoint.optimizer import complete_groups, optimizer_tensors, read_optimizer
from meshformer.checkpoint.read import read_rest
from meshformer.checkpoint.weights import load_weights
from meshformer.checkpoint.write import write_folder
from meshformer.config.errors import ConfigError
from meshformer.model import Transformer
from meshformer.model.position import Learned
from meshformer.optim.factories import adamw, muon, sgd

OPTIMIZERS = {"adamw": adamw, "muon": partial(muon, adamw_lr=0.01), "sgd": partial(sgd, momentum=0.9)}
LAYOUTS = {"one": 1, "fsdp": 2, "pipeline": 2, "pipeline of fsdp": 4}


def model() -> Any:
    """Tied, with decayed and undecayed parameters; 13 tokens and 7 positions are uneven over two processes."""
    return Transformer(13, 2, 2, 12, 7, position=Learned, bias=True, seed=3)


def make(layout: str, kind: str) -> tuple[Any, Any, dict[str, str], list[str]]:
    """(model, optimizer, aliases, names of the whole model): this process's part."""
    whole = model()
    names = [name for name, _ in whole.named_parameters()]
    aliases: dict[str, str] = {}
    if layout == "one":
        return whole, OPTIMIZERS[kind](whole.named_parameters()), aliases, names
    dist.init_process_group("gloo")
    pipelines = 2 if layout.startswith("pipeline") else 1
    mesh = init_device_mesh("cpu", (pipelines, dist.get_world_size() // pipelines), mesh_dim_names=("pipeline", "shard"))
    if pipelines > 1:
        stage = mesh["pipeline"].get_local_rank()
        del whole.blocks._modules[str(1 - stage)]
        if stage == 0:
            whole.norm = whole.head = None
        else:
            whole.embedding = whole.position.table = None
            aliases["head.weight"] = "embedding.tokens.weight"
    if "fsdp" in layout:
        for part in (*whole.blocks, whole):
            fully_shard(part, mesh=mesh["shard"])
    return whole, OPTIMIZERS[kind](whole.named_parameters(), all_names=names), aliases, names


UNTRAINED = "blocks.1.mlp.up.bias"  # has never had a gradient


def train(net: Any, optimizer: Any, aliases: dict[str, str]) -> None:
    """A step, after which weights and state are set: kernels round differently on pieces, and values must be a function of names alone."""
    for name, p in net.named_parameters():
        if name != UNTRAINED:
            p.grad = torch.ones_like(p)
    optimizer.step()
    with torch.no_grad():
        for name, p in net.named_parameters():
            for entry, x in {"weight": p, **optimizer.state[p]}.items():
                if x is not None:
                    text = f"{aliases.get(name, name)}.{entry}"
                    value = torch.randn(x.shape, generator=torch.Generator().manual_seed(sum(i * ord(c) for i, c in enumerate(text, 1))))
                    x.copy_(distribute_tensor(value, x.device_mesh, x.placements, src_data_rank=None) if isinstance(x, DTensor) else value)
    for number, group in enumerate(optimizer.param_groups):
        group["lr"], group["initial_lr"] = 0.125 + number, 0.5 + number


def save(folder: Path, layout: str, kind: str) -> None:
    """What the strategies do: pieces under their names; complete groups on the first rank."""
    net, optimizer, aliases, names = make(layout, kind)
    train(net, optimizer, aliases)
    tensors = {f"model.{name}": x.detach() for name, x in net.state_dict(keep_vars=True).items()}
    tensors |= optimizer_tensors(optimizer, skip=aliases)
    groups = optimizer.state_dict()["param_groups"]
    group = None
    if layout != "one":
        group = dist.group.WORLD
        all_groups: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(all_groups, groups)
        groups = complete_groups(all_groups, names)
    write_folder(folder / layout, tensors, {"optimizer_states": [{"param_groups": groups}]}, group)


@pytest.fixture(scope="module", params=OPTIMIZERS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp(request.param)
    for layout, ranks in LAYOUTS.items():
        if ranks == 1:
            save(folder, layout, request.param)
        else:
            run_ranks(ranks, save, folder, layout, request.param)
    return folder, request.param


def by_name(optimizer: Any, aliases: dict[str, str]) -> dict[str, Any]:
    found = {}
    for group in optimizer.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            state = {k: x.full_tensor() if isinstance(x, DTensor) else x for k, x in optimizer.state[p].items()}
            if isinstance(p, DTensor):
                assert all(isinstance(optimizer.state[p][k], DTensor) == (k != "step") for k in state)
            found[aliases.get(name, name)] = {k: x for k, x in state.items() if x is not None}
    return found


def settings(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in group.items() if k not in ("params", "param_names")} for group in groups]


def read(folder: Path, layout: str, kind: str) -> list[str]:
    """Sources whose state, read in this layout, is not exactly that of one process."""
    expected_net = model()
    expected = OPTIMIZERS[kind](expected_net.named_parameters())
    train(expected_net, expected, {})
    truth, weights = by_name(expected, {}), dict(expected_net.named_parameters(remove_duplicate=False))
    net, optimizer, aliases, _ = make(layout, kind)
    wrong = []
    for source in LAYOUTS:
        optimizer.state.clear()
        with torch.no_grad():
            for p in net.parameters():
                p.zero_()
        path = folder / source
        groups = read_rest(path)["optimizer_states"][0]["param_groups"]
        optimizer.load_state_dict(read_optimizer(path, optimizer, groups, aliases))
        load_weights(net, path, partial=layout.startswith("pipeline"), aliases=aliases)
        got = by_name(optimizer, aliases)
        if layout in ("one", "fsdp"):
            assert got.keys() == truth.keys()
        ok = settings(optimizer.param_groups) == settings(expected.param_groups)
        ok &= all(
            state.keys() == truth[name].keys() and all(torch.equal(x, truth[name][k]) for k, x in state.items())
            for name, state in got.items()
        )
        for name, p in net.named_parameters():
            ok &= torch.equal(p.full_tensor() if isinstance(p, DTensor) else p, weights[aliases.get(name, name)])
        if not ok:
            wrong.append(source)
    if layout != "one":
        dist.barrier()
    return wrong


@pytest.mark.parametrize("layout", LAYOUTS)
def test_optimizer_state_is_read_by_name_in_any_layout(saved: tuple[Path, str], layout: str) -> None:
    folder, kind = saved
    found = [read(folder, layout, kind)] if layout == "one" else run_ranks(LAYOUTS[layout], read, folder, layout, kind)
    assert found == [[]] * LAYOUTS[layout]


@pytest.mark.parametrize("source", LAYOUTS)
def test_single_and_ddp_resume_from_any_layout_by_lightnings_own_way(saved: tuple[Path, str], source: str) -> None:
    folder, kind = saved
    expected_net = model()
    expected = OPTIMIZERS[kind](expected_net.named_parameters())
    train(expected_net, expected, {})
    checkpoint = FolderCheckpointIO().load_checkpoint(folder / source)
    optimizer = OPTIMIZERS[kind]((net := model()).named_parameters())
    optimizer.load_state_dict(checkpoint["optimizer_states"][0])
    net.load_state_dict({k.removeprefix("model."): x for k, x in checkpoint["state_dict"].items()})
    got, truth = by_name(optimizer, {}), by_name(expected, {})
    assert truth[UNTRAINED] == {}, "one parameter has no state"
    assert {n: s.keys() for n, s in got.items()} == {n: s.keys() for n, s in truth.items()}
    assert all(torch.equal(x, truth[name][k]) for name, state in got.items() for k, x in state.items())
    assert settings(optimizer.param_groups) == settings(expected.param_groups)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), expected_net.parameters(), strict=True))


@pytest.mark.parametrize("source", LAYOUTS)
def test_groups_on_disk_are_those_of_one_process(saved: tuple[Path, str], source: str) -> None:
    folder, kind = saved
    groups = [read_rest(folder / layout)["optimizer_states"][0]["param_groups"] for layout in ("one", source)]
    assert groups[0] == groups[1]
    assert len(groups[0]) == {"adamw": 2, "sgd": 2, "muon": 3}[kind]


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    net = model()
    tensors, rest = split({"state_dict": {}, "optimizer_states": [muon(net.named_parameters()).state_dict()]})
    write_folder(tmp_path / "a", tensors, rest)
    with pytest.raises(ConfigError, match="has 3 parameter groups, this one 2"):
        read_optimizer(tmp_path / "a", adamw(net.named_parameters()), rest["optimizer_states"][0]["param_groups"])


@pytest.mark.parametrize(
    "make",
    [lambda o: schedules.LambdaLR(o, lambda step: 1.0), lambda o: schedules.CosineAnnealingLR(o, 10), lambda o: schedules.MultiStepLR(o, [5, 9])],
    ids=["lambda", "cosine", "steps"],
)
def test_a_fork_with_another_optimizer_takes_its_step_and_not_its_learning_rates(make: Any) -> None:
    def schedule(lr: float) -> Any:
        return make(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=lr))

    old, new = schedule(0.5), schedule(0.125)
    for _ in range(3):
        old.optimizer.step()
        old.step()
    stripped = without_optimizer({"optimizer_states": [{"state": {}}], "lr_schedulers": [old.state_dict()], "epoch": 2})
    new.load_state_dict(stripped["lr_schedulers"][0])
    assert stripped["optimizer_states"] == [] and stripped["epoch"] == 2
    assert new.last_epoch == 3 and new.base_lrs == [0.125] and new.get_last_lr() == [0.125]
