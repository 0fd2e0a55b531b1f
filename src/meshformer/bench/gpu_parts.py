"""The parts of `bench gpu` that run the model and the Trainer in this process: kernels, synchronisation, speed, memory."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from meshformer.bench.speed import PlainTransformer
from meshformer.callbacks import Checkpoint, Samples
from meshformer.callbacks.throughput import measure_matrix_rate, peak_memory
from meshformer.checkpoint.lightning_io import FolderCheckpointIO
from meshformer.command.compose import compose
from meshformer.job.build import build_callbacks, build_data, build_task, build_trainer
from meshformer.job.train import choose_tf32, quiet_libraries
from meshformer.model import Head, Transformer, attend_auto, attend_flex, attend_fused, attend_reference, training_flops_per_token
from meshformer.model.position import Alibi, Learned, NoPosition, PositionalAttention, Rotary, Sinusoidal
from meshformer.parallel.memory_options import apply_memory_options

if TYPE_CHECKING:
    from meshformer.bench.gpu import Bench

BUDGET_GIB = 32  # device memory that determines the batch size of the speed part
POSITIONS = {
    "sinusoidal": Sinusoidal, "learned": Learned, "rotary": Rotary, "alibi": Alibi, "positional_attention": PositionalAttention, "none": NoPosition,
}  # fmt: skip
SHAPES: dict[str, tuple[dict[str, Any], bool]] = {  # name -> (model settings, whether sequences are packed documents)
    "plain": ({}, False), "window": ({"window": 17}, False), "documents": ({}, True), "grouped queries": ({"n_kv_heads": 2}, False),
}  # fmt: skip


def right_kernels(bench: Bench) -> None:
    """Compare gradients of `fused` with `reference`, and of `reference` here with the CPU, for each position encoding and mask."""
    choose_tf32("highest")
    for shape, (settings, packed) in SHAPES.items():
        for name, position in POSITIONS.items():
            make = partial(Transformer, 84, 2, 4, 64, 128, position=position, **settings)
            base = _gradients(make(attention=attend_reference), torch.device("cpu"), packed)
            here = _gradients(make(attention=attend_reference), torch.device(bench.device), packed)
            fused = _gradients(make(attention=attend_fused), torch.device(bench.device), packed)
            if not packed and settings == {} and name in ("rotary", "alibi"):
                bench.add("kernels", f"reference here against the CPU, {name}", _difference(here, base), "relative", at_most=1e-4)
            bench.add("kernels", f"fused against reference, {name}, {shape}", _difference(fused, here), "relative", at_most=1e-4)
            if name in ("rotary", "alibi"):  # one without and one with a bias, since each compiles a new flex kernel
                flex = _gradients(make(attention=attend_flex), torch.device(bench.device), packed)
                bench.add("kernels", f"flex against reference, {name}, {shape}", _difference(flex, here), "relative", at_most=1e-3)
                torch.compiler.reset()  # dynamo runs code uncompiled after eight recompilations


def _gradients(model: Transformer, device: torch.device, packed: bool) -> Tensor:
    """Return all gradients of the mean loss on fixed tokens as one vector."""
    model = model.to(device)
    tokens = torch.randint(84, (3, 129), generator=torch.Generator().manual_seed(1)).to(device)
    documents = torch.arange(128, device=device).expand(3, -1) // 50 if packed else None
    logits = model(tokens[:, :-1], documents_BT=documents)
    F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten()).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).cpu().double()


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def _overrides(bench: Bench, *more: str) -> list[str]:
    return [
        *bench.recipe(), "optimizer=adamw", "optimizer.lr=3e-4", "trainer.log_every_n_steps=100000", "trainer.max_steps=100000",
        "trainer.precision=bf16-mixed", f"trainer.accelerator={'gpu' if bench.device == 'cuda' else 'cpu'}", *more,
    ]  # fmt: skip


def _fit(bench: Bench, overrides: list[str], watcher: pl.Callback) -> None:
    """Train in this process with the callback `watcher`, which also stops the training."""
    quiet_libraries()
    config = compose(overrides)
    data = build_data(config)
    data.prepare_data()
    config["model"]["vocab_size"] = config["model"]["vocab_size"] or data.vocab_size
    folder = Path(bench.scratch) / f"fit{time.monotonic_ns()}"
    folder.mkdir()
    callbacks = [c for c in build_callbacks(config, folder, data.steps_per_epoch) if not isinstance(c, Checkpoint | Samples)]
    task: Any = build_task(config, config["trainer"]["max_steps"])
    trainer = build_trainer(config, folder, config["trainer"]["max_steps"], [*callbacks, watcher], [])
    task.configure_model()
    apply_memory_options(task.model.blocks, config["strategy"]["activation_checkpointing"], config["trainer"]["compile"])
    trainer.fit(task, datamodule=data)


class NoWait(pl.Callback):
    """Raises an error for any host-device synchronisation during `steps` steps, after `warm` warm-up steps."""

    def __init__(self, warm: int = 12, steps: int = 10):
        self.warm, self.steps, self.seen, self.checked = warm, steps, 0, 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen += 1
        if self.seen == self.warm:
            torch.cuda.set_sync_debug_mode("error")
        elif self.seen > self.warm:
            self.checked += 1
        if self.checked == self.steps:
            torch.cuda.set_sync_debug_mode("default")
            trainer.should_stop = True


def no_waiting(bench: Bench) -> None:
    watcher = NoWait()
    if bench.device != "cuda":  # sync debug mode exists only for CUDA; the steps run without it
        watcher.warm = 10**9
    try:
        _fit(bench, _overrides(bench, *([] if bench.device == "cuda" else ["trainer.max_steps=4"])), watcher)
    finally:
        if bench.device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    if bench.device == "cuda":
        bench.add("waiting", "steps in a row without a wait for the device", watcher.checked, "steps", at_least=watcher.steps)


class Clock(pl.Callback):
    """Measures seconds per step over `timed` steps after `warm` warm-up steps, then stops the training."""

    def __init__(self, device: str, warm: int, timed: int):
        self.device, self.warm, self.timed, self.seen, self.start, self.seconds = device, warm, timed, 0, 0.0, float("nan")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen += 1
        if self.seen in (self.warm, self.warm + self.timed):
            _sync(self.device)
            if self.seen == self.warm:
                self.start = time.perf_counter()
            else:
                self.seconds = (time.perf_counter() - self.start) / self.timed
                trainer.should_stop = True


def _sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _clean(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak_gib(device: str) -> float:
    return (peak_memory(torch.device(device)) or 0) / 2**30


def _time(device: str, step: Callable[[], None], warm: int, timed: int) -> float:
    """Return the seconds per step as the median over three blocks of `timed` steps in all."""
    for _ in range(warm):
        step()
    blocks, size = [], max(1, timed // 3)
    for _ in range(3):
        _sync(device)
        start = time.perf_counter()
        for _ in range(size):
            step()
        _sync(device)
        blocks.append((time.perf_counter() - start) / size)
    return statistics.median(blocks)


def _plain_step(bench: Bench, sizes: tuple[int, int, int, int, int], batch: int, compiled: bool) -> Callable[[], None]:
    """Return one step of a plain PyTorch loop: SDPA, bf16 autocast, fused AdamW, gradient clipping, random tokens."""
    vocabulary, layers, heads, width, context = sizes
    device = torch.device(bench.device)
    with device:
        model: Any = PlainTransformer(vocabulary, layers, heads, width, context, modern=False)
        tokens = torch.randint(vocabulary, (batch, context + 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)

    def loss() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(tokens[:, :-1])
            return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    forward = torch.compile(loss) if compiled else loss

    def step() -> None:
        forward().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _fitting_batch(bench: Bench, sizes: tuple[int, int, int, int, int]) -> int:
    """Return the largest batch whose eager plain step needs at most BUDGET_GIB of memory."""
    if bench.device != "cuda":
        return 2
    for batch in (64, 48, 32, 24, 16, 12, 8, 4):
        _clean(bench.device)
        try:
            step = _plain_step(bench, sizes, batch, compiled=False)
            step()
            step()
            peak = _peak_gib(bench.device)
            del step
        except torch.OutOfMemoryError:
            continue
        if peak <= BUDGET_GIB:
            return batch
    return 2


def _trainer_seconds(bench: Bench, overrides: list[str], warm: int, timed: int) -> float:
    clock = Clock(bench.device, warm, timed)
    _fit(bench, _overrides(bench, *overrides), clock)
    return clock.seconds


def speed(bench: Bench) -> None:
    """Compare a plain loop and our Trainer, eager and compiled, with GPT-2's 124 M shape and one batch size."""
    sizes = (512, 2, 4, 64, 64) if bench.tiny else (50304, 12, 12, 768, 1024)
    vocabulary, layers, heads, width, context = sizes
    warm, timed = (2, 3) if bench.tiny else (8, 18)
    rate = measure_matrix_rate(torch.device(bench.device), torch.bfloat16, 0.5 if not bench.tiny else 0.05)
    bench.add("speed", "matrix products in bf16", rate / 1e12, "TFLOP/s")
    batch = _fitting_batch(bench, sizes)
    bench.add("speed", f"batch whose plain eager step fits {BUDGET_GIB} GiB", batch, "samples")
    flops = training_flops_per_token(Transformer(vocabulary, layers, heads, width, context), context)
    shape = [
        f"model.n_layers={layers}", f"model.n_heads={heads}", f"model.d_model={width}", f"model.vocab_size={vocabulary}",
        f"data.context_length={context}", f"data.batch_size={batch}",
    ]  # fmt: skip
    same = ["model.norm=layer", "model.qk_norm=false", "model/position=learned"]  # the plain loop's network
    variants: dict[str, Callable[[], float]] = {}
    for compiled in (False, True) if not bench.tiny else (False,):
        kind = "compiled" if compiled else "eager"
        variants[f"plain loop, {kind}"] = lambda compiled=compiled: _time(
            bench.device, _plain_step(bench, sizes, batch, compiled), warm, timed
        )
        setting = f"trainer.compile={str(compiled).lower()}"
        variants[f"Trainer, same network, {kind}"] = partial(_trainer_seconds, bench, [*shape, *same, setting], warm, timed)
        variants[f"Trainer, our network, {kind}"] = partial(_trainer_seconds, bench, [*shape, setting], warm, timed)
    seconds: dict[str, float] = {}
    for name, measure in variants.items():
        _clean(bench.device)
        try:
            seconds[name] = measure()
        except Exception as error:  # the other variants are still measured
            bench.errors[f"speed: {name}"] = f"{type(error).__name__}: {str(error)[-600:]}"
            continue
        tokens = batch * context / seconds[name]
        bench.add("speed", f"{name}: tokens a second", tokens, "tokens/s")
        gated = not bench.tiny and name == "Trainer, same network, compiled"
        bench.add("speed", f"{name}: MFU of the measured rate", tokens * flops / rate, "share", at_least=0.45 if gated else None)
        bench.add("speed", f"{name}: peak memory", _peak_gib(bench.device), "GiB")
    ours, plain = seconds.get("Trainer, same network, compiled"), seconds.get("plain loop, compiled")
    if ours and plain:
        bench.add("speed", "Trainer compiled over plain loop compiled", plain / ours, "times", at_least=1.0)


