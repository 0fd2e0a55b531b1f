"""Measure time and memory for one of eight ranks to build its part of a model with 8 billion parameters.

torch's fake process group, which does not communicate, stands in for the other seven, so that one machine is enough.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from meshformer.command.compose import compose
from meshformer.compat.torch_distributed import init_fake_process_group
from meshformer.job.build import build_model
from meshformer.parallel.pipeline import local_tensor
from meshformer.parallel.strategies import make_strategy

RANKS = 8
LARGE = {
    "vocab_size": 128_256, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "d_model": 4096, "d_ff": 14_336, "activation": "swiglu",
    "tie_embeddings": False, "zero_init": False,
}  # fmt: skip
LAYOUTS = ("fsdp", "tensor")
_CHILD = "import json, sys; from meshformer.bench.drawing import measure_in_process; print(json.dumps(measure_in_process(*json.loads(sys.argv[1]))))"


class _Task(nn.Module):
    """The attributes of a task that the strategy uses to build a model."""

    def __init__(self, model: nn.Module, seed: int):
        super().__init__()
        self.model, self.seed = model, seed


def build_part(layout: str, sizes: dict[str, Any], rank: int = 0) -> Any:
    """Build and initialise, on a CPU, the part of a Transformer with these `sizes` that `rank` holds under strategy=`layout`.

    Leaves torch's fake process group initialised.
    """
    small = ["model=custom", "model.n_layers=1", "model.n_heads=8", "model.d_model=64"]
    config = compose([*small, f"strategy={layout}", f"trainer.devices={RANKS}", "trainer.accelerator=cpu"])
    # The real sizes are set after compose(), whose checks would refuse a model too large for this machine: one rank builds only its own part.
    config["model"] |= {"vocab_size": 64, **sizes}
    if not dist.is_initialized():
        init_fake_process_group(rank, RANKS)
    strategy: Any = make_strategy(config["strategy"], context_length=config["data"]["context_length"])
    strategy.parallel_devices = [torch.device("cpu")] * RANKS
    strategy.make_mesh()
    with torch.device("meta"):
        task: Any = _Task(build_model(config), config["seed"])
    strategy.connect(task)
    strategy._build(task)
    return task.model


def measure_in_process(layout: str, sizes: dict[str, Any]) -> dict[str, float]:
    """Build the part in this process and return wall-clock `seconds`, processor seconds `cpu`, and bytes: of the part (`own`), and resident in the
    process `before` building it and at its `peak`."""
    torch.set_num_threads(1)  # eight ranks share a machine
    build_part(layout, {})  # warm-up, so that torch's lazy imports are not counted
    before, begun, worked = _kib("VmRSS"), time.perf_counter(), time.process_time()
    model = build_part(layout, sizes)
    seconds, cpu = time.perf_counter() - begun, time.process_time() - worked
    held = [(p.numel(), local_tensor(p).numel() * p.element_size()) for p in model.parameters()]
    parameters, own = (sum(column) for column in zip(*held, strict=True))
    return {"seconds": seconds, "cpu": cpu, "parameters": parameters, "own": own, "before": 1024 * before, "peak": 1024 * _kib("VmHWM")}


def _kib(field: str) -> int:
    return int(Path("/proc/self/status").read_text().partition(f"{field}:")[2].split()[0])


def measure(layout: str, sizes: dict[str, Any]) -> dict[str, float]:
    """Run `measure_in_process` in a new process."""
    done = subprocess.run([sys.executable, "-c", _CHILD, json.dumps([layout, sizes])], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def report_drawing(options: argparse.Namespace) -> None:
    """Print seconds on one thread, and peak memory as a multiple of the rank's part, with and without the libraries."""
    for layout in LAYOUTS:
        found = measure(layout, LARGE)
        own, peak = found["own"], found["peak"]
        print(
            f"  strategy={layout:<7} {found['parameters'] / 1e9:.2f} billion parameters over {RANKS} ranks: {own / 2**30:.2f} GiB of each "
            f"in {found['seconds']:.1f} s ({found['cpu']:.1f} s of the processor); {peak / own:.2f} times that memory, "
            f"{(peak - found['before']) / own:.2f} without the libraries"
        )
