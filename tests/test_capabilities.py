"""What is asked of a machine before something is chosen for it, with `torch.cuda` pretended absent, present, and present without bf16.

`PLACES` lists every file that names CUDA; a new one turns its test red until it is covered here, or said to need nothing.
"""

from __future__ import annotations

import ast
import ctypes
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import meshformer
from jobs import run_tiny
from meshformer.callbacks import throughput
from meshformer.command import doctor
from meshformer.command.compose import settle
from meshformer.config import ConfigError
from meshformer.config.resolve import gpus_multiply_bf16, visible_gpus
from meshformer.data.base import SampledData
from meshformer.job import train
from meshformer.model import Head, attention, head
from meshformer.optim.muon import multiplies_bfloat16, orthogonalisation_dtype
from meshformer.parallel import check as parallel_check
from meshformer.parallel.mesh import AXES
from meshformer.parallel.strategies import make_strategy
from meshformer.parallel.strategy import MeshStrategy
from meshformer.training.step import reseed

RESOLVE, CHECK = sys.modules["meshformer.config.resolve"], parallel_check
CUDA, CPU = torch.device("cuda", 1), torch.device("cpu")
ASKED = ("is_available", "device_count", "_lazy_init", "current_device", "get_device_capability", "get_device_properties", "synchronize")


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that would fail at whatever it were asked about GPUs."""

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("CUDA was asked on a machine without")

    for name in ASKED:
        monkeypatch.setattr(torch.cuda, name, fails)


@pytest.fixture(params=[8, 7], ids=["with bf16", "without bf16"])
def present(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Two GPUs of compute capability 8 or 7; whether they multiply bf16."""
    card = SimpleNamespace(major=request.param, minor=0, name="a card", total_memory=2**34)
    for name, value in {
        "is_available": True, "device_count": 2, "current_device": 0, "get_device_properties": card, "get_device_name": "a card",
        "mem_get_info": (2**33, 2**34), "_lazy_init": None, "synchronize": None, "max_memory_allocated": 3 * 2**30, "max_memory_reserved": 2**32,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value, **kwargs: value)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(RESOLVE, "_torch_has_cuda", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeDriver([request.param] * 2))
    return request.param >= 8


class FakeDriver:
    """The part of NVML that is asked; `failing` names the call that does not succeed."""

    def __init__(self, capabilities: list[int], failing: str = ""):
        self.capabilities, self.failing, self.open = capabilities, failing, 0

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*args: Any) -> int:
            if name == self.failing:
                return 999
            self.open += {"nvmlInit_v2": 1, "nvmlShutdown": -1}.get(name, 0)
            if name == "nvmlDeviceGetCount_v2":
                args[0]._obj.value = len(self.capabilities)
            elif name == "nvmlDeviceGetHandleByIndex_v2":
                args[1]._obj.value = 1 + args[0]
            elif name == "nvmlDeviceGetCudaComputeCapability":
                args[1]._obj.value = self.capabilities[args[0].value - 1]
            return 0

        return call