def long_context(bench: Bench) -> None:
    """Compare `auto` with the dense-mask kernel on packed documents, a window and ALiBi at 8,192 tokens, forward and backward.

    Blocks are compiled, as in training on a GPU, and the batch has four sequences: with one, eagerly, the host limits both kernels (ratio 1.04 on an
    H200).
    """
    T, width, heads, window, batch = (64, 64, 4, 16, 1) if bench.tiny else (8192, 768, 12, 1024, 4)
    device = torch.device(bench.device)
    documents = (torch.arange(T, device=device) // max(1, T // 16)).expand(batch, -1)
    tokens = torch.randint(512, (batch, T), device=device)
    kinds: list[tuple[str, dict[str, Any], bool]] = [
        ("documents", {}, True), ("window", {"window": window}, False), ("alibi", {"position": Alibi}, False), ("plain", {}, False),
    ]  # fmt: skip
    for name, settings, packed in kinds:
        seconds = {}
        for kernel, attend in (("masked", attend_fused), ("auto", attend_auto)):
            _clean(bench.device)
            with device:
                model = Transformer(512, 2, heads, width, T, attention=attend, **settings)
            torch.compiler.reset()
            apply_memory_options(model.blocks, "none", compile=not bench.tiny)

            def step(model: Any = model, packed: bool = packed) -> None:
                with torch.autocast(device.type, torch.bfloat16):
                    model(tokens, documents_BT=documents if packed else None).float().mean().backward()

            seconds[kernel] = _time(bench.device, step, 3, 9)
            bench.add("long", f"{name}, {kernel}: step of 2 layers", 1e3 * seconds[kernel], "ms")
            bench.add("long", f"{name}, {kernel}: peak memory", _peak_gib(bench.device), "GiB")
        gated = not bench.tiny and name == "documents"
        bench.add("long", f"{name}: auto over masked", seconds["masked"] / seconds["auto"], "times", at_least=3.0 if gated else None)


def large_vocabulary(bench: Bench) -> None:
    """Measure the memory of the loss, forward and backward, at a vocabulary of 128,256, relative to one fp32 copy of the logits."""
    if bench.device != "cuda":
        return
    tokens, width, vocabulary = 8192, 768, 128256
    hidden = torch.randn(1, tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    head = Head(width, vocabulary, bias=False, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(vocabulary, (1, tokens), device="cuda")
    head(hidden, targets).backward()  # warm-up: compiles and allocates the gradients
    _clean(bench.device)
    before = torch.cuda.memory_allocated()
    head(hidden, targets).backward()
    used = (torch.cuda.max_memory_allocated() - before) / 2**30
    whole = 4 * tokens * vocabulary / 2**30
    bench.add("vocabulary", "loss forward and backward, head included", used, "GiB")
    bench.add("vocabulary", "the same over fp32 logits (≤ 0.25 is asked)", used / whole, "times", at_most=0.25)


def saving(bench: Bench) -> None:
    """Measure how long saving weights and AdamW state of GPT-2's 124 M shape delays training, synchronously and in the background.

    The cost of a background save includes the slowdown of the steps that run meanwhile.
    """
    vocabulary, layers, heads, width, context = (512, 2, 4, 64, 64) if bench.tiny else (50304, 12, 12, 768, 1024)
    device = torch.device(bench.device)
    with device:
        model = Transformer(vocabulary, layers, heads, width, context)
        tokens = torch.randint(vocabulary, (4, context + 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def save(asynchronous: bool, turn: int) -> tuple[float, int, float]:
        """Return (seconds that training waits, steps made while the rest is written, seconds in all)."""
        io = FolderCheckpointIO()
        io.asynchronous = asynchronous
        tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
        for name, p in model.named_parameters():
            tensors |= {f"optimizer.{name}.{moment}": optimizer.state[p][moment] for moment in ("exp_avg", "exp_avg_sq")}
        _sync(bench.device)
        start = time.perf_counter()
        io.write(bench.scratch / f"step-{turn:08d}", tensors, {"step": turn})
        waits, made = time.perf_counter() - start, 0
        while io.writing:
            step()
            _sync(bench.device)
            made += 1
        io.wait()
        return waits, made, time.perf_counter() - start

    alone = _time(bench.device, step, 2, 9)
    at_once = statistics.median(save(False, turn)[0] for turn in range(3))
    background = [save(True, turn) for turn in range(3, 6)]
    waits = statistics.median(wait for wait, *_ in background)
    costs = statistics.median(seconds - made * alone for _, made, seconds in background)
    bench.add("saving", "training waits, saved at once", at_once, "s")
    bench.add("saving", "training waits, saved in the background", waits, "s")
    bench.add("saving", "the same with the slower steps beside it", costs, "s")
    bench.add("saving", "share of the save that the background hides", 1 - costs / at_once, "share")
