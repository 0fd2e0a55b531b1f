"""What the Trainer costs against a bare loop, what bf16 gives against fp32, and our step against the network in plain PyTorch."""

from __future__ import annotations

import argparse
import itertools
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, multiprocessing, nn

from meshformer.build import build_callbacks, build_data, build_task, build_trainer
from meshformer.compose import compose
from meshformer.config.resolve import cpu_multiplies_bf16
from meshformer.model import Transformer, attend_fused, attend_reference
from meshformer.train import keep_freed_memory, quiet_libraries

LEAST = 8  # steps of each variant, however long one takes
WARM_UP = 2
ROUNDS = 4
SIZES = {
    "4 layers, 4 heads, width 128, context 64, batch 12": (4, 4, 128, 64, 12),
    "6 layers, 6 heads, width 384, context 256, batch 8": (6, 6, 384, 256, 8),
}


def report(options: argparse.Namespace) -> None:
    quiet_libraries()
    keep_freed_memory()  # plain PyTorch gains by it as we do
    for name, size in SIZES.items():
        print(f"\n{name}")
        trainer_against_bare_loop(size, options.seconds)
        types_against_plain_pytorch(size, options.seconds)


def report_memory(options: argparse.Namespace) -> None:
    """The larger step in a process that gives freed memory back to the system, as glibc does, and in one that keeps it, as ours do."""
    for keeps in (False, True):
        multiprocessing.start_processes(_time_memory, (keeps, options.threads, options.seconds))


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


def _config(size: tuple[int, ...], folder: str, steps: int) -> dict[str, Any]:
    layers, heads, width, context, batch = size
    return compose(
        [
            "data=shakespeare", f"data.context_length={context}", f"data.batch_size={batch}", f"model.n_layers={layers}", f"model.n_heads={heads}",
            f"model.d_model={width}", "optimizer=adamw", "schedule=constant", "trainer.precision=32-true", f"trainer.max_steps={steps}",
            "trainer.val_check_interval=1000000", "trainer.limit_val_batches=1", "callbacks.checkpoint.every_n_steps=1000000", f"paths.runs={folder}",
        ]
    )  # fmt: skip


class _Clock(pl.Callback):
    """Seconds of each Trainer step: from the start of one batch to the start of the next, everything between included."""

    def __init__(self, seconds: float):
        self.seconds, self.times = seconds, []
        self.last, self.end = 0.0, float("inf")

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.end = time.perf_counter() + self.seconds

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        if self.last:
            self.times.append(now - self.last)
        self.last = now
        if now > self.end and len(self.times) >= LEAST:
            trainer.should_stop = True


def trainer_against_bare_loop(size: tuple[int, ...], seconds: float) -> None:
    """Both run in turn, over the same batches with the same model, optimizer and clipping. A shared machine drifts by more than the Trainer
    costs, so each round compares the medians of its own steps, and the median of the rounds is printed with their range."""
    pairs: list[tuple[float, float]] = []
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as folder:
            config = _config(size, folder, 100000)
            data = build_data(config)
            data.prepare_data()
            config["model"]["vocab_size"] = data.vocab_size
            clock = _Clock(seconds / ROUNDS)
            callbacks = build_callbacks(config, Path(folder), data.steps_per_epoch)
            callbacks = [c for c in callbacks if type(c).__name__ not in ("Checkpoint", "Samples")] + [clock]
            task: Any = build_task(config, 100000)
            trainer = build_trainer(config, Path(folder), 100000, callbacks, [])
            trainer.fit(task, datamodule=data)
            bare = list(_bare_loop(config, seconds / ROUNDS))
            pairs.append((statistics.median(clock.times[WARM_UP:]), statistics.median(bare[WARM_UP:])))
    ratios = [ours / bare for ours, bare in pairs]
    ours, bare = (statistics.median(times) for times in zip(*pairs, strict=True))
    extra = statistics.median(ours - bare for ours, bare in pairs)
    print(f"  Trainer {1e3 * ours:.2f} ms a step, bare loop {1e3 * bare:.2f} ms")
    print(f"  pair by pair: {statistics.median(ratios):.3f} times ({min(ratios):.3f} to {max(ratios):.3f}), {1e3 * extra:+.2f} ms a step")


def _bare_loop(config: dict[str, Any], seconds: float) -> Iterator[float]:
    data = build_data(config)
    data.prepare_data()
    task: Any = build_task(config, 100000)
    task.configure_model()
    model, optimizer = task.model, task.make_optimizer(task.model.named_parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, task.make_schedule(100000))
    loader = data.train_dataloader()
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    end, last = time.perf_counter() + seconds, time.perf_counter()
    steps = 0
    while last < end or steps < LEAST:
        steps += 1
        batch = next(batches)
        logits_BTV = model(batch["tokens"])
        F.cross_entropy(logits_BTV.flatten(0, 1), batch["targets"].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), config["trainer"]["gradient_clip_val"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        now = time.perf_counter()
        yield now - last
        last = now


class PlainBlock(nn.Module):
    def __init__(self, heads: int, width: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (t.view(B, T, self.heads, -1).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, -1))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class PlainTransformer(nn.Module):
    """The usual plain-PyTorch decoder of the same size: LayerNorm, learned positions, GELU, `scaled_dot_product_attention`, fp32."""

    def __init__(self, vocab_size: int, layers: int, heads: int, width: int, context: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab_size, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(PlainBlock(heads, width) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width, bias=False), nn.Linear(width, vocab_size, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x = self.tokens(tokens_BT) + self.positions(torch.arange(tokens_BT.shape[1]))
        return self.head(self.norm(self.blocks(x)))


def types_against_plain_pytorch(size: tuple[int, ...], seconds: float) -> None:
    """Forward, backward and AdamW in turn for each variant; tokens a second as a ratio to plain PyTorch in fp32."""
    layers, heads, width, context, batch = size

    def ours(attend: Any) -> nn.Module:
        return Transformer(84, layers, heads, width, context, attention=attend)

    variants: dict[str, tuple[nn.Module, bool]] = {
        "plain PyTorch, fp32": (PlainTransformer(84, layers, heads, width, context), False),
        "ours, fp32, fused": (ours(attend_fused), False),
        "ours, fp32, written out": (ours(attend_reference), False),
    }
    if cpu_multiplies_bf16():
        variants |= {"ours, bf16, fused": (ours(attend_fused), True), "ours, bf16, written out": (ours(attend_reference), True)}
    else:
        print("  bf16: this processor has no bf16 matrix units (amx_bf16 or avx512_bf16) and would emulate it; not timed")
    steps = {name: _stepper(model, bf16, batch, context) for name, (model, bf16) in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds * len(steps)
    for step in steps.values():
        step()
    while time.perf_counter() < end or len(next(iter(times.values()))) < 3:
        for name, step in steps.items():  # in turn, so that a slow moment of the machine meets all of them
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    base = statistics.median(times["plain PyTorch, fp32"])
    for name, measured in times.items():
        seconds_a_step = statistics.median(measured)
        print(f"  {name:<26}{batch * context / seconds_a_step:>12,.0f} tokens/s  {base / seconds_a_step:.2f} times plain PyTorch")


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
