"""Compare a Llama of ours with the same one of the transformers library: tokens per second, memory and generation, in one run."""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

from meshformer.job.train import keep_freed_memory, quiet_libraries
from meshformer.model import generate
from meshformer.tasks.language_modelling import summed_cross_entropy

SIZES = {  # layers, heads, width, vocabulary, context, batch
    "6 layers, width 384, vocabulary 4,096, context 256, batch 4": (6, 6, 384, 4096, 256, 4),
    "6 layers, width 384, vocabulary 32,768, context 256, batch 4": (6, 6, 384, 32768, 256, 4),
}
KINDS = ("ours", "transformers")
ROUND_SECONDS, WRITTEN = 2.0, 64


def report_models(options: argparse.Namespace) -> None:
    """Print the median step time of both models in alternating rounds, the growth of the process's memory, and tokens generated per second."""
    for name, size in SIZES.items():
        print(f"  {name}; fp32, AdamW")
        with tempfile.TemporaryDirectory() as scratch:
            write_folder(Path(scratch), size)
            memory = {kind: _fresh(_peak, kind, scratch, size, options.threads) for kind in KINDS}
            rates, written = _fresh(_rates, scratch, size, options.threads, options.seconds)
        for kind in KINDS:
            rate, ratio = statistics.median(rates[kind]), statistics.median(a / b for a, b in zip(rates[kind], rates["ours"], strict=True))
            print(
                f"    {kind:<14}{rate:9,.0f} tokens/s in training ({ratio:.2f} of ours), {memory[kind]:7,.0f} MiB at the peak, "
                f"{written[kind]:6,.0f} tokens/s generated"
            )


def write_folder(folder: Path, size: tuple[int, ...]) -> None:
    """Writes a Llama with random weights as transformers does, so that both sides read the same ones."""
    import transformers

    layers, heads, width, vocabulary, context, _ = size
    config = transformers.LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=width * 8 // 3, vocab_size=vocabulary,
        max_position_embeddings=context, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def load(kind: str, folder: Path) -> Any:
    if kind == "ours":
        from meshformer.huggingface import load_pretrained

        return load_pretrained(folder).train()
    from meshformer.checkpoint.weights import load_weights
    from meshformer.huggingface.transformers_model import TransformersModel

    model = TransformersModel(json.loads((folder / "config.json").read_text()), context_length=256)
    load_weights(model, folder)
    return model.train()


class Step:
    """One training step of a model: forward, loss, backward, AdamW."""

    def __init__(self, kind: str, folder: Path, size: tuple[int, ...]):
        *_, self.vocabulary, context, batch = size
        self.model = load(kind, folder)
        self.ours = kind == "ours"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        self.tokens_BT = torch.randint(self.vocabulary, (batch, context + 1), generator=torch.Generator().manual_seed(0))

    def __call__(self) -> float:
        """Returns the seconds it took."""
        start = time.perf_counter()
        inputs, targets = self.tokens_BT[:, :-1], self.tokens_BT[:, 1:]
        chunked = self.ours and targets.numel() * self.vocabulary >= 2**26  # as tasks/language_modelling.py decides it
        loss = self.model(inputs, targets_BT=targets) if chunked else summed_cross_entropy(self.model(inputs), targets)
        (loss / targets.numel()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start


def _fresh(work: Any, *arguments: Any) -> Any:
    """`work(*arguments)` in a process of its own, so that the memory of one side does not count for the other."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(work, *arguments).result()


def _prepare(threads: int) -> None:
    quiet_libraries()
    keep_freed_memory()
    torch.set_num_threads(threads)


def _peak(kind: str, folder: str, size: tuple[int, ...], threads: int) -> float:
    """MiB by which the memory of a process grows through loading and three steps."""
    _prepare(threads)
    import transformers  # noqa: F401  # both sides pay for the import

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = Step(kind, Path(folder), size)
    for _ in range(3):
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def _rates(folder: str, size: tuple[int, ...], threads: int, seconds: float) -> tuple[dict[str, list[float]], dict[str, float]]:
    """(tokens per second of each alternating round, tokens per second of generation) by kind."""
    _prepare(threads)
    steps = {kind: Step(kind, Path(folder), size) for kind in KINDS}
    tokens = steps["ours"].tokens_BT[:, 1:].numel()
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for step in steps.values():
        step()
    start = time.perf_counter()
    while time.perf_counter() - start < 2 * seconds:
        for kind, step in steps.items():
            spent: list[float] = []
            while sum(spent) < ROUND_SECONDS:
                spent.append(step())
            rates[kind].append(tokens / statistics.median(spent))
    written = {}
    for kind, step in steps.items():
        prompt_BT = step.tokens_BT[:1, :8]
        generate(step.model, prompt_BT, 2)
        start = time.perf_counter()
        generate(step.model, prompt_BT, WRITTEN)
        written[kind] = WRITTEN / (time.perf_counter() - start)
    return rates, written
