"""Compare the Trainer with a bare loop, bf16 with fp32, and our network with the same one in plain PyTorch."""

from __future__ import annotations

import argparse
import itertools
import os
import resource
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stderr, suppress
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, multiprocessing, nn

from meshformer.callbacks import Checkpoint, ProgressBar, Samples
from meshformer.callbacks.throughput import measure_matrix_rate
from meshformer.command.compose import compose
from meshformer.config.resolve import cpu_multiplies_bf16
from meshformer.job.build import build_callbacks, build_data, build_task, build_trainer
from meshformer.job.train import keep_freed_memory, quiet_libraries
from meshformer.model import Head, Learned, Transformer, attend_auto, attend_fused, attend_reference, training_flops_per_token
from meshformer.parallel.memory_options import apply_memory_options
from meshformer.tasks.language_modelling import summed_cross_entropy

WARM_UP, PROCESSES = 2, 5
LOSS = (8192, 512, 50304)  # tokens, width and vocabulary in the `memory` benchmark
BLOCK_SECONDS, MIN_STEPS = 1.0, 3  # the Trainer and the bare loop alternate in blocks of this length, with at least so many steps
TINY = (4, 2, 16, 16, 2)
SIZES = {
    "4 layers, 4 heads, width 128, context 64, batch 12": (4, 4, 128, 64, 12),
    "6 layers, 6 heads, width 384, context 256, batch 8": (6, 6, 384, 256, 8),
}


def report(options: argparse.Namespace) -> None:
    quiet_libraries()
    keep_freed_memory()  # speeds up plain PyTorch too, so it is on for both
    rates = matrix_rates(options.seconds / 10)
    print("this machine multiplies matrices at " + ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {name}" for name, rate in rates.items()))
    for name, size in SIZES.items():
        print(f"\n{name}")
        trainer_against_bare_loop(size, options.seconds)
        types_against_plain_pytorch(size, options.seconds, rates)


def matrix_rates(seconds: float) -> dict[str, float]:
    """Return the FLOP/s of large matrix products by type; bf16 only if the processor has units for it."""
    types = {"fp32": torch.float32} | ({"bf16": torch.bfloat16} if cpu_multiplies_bf16() else {})
    return {name: measure_matrix_rate(torch.device("cpu"), dtype, seconds) for name, dtype in types.items()}


def report_memory(options: argparse.Namespace) -> None:
    """Print the memory of the loss of a large vocabulary with all logits at once and in chunks, and the step time when the process returns freed
    memory to the system (glibc's default) and when it keeps it (`keep_freed_memory`)."""
    figures = {}
    for kind in ("logits", "head"):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
            figures[kind] = fresh.submit(_loss_memory, kind, options.threads).result()
    (all_logits, plain), (stretches, ours) = figures["logits"], figures["head"]
    print(f"  loss of {LOSS[0]:,} tokens, width {LOSS[1]}, vocabulary {LOSS[2]:,}, fp32, forward and backward, at its peak:")
    print(f"    all logits {all_logits:,.0f} MiB; by stretches of tokens {stretches:,.0f} MiB, {stretches / all_logits:.2f} of it")
    print(f"    time by stretches {ours / plain:.2f} of that with all logits")
    for keeps in (False, True):
        multiprocessing.start_processes(_time_memory, (keeps, options.threads, options.seconds))


def _loss_memory(kind: str, threads: int) -> tuple[float, float]:
    """Return (MiB by which the peak memory grew, seconds) for the loss and its gradients."""
    quiet_libraries()
    torch.set_num_threads(threads)
    tokens, width, vocabulary = LOSS
    head = Head(width, vocabulary, bias=False)
    x, targets = torch.randn(1, tokens, width, requires_grad=True), torch.randint(vocabulary, (1, tokens))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    loss = head(x, targets) if kind == "head" else summed_cross_entropy(head(x), targets)
    loss.backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, time.perf_counter() - start


def _time_memory(rank: int, keeps: bool, threads: int, seconds: float) -> None:
    quiet_libraries()
    torch.set_num_threads(threads)
    if keeps:
        keep_freed_memory()
    layers, heads, width, context, batch = list(SIZES.values())[-1]
    bf16 = cpu_multiplies_bf16()
    step = _stepper(Transformer(84, layers, heads, width, context), bf16, batch, context)
    for _ in range(WARM_UP):
        step()
    faults, times = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, []
    while sum(times) < seconds:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults) // len(times)
    name, dtype = ("kept" if keeps else "given back"), ("bf16" if bf16 else "fp32")
    print(f"  freed memory {name:<12}{1e3 * statistics.median(times):6.1f} ms a step ({dtype}), {faults:,} page faults", flush=True)


