"""Kept honest for CUDA without one: on the `meta` device a tensor has no numbers, so whatever asks for one raises, as does most that mixes
devices. Model, loss and the whole step between two rows run there. What may ask stands in `MAY_ASK`, each with its reason."""

from __future__ import annotations

import ast
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import meshformer
from meshformer.callbacks import Spike
from meshformer.model import (
    Alibi,
    Learned,
    NoPosition,
    PositionalAttention,
    Rotary,
    Sinusoidal,
    Transformer,
    attend_auto,
    attend_fused,
    attend_reference,
    head,
)
from meshformer.optim import adamw, constant, muon, sgd, shardwise
from meshformer.tasks import LanguageModelling, MaskedLanguageModelling
from meshformer.tasks.language_modelling import summed_cross_entropy
from meshformer.training.protocol import StepStrategy

B, T, V = 2, 16, 31
POSITIONS: dict[str, Callable[..., Any]] = {
    "rotary": Rotary, "sinusoidal": Sinusoidal, "learned": Learned, "alibi": Alibi,
    "positional attention": PositionalAttention, "sine alone": partial(PositionalAttention, sine_only=True), "none": NoPosition,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {"plain": {}, "window": {"window": 4}, "documents": {}, "grouped queries": {"n_kv_heads": 2}}


def batch(packed: bool = False) -> dict[str, Tensor]:
    names = ("tokens", "targets", "positions", "documents") if packed else ("tokens", "targets")
    return {name: torch.zeros(B, T, dtype=torch.long, device="meta") for name in names}


def network(**settings: Any) -> Transformer:
    with torch.device("meta"):
        return Transformer(V, 2, 4, 32, T, **settings)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("attend", [attend_reference, attend_fused, attend_auto], ids=lambda kernel: kernel.__name__)
def test_model_loss_and_backward_ask_the_device_nothing(attend: Any, position: str, kind: str) -> None:
    model, data = network(attention=attend, position=POSITIONS[position], **KINDS[kind]), batch(kind == "documents")
    packed = {"positions_BT": data["positions"], "documents_BT": data["documents"]} if kind == "documents" else {}
    summed_cross_entropy(model(data["tokens"], **packed), data["targets"]).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def test_the_heads_own_loss_asks_the_device_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "AT_ONCE", 8 * V)
    model, data = network(tie_embeddings=False, head_bias=True), batch()
    model(data["tokens"], targets_BT=data["targets"]).backward()
    assert all(p.grad is not None for p in model.parameters())


# --- a whole step


class OneProcess(StepStrategy):
    lightning_module: Any = None
    precision_plugin: Any = SimpleNamespace(train_step_context=nullcontext)
    global_rank, is_global_zero, break_it = 0, True, None

    @property
    def model(self) -> Any:
        return self.lightning_module

    def batch_to_device(self, batch: Any, *more: Any) -> Any:
        return batch

    def backward(self, loss: Tensor, optimizer: None) -> None:
        loss.backward()
        if self.break_it is not None:
            self.break_it(loss)

    def reduce(self, x: Tensor, reduce_op: str) -> Tensor:
        assert x.device.type == "meta", "NCCL takes no tensor of the host"
        return x * 1


def trainer_of(task: Any, optimizer: Any, schedule: Any, break_it: Any) -> Any:
    strategy = OneProcess()
    strategy.lightning_module, strategy.break_it = task, break_it
    config = SimpleNamespace(scheduler=schedule, interval="step", frequency=1)
    trainer = SimpleNamespace(strategy=strategy, callbacks=[], global_step=0, training=True, is_last_batch=False, lr_scheduler_configs=[config])
    task._trainer, task.optimizers, task._on_before_batch_transfer = trainer, lambda: Optimizer(optimizer), lambda batch: batch
    return trainer


class Optimizer:
    """What Lightning gives a task for its optimizer."""

    def __init__(self, optimizer: Any):
        self.optimizer, self.param_groups, self.zero_grad, self.step = optimizer, optimizer.param_groups, optimizer.zero_grad, optimizer.step


OPTIMIZERS = {"adamw": adamw, "muon": muon, "sgd": partial(sgd, momentum=0.9, weight_decay=0.1)}
PRECISIONS = {"fp32": torch.float32, "bf16-true": torch.bfloat16}  # torch has no autocast for meta