def settled(composed: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return settle({**composed, "trainer": {**composed["trainer"], "precision": "auto", **changes}})


@pytest.fixture(scope="module")
def composed() -> dict[str, Any]:
    from meshformer.command.compose import compose_config, make_hydra, plain

    return plain(compose_config(make_hydra(), "train", []))


# --- config/: without torch


@pytest.mark.parametrize(
    ("shown", "gpus"), [(None, 0), ("", 0), ("-1", 0), ("0", 1), ("0,2,3", 3), ("0,-1,1", 1), ("GPU-8932f937,GPU-1", 2)]
)
def test_visible_gpus_are_those_that_cuda_would_see(shown: str | None, gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RESOLVE.glob, "glob", lambda pattern: [])
    env = {} if shown is None else {"CUDA_VISIBLE_DEVICES": shown}
    monkeypatch.setattr(RESOLVE, "_torch_has_cuda", lambda: True)
    assert visible_gpus(env) == gpus
    monkeypatch.setattr(RESOLVE, "_torch_has_cuda", lambda: False)
    assert visible_gpus(env) == 0


@pytest.mark.parametrize(
    ("built", "has"), [("cuda: Optional[str] = '13.0'", True), ('cuda = "12.8"', True), ("cuda: Optional[str] = None", False)]
)
def test_whether_torch_was_built_for_cuda_is_read_from_its_files(
    built: str, has: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "version.py").write_text(f"__version__ = '2.13.0'\ndebug = False\n{built}\nhip = None\n")
    places: list[Any] = [SimpleNamespace(submodule_search_locations=[str(tmp_path)])]
    monkeypatch.setattr(RESOLVE.importlib.util, "find_spec", lambda name: places[0])
    assert RESOLVE._torch_has_cuda() is has
    for places[0] in (None, SimpleNamespace(submodule_search_locations=[str(tmp_path / "nowhere")])):
        assert RESOLVE._torch_has_cuda() is False


@pytest.mark.parametrize(
    ("capabilities", "failing", "multiply"),
    [([9, 9], "", True), ([8], "", True), ([7], "", False), ([9, 7], "", False), ([], "", True), ([7], "nvmlInit_v2", True),
     ([7], "nvmlDeviceGetCudaComputeCapability", True), ([7], "nvmlDeviceGetHandleByIndex_v2", True)],
)  # fmt: skip
def test_the_driver_tells_whether_gpus_multiply_bf16(
    capabilities: list[int], failing: str, multiply: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = FakeDriver(capabilities, failing)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert gpus_multiply_bf16() is multiply
    assert driver.open == 0, "opened and not closed"


def test_without_the_drivers_library_the_job_finds_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", nowhere)
    assert gpus_multiply_bf16() is True
    monkeypatch.setattr(train, "multiplies_bfloat16", lambda kind: False)
    with pytest.raises(ConfigError, match=r"trainer\.precision=bf16-mixed.*no bfloat16.*Use 32-true"):
        train.refuse_emulation(CUDA, "bf16-mixed")
    for device, precision in ((CPU, "bf16-mixed"), (CUDA, "32-true"), (CUDA, "16-mixed")):
        train.refuse_emulation(device, precision)


def test_precision_is_chosen_by_the_gpu(present: bool, composed: dict[str, Any]) -> None:
    trainer = settled(composed)["trainer"]
    assert (trainer["accelerator"], trainer["precision"]) == ("gpu", "bf16-mixed" if present else "32-true")
    for precision in ("bf16-mixed", "bf16-true"):
        if present:
            assert settled(composed, precision=precision)["trainer"]["precision"] == precision
        else:
            with pytest.raises(ConfigError, match="no bfloat16 matrix units") as caught:
                settled(composed, precision=precision)
            assert caught.value.key == "trainer.precision"
    assert settled(composed, accelerator="cpu", precision="bf16-mixed")["trainer"]["precision"] == "bf16-mixed", (
        "the processor's own matter"
    )


def test_without_a_gpu_nothing_asks_for_one(absent: None, composed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RESOLVE, "_torch_has_cuda", lambda: False)
    monkeypatch.setattr(CHECK, "gpus_multiply_bf16", lambda: pytest.fail("asked"))
    assert settled(composed)["trainer"]["accelerator"] == "cpu"
    with pytest.raises(ConfigError, match="no NVIDIA GPU"):
        settled(composed, accelerator="gpu", precision="32-true")


# --- with torch


def test_muon_orthogonalises_in_what_the_device_multiplies(present: bool) -> None:
    assert multiplies_bfloat16("cuda") is present
    assert orthogonalisation_dtype("auto", CUDA, torch.float32) is (torch.bfloat16 if present else torch.float32)
    if present:
        train.refuse_emulation(CUDA, "bf16-mixed")
    else:
        with pytest.raises(ConfigError, match="no bfloat16"):
            train.refuse_emulation(CUDA, "bf16-mixed")


def test_muon_asks_no_gpu_for_a_cpu(absent: None) -> None:
    assert multiplies_bfloat16("meta") is False
    assert multiplies_bfloat16("cpu") in (True, False)


def test_doctor_tells_what_auto_means(present: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[str, torch.dtype]] = []
    monkeypatch.setattr(throughput, "measure_matrix_rate", lambda device, dtype, seconds: measured.append((device.type, dtype)) or 1e12)
    facts = dict(doctor.facts())
    assert facts["GPUs"].count("a card") == 2
    assert facts["bfloat16"].endswith("auto means bf16-mixed" if present else "auto means 32-true")
    assert measured == [("cuda", torch.float32)] + [("cuda", torch.bfloat16)] * present


def test_a_gpus_memory_is_told_and_a_cpus_process(present: bool) -> None:
    assert throughput.peak_memory(CUDA) == 3 * 2**30
    assert (throughput.peak_memory(CPU) or 1) != 3 * 2**30
    rows = []
    for device in (CUDA, CPU):
        measuring = throughput.Throughput()
        measuring.matrix_rate = 1e12
        trainer: Any = SimpleNamespace(global_step=1, world_size=1, datamodule=None)
        rows.append(measuring.measure(trainer, SimpleNamespace(device=device, tokens_per_step=8, flops_per_token=2)))
    assert (rows[0]["train/peak_memory_gib"], rows[0]["train/reserved_memory_gib"]) == (3, 4)
    assert "train/reserved_memory_gib" not in rows[1] and rows[1]["train/data_wait_ms"] == 0


def test_the_measured_rate_leaves_no_floor_under_a_gpus_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in device: everything is computed on the CPU, and what CUDA is told is noted."""
    told: list[str] = []
    generator, empty = torch.Generator, torch.empty
    monkeypatch.setattr(torch, "Generator", lambda device: generator())
    monkeypatch.setattr(torch, "empty", lambda *size, device, dtype: empty(*size, dtype=dtype))
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *args, name=name: told.append(name))
    assert throughput.measure_matrix_rate(CUDA, torch.float32, 0.005) > 0
    assert told[-2:] == ["empty_cache", "reset_peak_memory_stats"] and told.count("synchronize") > 2


def test_dropout_is_seeded_on_the_tasks_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[tuple[int, int]] = []
    generators = [SimpleNamespace(manual_seed=lambda seed, i=i: seeded.append((i, seed))) for i in range(2)]
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    reseed(CUDA, 5, 0)
    ((index, seed),) = seeded
    assert index == 1 and torch.default_generator.initial_seed() == seed
    monkeypatch.setattr(torch.cuda, "default_generators", ())
    reseed(CPU, 5, 1)
    assert torch.default_generator.initial_seed() != seed


@pytest.mark.parametrize(("device", "pinned", "backend"), [(CUDA, True, "cpu:gloo,cuda:nccl"), (CPU, False, "gloo")], ids=["cuda", "cpu"])
def test_batches_are_pinned_and_groups_made_for_the_device(device: torch.device, pinned: bool, backend: str) -> None:
    around: Any = SimpleNamespace(trainer=SimpleNamespace(strategy=SimpleNamespace(root_device=device)))
    assert SampledData._on_gpu(around) is pinned
    strategy = make_strategy({"name": "fsdp", "timeout": 1, **dict.fromkeys(AXES, 1)}, device=str(device))
    assert isinstance(strategy, MeshStrategy) and strategy.process_group_backend == backend


def test_on_a_cpu_nothing_of_the_model_is_compiled_or_asks(absent: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_compiled", lambda: pytest.fail("compiled"))
    monkeypatch.setattr(attention, "_compiled", lambda kernel: pytest.fail("compiled"))
    positions = torch.arange(8)[None]
    mask = attention.Mask(True, 3, positions, positions)
    q = torch.randn(1, 2, 8, 16)
    assert torch.allclose(attention.attend_auto(q, q, q, mask), attention.attend_reference(q, q, q, mask), atol=1e-5)
    Head(8, 5)(torch.randn(1, 4, 8), targets=torch.zeros(1, 4, dtype=torch.int64)).backward()


@pytest.mark.parametrize("choice", ["high", "highest"])
def test_tf32_is_what_the_configuration_says(tmp_path: Path, choice: str) -> None:
    try:
        run_tiny(tmp_path, "run", "trainer.max_steps=1", f"trainer.matmul_precision={choice}", "~callbacks.checkpoint")
        assert torch.get_float32_matmul_precision() == choice
        assert torch.backends.cudnn.allow_tf32 is (choice == "high")
    finally:
        train.choose_tf32("highest")


# --- the list

PLACES = {
    "bench/__main__.py": "the choice of the user",
    "bench/gpu.py": "a command for a GPU (tests/test_gpu_bench.py)",
    "bench/gpu_parts.py": "the same",
    "callbacks/throughput.py": "here", "config/resolve.py": "here", "data/base.py": "here", "command/doctor.py": "here",
    "model/attention.py": "here, and what `auto` picks (tests/model/test_flex.py)",
    "model/head.py": "here", "optim/muon.py": "here", "optim/shardwise.py": "here", "parallel/strategy.py": "here", "training/step.py": "here",
    "job/train.py": "here", "job/build.py": "here",
    "command/sweep/local.py": "which GPUs a job of a sweep is shown (tests/test_sweep_parts.py)", "command/sweep/run.py": "the same",
    "parallel/check.py": "words of a message",
    "callbacks/profile.py": "which device is recorded; the split is tested on traces made by hand (tests/profile/test_parts.py)",
    "profile/trace.py": "the same",
    "plan/measure.py": "which file of conf/cluster/ has this card (tests/plan/test_predictions.py)",
    "parallel/products.py": "refused without a GPU (tests/parallel/test_products.py)",
}  # fmt: skip


def test_every_place_that_names_cuda_is_known() -> None:
    root = Path(meshformer.__file__).parent
    found = set()
    for file in root.rglob("*.py"):
        tree = ast.parse(file.read_text())
        told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
        for node in ast.walk(tree):
            name = (
                node.attr
                if isinstance(node, ast.Attribute)
                else node.value
                if isinstance(node, ast.Constant) and id(node) not in told
                else ""
            )
            if isinstance(name, str) and re.search(r"(\b|_)(cuda|cudnn|nvidia)", name, re.IGNORECASE):
                found.add(file.relative_to(root).as_posix())
    assert found == set(PLACES)