def report_trainer(options: argparse.Namespace) -> None:
    """Measure two sizes, each in five processes one after another, because memory placement varies between processes as much as the result.

    At the first size nearly all of a step is Python, so that the Trainer's milliseconds stand out of the noise; the second shows their share of a
    real step.
    """
    small = next(iter(SIZES))
    for name, size, threads in (("4 layers, 2 heads, width 16, context 16, batch 2, one thread", TINY, 1), (small, SIZES[small], options.threads)):
        print(name)
        extra = []
        for _ in range(PROCESSES):
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
                extra.append(fresh.submit(_in_process, size, threads, options.seconds / 2).result())
        print(f"  median of {PROCESSES} processes {statistics.median(extra):+.2f} ms a step, mean {statistics.mean(extra):+.2f}")


def _in_process(size: tuple[int, ...], threads: int, seconds: float) -> float:
    quiet_libraries()
    keep_freed_memory()
    torch.set_num_threads(threads)
    return trainer_against_bare_loop(size, seconds)


def _config(size: tuple[int, ...], folder: str, steps: int) -> dict[str, Any]:
    layers, heads, width, context, batch = size
    return compose(
        [
            "data=shakespeare", f"data.context_length={context}", f"data.batch_size={batch}", f"model.n_layers={layers}", f"model.n_heads={heads}",
            f"model.d_model={width}", "optimizer=adamw", "schedule=constant", "trainer.precision=32-true", f"trainer.max_steps={steps}",
            "trainer.val_check_interval=1000000", "trainer.limit_val_batches=1", "callbacks.checkpoint.every_n_steps=1000000", f"paths.runs={folder}",
        ]
    )  # fmt: skip


class _Alternating(pl.Callback):
    """Alternates blocks of the Trainer's steps with blocks of a bare loop's.

    `pairs` holds the mean seconds per step of each block of the Trainer and of the bare loop after it. The first step of a block is not counted:
    the other loop has filled the CPU caches. A Trainer step lasts from the start of one batch to the start of the next.
    """

    def __init__(self, bare: Iterator[None], seconds: float):
        self.bare, self.seconds = bare, seconds
        self.pairs: list[tuple[float, float]] = []
        self.block, self.steps, self.start, self.end = 0, 0, 0.0, float("inf")

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        start = time.perf_counter()
        for _ in range(WARM_UP):
            next(self.bare)
        self.block = max(MIN_STEPS, round(BLOCK_SECONDS * WARM_UP / (time.perf_counter() - start)))
        self.end = time.perf_counter() + self.seconds

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        self.steps += 1
        if self.steps == 2:
            self.start = now
        if self.steps == self.block + 2:
            next(self.bare)
            began = time.perf_counter()
            for _ in range(self.block):
                next(self.bare)
            self.pairs.append(((now - self.start) / self.block, (time.perf_counter() - began) / self.block))
            self.steps = 1
            for bar in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
                if isinstance(bar, ProgressBar):  # without this, it would refresh in the uncounted step after every pause
                    bar._next_refresh += time.perf_counter() - now
            trainer.should_stop = now > self.end and len(self.pairs) > WARM_UP


@contextmanager
def _terminal() -> Iterator[None]:
    """Redirect stderr to a pseudo-terminal, so that the progress bar does its usual work."""
    ours, theirs = os.openpty()
    reader = threading.Thread(target=_drain, args=(ours,), daemon=True)
    reader.start()
    with os.fdopen(theirs, "w") as terminal, redirect_stderr(terminal):
        yield


