"""Compare plan/live_memory.py with published memory figures, and show what it costs to count a large candidate."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from meshformer.command.compose import compose
from meshformer.parallel import memory_options
from meshformer.plan.live_memory import live_memory
from meshformer.tasks import LanguageModelling

Config = dict[str, Any]
GIB = 2**30
SIZES_8B = {
    "vocab_size": 128_256, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "d_model": 4096, "d_ff": 14_336, "activation": "swiglu",
    "tie_embeddings": False, "qk_norm": False, "context_length": 8192,
}  # fmt: skip
SIZES_70B = {**SIZES_8B, "n_layers": 80, "n_heads": 64, "d_model": 8192, "d_ff": 28_672}
SELECTIVE = ["strategy=fsdp", "strategy.activation_checkpointing=selective", "strategy.reduce_dtype=float32"]
FULL = ["strategy=fsdp_tensor", "strategy.tensor=8", "strategy.activation_checkpointing=full", "strategy.reduce_dtype=float32"]
# name -> sizes, processes, samples in a global batch, overrides, whether the loss and the checkpointing are torchtitan's
CASES: dict[str, tuple[dict[str, Any], int, int, list[str], bool]] = {
    "8B, FSDP 8, as published": (SIZES_8B, 8, 16, SELECTIVE, True),
    "8B, FSDP 128, as published": (SIZES_8B, 128, 256, SELECTIVE, True),
    "8B, FSDP 8, ours": (SIZES_8B, 8, 16, SELECTIVE, False),
    "70B, FSDP 32 × tensor 8, ours": (SIZES_70B, 256, 512, FULL, False),
}
# GiB that torchtitan reports (docs/performance.md, Llama 3.1 8B on H100, without compile): `max_memory_reserved` of CUDA's allocator
PUBLISHED = {"8B, FSDP 8, as published": 82.4, "8B, FSDP 128, as published": 67.0}
_CHILD = "import json, sys; from meshformer.bench.memory_plan import measure; print(json.dumps(measure(sys.argv[1])))"


def config_of(sizes: dict[str, Any], processes: int, samples: int, overrides: list[str]) -> Config:
    """A Llama on GPUs with 8 to a node: fp32 weights, gathered and computed with in bf16, AdamW."""
    small = ["model=custom", "model.n_layers=1", "model.n_heads=8", "model.d_model=64", "optimizer=adamw", "strategy.param_dtype=bfloat16"]
    nodes = ["trainer.devices=8", f"trainer.num_nodes={processes // 8}", "trainer.precision=32-true", f"data.batch_size={samples}"]
    config = compose([*small, *nodes, *overrides])
    # Set after compose(), whose checks would refuse such a model on this machine.
    config["model"] |= sizes
    config["data"]["context_length"], config["trainer"]["accelerator"] = sizes["context_length"], "gpu"
    return config


@contextmanager
def as_published() -> Iterator[None]:
    """Where torchtitan's runs differ from ours: all logits at once, in bf16 and then in fp32; selective checkpointing by operator, which saves
    every second matrix product (of 7 in a block) and the result of attention; one FSDP unit for embedding, norm and head, as ours."""

    def contexts() -> Any:
        products = {False: 0, True: 0}  # in the forward pass, in the recomputation

        def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            name, again = str(operation), context.is_recompute
            products[again] += name.startswith("aten.mm.")
            kept = "scaled_dot_product" in name or (name.startswith("aten.mm.") and products[again] % 2 == 1)
            return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

        return create_selective_checkpoint_contexts(policy)

    before = memory_options.create_selective_checkpoint_contexts, LanguageModelling.large
    memory_options.create_selective_checkpoint_contexts, LanguageModelling.large = lambda _: contexts(), sys.maxsize
    try:
        yield
    finally:
        memory_options.create_selective_checkpoint_contexts, LanguageModelling.large = before


def measure(name: str) -> dict[str, Any]:
    """The figures of one of CASES, in GiB, and the CPU seconds they took. Once a process."""
    sizes, processes, samples, overrides, published = CASES[name]
    config, began = config_of(sizes, processes, samples, overrides), time.process_time()
    if published:
        with as_published():
            found = live_memory(config)
    else:
        found = live_memory(config)
    kinds = {kind: size / GIB for kind, size in found.kinds.items()}
    return {
        "peak": found.peak / GIB,
        "reserved": found.reserved / GIB,
        "where": found.where,
        "kinds": kinds,
        "cpu": time.process_time() - began,
    }


def measure_apart(name: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", _CHILD, name], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def report_memory_plan(options: argparse.Namespace) -> None:
    """Print live and reserved memory of each case beside the published figure."""
    print("  live: tensors alive at the peak; reserved: what PyTorch's allocator would hold; published: what it held")
    for name in CASES:
        found = measure_apart(name)
        published = f"{PUBLISHED[name]:.1f} GiB published" if name in PUBLISHED else ""
        figures = f"{found['peak']:6.1f} GiB live, {found['reserved']:6.1f} reserved, {found['cpu']:5.1f} CPU s"
        print(f"  {name:<32}{figures}  {published}\n    {found['where']}: {', '.join(f'{k} {v:.1f}' for k, v in found['kinds'].items())}")
