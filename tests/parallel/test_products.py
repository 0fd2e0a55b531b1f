"""What only GPUs can do is refused with a reason where it cannot work, and switched on where it can. No GPU: what would be called is counted."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from harness import run_ranks
from jobs import run_tiny
from meshformer.command.compose import compose
from meshformer.config import ConfigError
from meshformer.model import Transformer
from meshformer.parallel import check as parallel_check
from meshformer.parallel import compilation, products

ASYNC = ["strategy=tensor", "strategy.async_tensor_parallel=true", "trainer.compile=true"]
FLOAT8 = ["trainer.float8=true", "trainer.compile=true", "trainer.precision=bf16-mixed", "model.d_ff=512"]


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["meshformer.config.resolve"], "_torch_has_cuda", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(compilation, "lacking", lambda accelerator: None)  # of what compiling needs
    monkeypatch.setattr(parallel_check, "find_spec", lambda name: name)
    monkeypatch.setattr(parallel_check, "compute_capability", lambda: (9, 0))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trainer.compile=false"], "is torch.compile's work. Add trainer.compile=true."),
        (["strategy.sequence_parallel=false"], "exchanges of sequence parallel"),
        (["trainer.devices=1", "trainer.num_nodes=2"], "strategy.tensor=2 inside a node, and a node has trainer.devices=1"),
    ],
)
def test_overlap_that_cannot_work_is_refused(two_gpus: None, overrides: list[str], words: str) -> None:
    assert compose(ASYNC)["strategy"]["async_tensor_parallel"]
    with pytest.raises(ConfigError, match=r"strategy\.async_tensor_parallel=true: ") as caught:
        compose([*ASYNC, *overrides])
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trainer.compile=false"], "Add trainer.compile=true."),
        (["trainer.precision=32-true"], "works with bfloat16 only, not 32-true. Use trainer.precision=bf16-mixed."),
        (["strategy=tensor"], "does not work with tensor parallelism"),
        (["model.d_ff=500"], "that of model.d_ff is not"),
        (["model.n_heads=8", "model.n_kv_heads=1", "model.head_dim=8"], "that of model.n_kv_heads is not"),
    ],
)
def test_float8_that_cannot_work_is_refused(two_gpus: None, overrides: list[str], words: str) -> None:
    assert compose(FLOAT8)["trainer"]["float8"]
    with pytest.raises(ConfigError) as caught:
        compose([*FLOAT8, *overrides])
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("section", "change", "words"),
    [
        ("stage", {"lora": {"rank": 4, "alpha": 16.0, "targets": ["q"]}}, "layers with adapters"),
        ("model", {"_target_": "own.Net"}, "this package's models"),
    ],
)
def test_float8_of_other_layers_is_refused(two_gpus: None, section: str, change: dict[str, Any], words: str) -> None:
    config = compose(FLOAT8)
    parallel_check.check_settings(config)
    with pytest.raises(ConfigError, match=words):
        parallel_check.check_settings({**config, section: {**config[section], **change}})


def test_float8_needs_the_package_and_the_card(two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_check, "compute_capability", lambda: (8, 0))
    with pytest.raises(ConfigError, match="this machine's GPUs multiply no float8"):
        compose(FLOAT8)
    monkeypatch.setattr(parallel_check, "compute_capability", lambda: None)  # not known: the process that has the card looks again
    compose(FLOAT8)
    monkeypatch.setattr(parallel_check, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install torchao"):
        compose(FLOAT8)


def test_float8_converts_the_blocks_of_a_card_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    torchao, converted = ModuleType("torchao.float8"), []
    torchao.convert_to_float8_training = converted.append  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.float8", torchao)
    model = Transformer(16, 1, 1, 16, 16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    with pytest.raises(ConfigError, match=r"trainer\.float8=true: this GPU"):
        products.in_float8(model)
    assert converted == []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    products.in_float8(model)
    assert converted == [model.blocks]


def test_overlap_is_switched_on_as_this_torch_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed._symmetric_memory as symmetric

    enabled: list[str] = []
    mesh: Any = SimpleNamespace(get_group=lambda: SimpleNamespace(group_name="tensor"))
    monkeypatch.setattr(symmetric, "enable_symm_mem_for_group", lambda name: enabled.append(name))
    options = products.overlap(mesh)
    assert enabled == ["tensor"]
    monkeypatch.delattr(symmetric, "enable_symm_mem_for_group")
    assert products.overlap(mesh) == options == {"_micro_pipeline_tp": True}
    torch.compile(torch.relu, options=options)  # refuses options that it does not know


def applied(folder: Path, ranks: int, *overrides: str) -> list[str]:
    """What a run on CPUs, where the checks are silenced, would have switched on."""
    from meshformer.job import train
    from meshformer.parallel import strategy

    found: list[str] = []
    parallel_check._float8 = parallel_check._async_tensor_parallel = lambda *config: None
    train.in_float8 = lambda model: found.append(f"float8 of {len(model.blocks)} blocks")
    strategy.overlap = lambda mesh: found.append(f"overlap of {mesh.size()}")
    run_tiny(folder, "run", f"trainer.devices={ranks}", "trainer.max_steps=1", "~callbacks.checkpoint", "model.n_layers=3", *overrides)
    return found


@pytest.mark.parametrize(
    ("ranks", "overrides", "expected"),
    [
        (1, ["strategy=single", "trainer.float8=true"], ["float8 of 3 blocks"]),
        (2, ["strategy=fsdp", "trainer.float8=true"], ["float8 of 3 blocks"]),
        (2, ["strategy=tensor", "strategy.async_tensor_parallel=true"], ["overlap of 2"]),
        (2, ["strategy=tensor"], []),
    ],
)
def test_a_run_switches_on_what_it_is_asked_for(tmp_path: Path, ranks: int, overrides: list[str], expected: list[str]) -> None:
    assert run_ranks(ranks, applied, tmp_path, ranks, *overrides) == [expected] * ranks