def _drain(ours: int) -> None:
    with suppress(OSError):  # the other end is closed
        while os.read(ours, 2**16):
            pass
    os.close(ours)


def trainer_against_bare_loop(size: tuple[int, ...], seconds: float) -> float:
    """Alternate one second of Trainer steps with one of a bare loop on the same model, optimizer, clipping and batches.

    They alternate because a shared machine drifts by more than the Trainer costs. Prints medians over pairs of blocks with quartiles, and returns the
    Trainer's extra milliseconds per step. The progress bar and metrics.csv are active.
    """
    with tempfile.TemporaryDirectory() as folder, _terminal():
        config = _config(size, folder, 100000)
        data = build_data(config)
        data.prepare_data()
        config["model"]["vocab_size"] = data.vocab_size
        alternating = _Alternating(_bare_loop(config), 2 * seconds)
        callbacks = build_callbacks(config, Path(folder), data.steps_per_epoch)
        callbacks = [c for c in callbacks if not isinstance(c, Checkpoint | Samples)] + [alternating]
        task: Any = build_task(config, 100000)
        trainer = build_trainer(config, Path(folder), 100000, callbacks, [])
        trainer.fit(task, datamodule=data)
    pairs = alternating.pairs[1:]
    ours, bare = (statistics.median(times) for times in zip(*pairs, strict=True))
    print(f"  Trainer {1e3 * ours:.2f} ms a step, bare loop {1e3 * bare:.2f} ms")
    ratio, low, high = _quartiles([ours / bare for ours, bare in pairs])
    print(f"  pair by pair ({len(pairs)} blocks of {alternating.block} steps): {ratio:.3f} times ({low:.3f} to {high:.3f})", end=", ")
    extra, low, high = _quartiles([1e3 * (ours - bare) for ours, bare in pairs])
    print(f"{extra:+.2f} ms a step ({low:+.2f} to {high:+.2f})", flush=True)
    return extra


def _quartiles(numbers: list[float]) -> tuple[float, float, float]:
    """Return the median, the lower and the upper quartile."""
    low, median, high = statistics.quantiles(numbers, n=4)
    return median, low, high


