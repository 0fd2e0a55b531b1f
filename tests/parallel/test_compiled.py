"""Compiled, a block is one full graph, and all blocks of a model share it: one compilation for training and one for evaluation.

Counted with a backend that compiles nothing: where a graph breaks, and when it is traced anew, is decided before any backend.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from harness import run_ranks
from jobs import run_tiny, tiny_config
from meshformer.model import Transformer, attention, position
from meshformer.parallel import memory_options
from meshformer.parallel.memory_options import apply_memory_options

LAYERS = 10  # more than the eight compilations of one function that torch allows
ONCE_EACH = {"graphs": 2, "breaks": 0}  # one for training, one for evaluation, which keeps nothing for a backward pass
RUN = [
    "trainer.compile=true", f"model.n_layers={LAYERS}", "trainer.max_steps=2", "trainer.val_check_interval=1", "trainer.limit_val_batches=2",
    "~callbacks.checkpoint",
]  # fmt: skip


class Counting:
    """Takes the place of the compiler."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch | None = None):
        torch._dynamo.reset()
        counters.clear()
        self.backend = CompileCounterWithBackend("eager")
        if monkeypatch is not None:
            monkeypatch.setattr(memory_options, "BACKEND", self.backend)
        else:  # in a process of its own
            memory_options.BACKEND = self.backend

    @property
    def found(self) -> dict[str, int]:
        return {"graphs": self.backend.frame_count, "breaks": sum(counters["graph_break"].values())}


def use(model: nn.Module, batches: int = 2, bf16: bool = False) -> None:
    """Training, evaluation, and both once more on another batch of the same shape."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for _ in range(batches):
            tokens = torch.randint(13, (2, 16))
            model.train()(tokens).sum().backward()
            with torch.no_grad():
                model.eval()(tokens)


def compiled(**options: Any) -> Transformer:
    model = Transformer(13, LAYERS, 4, 32, 16, **options)
    apply_memory_options(model.blocks, "none", compile=True)
    return model


@pytest.mark.parametrize("where", ["NoPosition", "Sinusoidal", "Learned", "Rotary", "Alibi", "PositionalAttention"])
@pytest.mark.parametrize("kernel", ["attend_reference", "attend_fused", "attend_auto"])
def test_blocks_share_one_graph(monkeypatch: pytest.MonkeyPatch, kernel: str, where: str) -> None:
    counting = Counting(monkeypatch)
    # as Hydra makes them
    use(compiled(attention=partial(getattr(attention, kernel)), position=partial(getattr(position, where))))
    assert counting.found == ONCE_EACH


@pytest.mark.parametrize(
    "options",
    [{"dropout": 0.1}, {"window": 5}, {"n_kv_heads": 2, "activation": "swiglu"}, {"norm": "layer", "norm_position": "post", "bias": True}],
    ids=str,
)
def test_other_blocks_do_as_well(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    counting = Counting(monkeypatch)
    use(compiled(**options), bf16=True)
    assert counting.found == ONCE_EACH


def in_a_run(folder: Path, *overrides: str) -> dict[str, int]:
    counting = Counting()
    run_tiny(folder, "run", *overrides)
    return counting.found


@pytest.mark.parametrize(
    ("processes", "overrides"),
    [
        (1, ["strategy=single", "model/attention=reference"]),
        (2, ["strategy=ddp", "model/attention=fused"]),
        (2, ["strategy=fsdp", "strategy.activation_checkpointing=full"]),
        (2, ["strategy=tensor"]),
        pytest.param(2, ["strategy=tensor", "model/position=alibi", "model/attention=reference"], marks=pytest.mark.slow),
        pytest.param(2, ["strategy=tensor", "model/position=positional_attention", "strategy.sequence_parallel=false"], marks=pytest.mark.slow),
        (2, ["strategy=context"]),
        (2, ["strategy=pipeline"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_run_compiles_once_for_training_and_once_for_validation(tmp_path: Path, processes: int, overrides: list[str]) -> None:
    """Nor does the text that it ends with, a token at a time, compile anything."""
    settings = [*overrides, f"trainer.devices={processes}", *RUN]
    tiny_config(tmp_path, *settings)  # once, for all ranks
    for found in run_ranks(processes, in_a_run, tmp_path, *settings):
        assert found == ONCE_EACH


def test_batches_of_many_lengths_need_few_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of texts: after the first batch of another length, and of another number of them, one graph serves all."""
    counting, model = Counting(monkeypatch), compiled(causal=False)
    for samples, length in ((4, 12), (4, 7), (4, 16), (3, 9), (4, 11), (2, 5), (3, 16)):
        tokens = torch.randint(13, (samples, length))
        model.train()(tokens, documents_BT=tokens % 2).sum().backward()
        with torch.no_grad():
            model.eval()(tokens, documents_BT=tokens % 2)
    assert counting.found["breaks"] == 0 and 2 < counting.found["graphs"] <= 6, counting.found
