"""`meshformer doctor`: measure what this machine can run, and test that training on two processes gives the losses of one."""

from __future__ import annotations

import contextlib
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from meshformer.command.compose import compose
from meshformer.command.launch import launch
from meshformer.config.paths import default_cache
from meshformer.config.resolve import cores, cpu_multiplies_bf16
from meshformer.importing import heavy_imports
from meshformer.printing import say
from meshformer.record.metrics_csv import read_metrics
from meshformer.record.run_json import installed_versions

TOLERANCE = 1e-5
TEST = [
    "data=text", "data.context_length=16", "data.batch_size=8", "model=nano", "model.n_layers=2", "model.d_model=32", "optimizer=sgd",
    "optimizer.lr=0.1", "schedule=constant", "trainer.max_steps=10", "trainer.log_every_n_steps=1", "trainer.progress=false",
    "trainer.precision=32-true", "trainer.accelerator=cpu", "logger=csv", "callbacks={}",
]  # fmt: skip


def doctor() -> int:
    """Print one fact per line and run the self-test; return 0 if it passes, else 1."""
    for name, fact in facts():
        say(f"{name:<22}{fact}")
    begun = time.monotonic()
    say(f"{'self-test':<22}2 processes, strategy=fsdp, 10 steps … ", end="")
    try:
        difference = self_test()
    except Exception as error:
        say(f"failed: {type(error).__name__}: {error}")
        return 1
    fine = difference < TOLERANCE
    say(f"{'ok' if fine else 'WRONG'}: losses within {difference:.0e} of one process's ({time.monotonic() - begun:.0f} s)")
    return 0 if fine else 1


def facts() -> list[tuple[str, str]]:
    """Return (name, text) for each line of the report; measuring takes about a second."""
    with heavy_imports():
        import torch
        import torch.distributed as dist

        from meshformer.callbacks.throughput import measure_matrix_rate

    devices = [f"{torch.cuda.get_device_name(i)} ({_gib(torch.cuda.mem_get_info(i)[1])})" for i in range(torch.cuda.device_count())]
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    cpu = next((line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")), platform.machine())
    backends = [name for name in ("gloo", "nccl", "mpi") if getattr(dist, f"is_{name}_available")()]
    device = torch.device("cuda", 0) if devices else torch.device("cpu")
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if devices else cpu_multiplies_bf16()
    rates = {"float32": torch.float32} | ({"bfloat16": torch.bfloat16} if bf16 else {})
    measured = ", ".join(f"{name} {measure_matrix_rate(device, dtype, 0.5) / 1e9:,.0f} GFLOP/s" for name, dtype in rates.items())
    here, cache = Path.cwd(), Path(default_cache()).expanduser()
    versions = installed_versions()
    return [
        ("processor", f"{cpu}, {cores()} cores usable, {torch.backends.cpu.get_cpu_capability()}"),
        ("memory", _gib(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))),
        ("GPUs", ", ".join(devices) or "none that this torch can use"),
        ("bfloat16", f"{'native' if bf16 else 'emulated, slow'}: trainer.precision=auto means {'bf16-mixed' if bf16 else '32-true'}"),
        ("matrix rate", f"{measured} on {device.type}, {torch.get_num_threads()} threads"),
        ("process groups", ", ".join(backends)),
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("packages", ", ".join(f"{name} {version}" for name, version in versions.items() if name != "python")),
        ("free disk", f"{_gib(shutil.disk_usage(here).free)} here, {_gib(shutil.disk_usage(_existing(cache)).free)} for {cache}"),
    ]  # fmt: skip


def self_test() -> float:
    """Return the largest difference between the losses of a run on two FSDP processes and one on a single process."""
    with tempfile.TemporaryDirectory() as scratch, silence():
        text = Path(scratch) / "text.txt"
        draw = random.Random(0)
        text.write_text(" ".join("".join(draw.choices("abcdefgh", k=draw.randint(2, 5))) for _ in range(1500)))
        losses: list[list[float]] = []
        for name, layout in (("one", ["strategy=single"]), ("two", ["strategy=fsdp", "trainer.devices=2"])):
            folder = Path(scratch) / name
            folder.mkdir()
            config: dict[str, Any] = compose(
                [*TEST, f"data.files=[{text}]", f"paths.data={scratch}/cache", f"paths.runs={scratch}", *layout]
            )
            launch(config, folder, own_process=True)
            losses.append([float(row["train/loss"]) for row in read_metrics(folder / "metrics.csv")])
        return max(abs(a - b) for a, b in zip(*losses, strict=True))


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Discard what this process and its children print to stdout."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)


def _gib(number: float) -> str:
    return f"{number / 2**30:,.1f} GiB"