def _bare_loop(config: dict[str, Any]) -> Iterator[None]:
    data = build_data(config)
    data.prepare_data()
    task: Any = build_task(config, 100000)
    task.configure_model()
    model, optimizer = task.model, task.make_optimizer(task.model.named_parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, task.make_schedule(100000))
    loader = data.train_dataloader()
    for (batch,) in itertools.chain.from_iterable(itertools.repeat(loader)):
        logits_BTV = model(batch["tokens"])
        F.cross_entropy(logits_BTV.flatten(0, 1), batch["targets"].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), config["trainer"]["gradient_clip_val"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield


class PlainBlock(nn.Module):
    def __init__(self, heads: int, width: int, modern: bool):
        super().__init__()
        self.heads, self.modern = heads, modern
        self.norm1, self.norm2 = _plain_norm(width, modern), _plain_norm(width, modern)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        if modern:
            self.q_norm, self.k_norm = nn.RMSNorm(width // heads), nn.RMSNorm(width // heads)

    def forward(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (t.view(B, T, self.heads, -1).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        if self.modern:
            q, k = _rotated(self.q_norm(q)), _rotated(self.k_norm(k))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, -1))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def _plain_norm(width: int, modern: bool) -> nn.Module:
    return nn.RMSNorm(width) if modern else nn.LayerNorm(width, bias=False)


def _rotated(x: Tensor) -> Tensor:
    """Rotary positions in their usual formulation."""
    cos, sin = _rotations(*x.shape[-2:])
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


@cache
def _rotations(T: int, D: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(T)[:, None] * 10000 ** (-torch.arange(0, D, 2) / D)
    return angles.cos(), angles.sin()


class PlainTransformer(nn.Module):
    """The usual plain-PyTorch decoder with `scaled_dot_product_attention`: LayerNorm and learned positions, or (`modern`) RMSNorm, rotary positions
    and QK-norm."""

    def __init__(self, vocab_size: int, layers: int, heads: int, width: int, context: int, modern: bool):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab_size, width), None if modern else nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(PlainBlock(heads, width, modern) for _ in range(layers)))
        self.norm, self.head = _plain_norm(width, modern), nn.Linear(width, vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        # With the default std=1 the softmax saturates and many gradients become denormal numbers, on which a CPU is ten times slower.
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x = self.tokens(tokens_BT)
        if self.positions is not None:
            x = x + self.positions(torch.arange(tokens_BT.shape[1], device=tokens_BT.device))
        return self.head(self.norm(self.blocks(x)))


# Name -> (`modern` of the plain network, settings that make ours the same network).
NETWORKS: dict[str, tuple[bool, dict[str, Any]]] = {
    "LayerNorm, learned positions": (False, {"norm": "layer", "position": Learned, "qk_norm": False}),
    "RMSNorm, QK-norm, rotary positions (the template's)": (True, {}),
}


def types_against_plain_pytorch(size: tuple[int, ...], seconds: float, rates: dict[str, float]) -> None:
    """Time forward, backward and AdamW of each variant; print tokens per second relative to plain PyTorch in fp32, and the fraction of the machine's
    matrix rate in that type (MFU)."""
    for network, (modern, settings) in NETWORKS.items():
        print(f"  {network}")
        _one_network(size, seconds, modern, settings, rates)


def _one_network(size: tuple[int, ...], seconds: float, modern: bool, settings: dict[str, Any], rates: dict[str, float]) -> None:
    layers, heads, width, context, batch = size
    flops = training_flops_per_token(Transformer(84, layers, heads, width, context, **settings), context)

    def ours(attend: Any, compiled: bool = False) -> nn.Module:
        model = Transformer(84, layers, heads, width, context, attention=attend, **settings)
        apply_memory_options(model.blocks, "none", compiled)
        return model

    variants: dict[str, tuple[nn.Module, bool]] = {
        "plain PyTorch, fp32": (PlainTransformer(84, layers, heads, width, context, modern), False),
        "ours, fp32, fused": (ours(attend_fused), False),
    }
    if cpu_multiplies_bf16():
        variants |= {
            "plain PyTorch, bf16": (PlainTransformer(84, layers, heads, width, context, modern), True),
            "ours, bf16, fused": (ours(attend_fused), True),
            "ours, bf16, written out": (ours(attend_reference), True),
        }
    else:
        print("    bf16: this processor has no bf16 matrix units (amx_bf16 or avx512_bf16) and would emulate it; not timed")
    best = list(rates)[-1]
    variants[f"ours, {best}, compiled"] = (ours(attend_auto, compiled=True), best == "bf16")
    sizes = {sum(p.numel() for p in model.parameters()) for model, _ in variants.values()}
    assert len(sizes) == 1, "not the same network"
    steps = {name: _stepper(model, bf16, batch, context) for name, (model, bf16) in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds * len(steps)
    for step in steps.values():
        step()
    while time.perf_counter() < end or len(next(iter(times.values()))) < 3:
        for name, step in steps.items():  # alternating, so that slow moments of the machine affect all variants
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    base = statistics.median(times["plain PyTorch, fp32"])
    for name, measured in times.items():
        seconds_a_step = statistics.median(measured)
        tokens = batch * context / seconds_a_step
        share = tokens * flops / rates["bf16" if variants[name][1] else "fp32"]
        ratio = f"{base / seconds_a_step:.2f} times plain PyTorch"
        print(f"    {name:<26}{tokens:>10,.0f} tokens/s  {ratio}  {share:.2f} of the matrix rate", flush=True)


def _stepper(model: nn.Module, bf16: bool, batch: int, context: int) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens_BT = torch.randint(84, (batch, context))

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            logits_BTV = model(tokens_BT)
        F.cross_entropy(logits_BTV.flatten(0, 1).float(), tokens_BT.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