def steps(optimizer: str, precision: str, monkeypatch: pytest.MonkeyPatch, break_it: Any = None, task_class: Any = LanguageModelling) -> Any:
    """Two steps of two micro-batches each on the meta device, clipped and guarded, spikes skipped; the kernels of the optimizers stand in, for
    meta has no fused ones."""
    called: list[str] = []

    def kernel(name: str) -> Any:
        def update(parameters: list[Tensor], gradients: list[Tensor], *state: Any, found_inf: Any = None, **settings: Any) -> None:
            assert isinstance(found_inf, Tensor) and found_inf.device.type == "meta", "skipping is settled on the device"
            called.append(name)
            for p, gradient in zip(parameters, gradients, strict=True):
                p.add_(gradient)

        return update

    monkeypatch.setattr(shardwise, "FUSED_DEVICES", ("meta",))
    monkeypatch.setattr(shardwise, "functional_adamw", kernel("adamw"))
    monkeypatch.setattr(shardwise, "functional_sgd", kernel("sgd"))
    task: Any = task_class(partial(network, causal=task_class is LanguageModelling), OPTIMIZERS[optimizer], constant, max_steps=4)
    task.configure_model()
    task._device = torch.device("meta")
    task.model.to(PRECISIONS[precision])
    task.gradient_clip_val = 1.0
    made = task.configure_optimizers()
    trainer = trainer_of(task, made["optimizer"], made["lr_scheduler"]["scheduler"], break_it)
    task.on_train_start()
    Spike(2.0, 4).on_train_start(trainer, task)
    for step in range(2):
        trainer.global_step = step
        task.training_step([batch(), batch()], step)
    assert called, "the kernels ran"
    return task


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_asks_the_device_nothing(optimizer: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = steps(optimizer, precision, monkeypatch)
    assert task.grad_norm.device.type == "meta"
    with pytest.raises(RuntimeError, match="meta"):  # a row may ask
        task.running_metrics()


def test_a_step_whose_head_sums_the_loss_asks_nothing_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LanguageModelling, "large", 0)
    steps("adamw", "fp32", monkeypatch)
    steps("adamw", "fp32", monkeypatch, task_class=MaskedLanguageModelling)


@pytest.mark.parametrize("ask", [torch.Tensor.item, bool, lambda loss: loss + torch.ones(1)], ids=["a number", "a truth value", "another device"])
def test_what_asks_is_seen(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="meta"):  # named as the device that has no numbers, or as the other of two devices
        steps("adamw", "fp32", monkeypatch, break_it=ask)


# --- the places that may ask

ASKS = ("item", "tolist", "cpu", "numpy", "nonzero", "equal", "is_nonzero", "synchronize")
MAY_ASK = {
    "callbacks/nonfinite.py": {"state_dict": "a checkpoint"},
    "callbacks/preemption.py": {"_agreed": "numbers of the host, over the group of host processes"},
    "callbacks/samples.py": {"continuation": "samples, at a validation"},
    "callbacks/throughput.py": {"_wait": "the measurement of the device's rate, once at the start"},
    "model/ctc.py": {"greedy": "text, at a validation", "beam_search": "the same", "align": "a figure"},
    "optim/gather_compute_scatter.py": {"mesh_ranks": "numbers of ranks, once"},
    "parallel/pipeline.py": {"_check_same_batch": "that ranks see one batch, at the first"},
    "parallel/stages.py": {"check_between": "whether the model may be cut there, at the first batch"},
    "parallel/strategy.py": {"whole_weights": "samples and exports", "reduce_boolean_decision": "Lightning asks at the end of a validation"},
    "tasks/classification.py": {"results": "the end of a run", "drawings": "the same"},
    "tasks/speech_recognition.py": {"_transcribe": "text, at a validation", "text_of": "the same", "sample_text": "after it"},
    "training/guard.py": {"summarise": "a row or a checkpoint", "_read_pending": "the same, or 1,024 notes", "_on_host": "of _read_pending"},
}


def askers() -> dict[str, set[str]]:
    """By file, the functions of the rooms that a step walks through in which one of `ASKS` is called."""
    root = Path(meshformer.__file__).parent
    found: dict[str, set[str]] = {}
    for room in ("training", "tasks", "optim", "model", "parallel", "callbacks"):
        for file in sorted((root / room).glob("*.py")):
            for function in ast.walk(ast.parse(file.read_text())):
                if not isinstance(function, ast.FunctionDef):
                    continue
                names = [node.func.attr for node in ast.walk(function) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
                if any(name in ASKS for name in names):
                    found.setdefault(file.relative_to(root).as_posix(), set()).add(function.name)
    return found


def test_nobody_else_asks_the_device() -> None:
    assert askers() == {file: set(functions) for file, functions in MAY_ASK.items()}
