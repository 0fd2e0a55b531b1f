"""Small training jobs for tests: a real text file, a real composed configuration, seconds on one thread."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from meshformer.command.compose import compose
from meshformer.job import train as job
from meshformer.job.train import train
from meshformer.model import Plan
from meshformer.parallel.strategy import MeshStrategy
from meshformer.record.metrics_csv import read_metrics
from meshformer.tasks import LanguageModelling
from meshformer.training.protocol import StepStrategy

job.TEXT_TOKENS = 16  # 400 take a second of every run here


def before_the_norm(look: Callable[[Any], None]) -> None:
    """Has `look(task)` called in every step, when its backward passes are over. For forked ranks: nothing is put back."""

    def looked_at(finish: Any) -> Any:
        def finish_gradients(self: Any, optimizer: Any) -> Any:
            look(self.lightning_module)
            return finish(self, optimizer)

        return finish_gradients

    for kind in (StepStrategy, MeshStrategy):
        kind.finish_gradients = looked_at(kind.finish_gradients)


class Frozen(LanguageModelling):
    """A task of the user's: the embedding and the first block stay as they are."""

    def configure_model(self) -> None:
        super().configure_model()
        for name, parameter in self.model.named_parameters():
            if name.startswith(("embedding", "blocks.0", "position")):
                parameter.requires_grad_(False)


class Watching(LanguageModelling):
    """Notes before each forward pass whether there are gradients; logs a number by Lightning's own means."""

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        if self.trainer.training:
            self.seen = [*getattr(self, "seen", []), any(p.grad is not None for p in self.model.parameters())]
        return super().inputs(batch)

    def training_step(self, batch: list[dict[str, Tensor]], batch_idx: int) -> Tensor:
        self.log("train/mine", float(batch_idx))
        return super().training_step(batch, batch_idx)


class OwnStep(LanguageModelling):
    """Leaves gradients behind before the step's own, which are not to be part of it."""

    def training_step(self, batch: list[dict[str, Tensor]], batch_idx: int) -> Tensor:
        self.losses(batch[0], "train")[0].backward()
        return super().training_step(batch, batch_idx)


class ForeignOptimizer(LanguageModelling):
    """With an optimizer that is none of ours."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.model.parameters(), lr=0.5)


class Short(LanguageModelling):
    """Lightning lets a task do without the number of the batch."""

    def training_step(self, batch: list[dict[str, Tensor]]) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.batches = getattr(self, "batches", 0) + 1
        return super().training_step(batch, 0)


class OwnModel(nn.Module):
    """A model of the user's, with none of what Transformer has."""

    def __init__(self, vocab_size: int, width: int = 16, seed: int = 0):
        super().__init__()
        self.table, self.out = nn.Embedding(vocab_size, width), nn.Linear(width, vocab_size)

    def forward(self, tokens_BT: Tensor, positions_BT: Tensor | None = None) -> Tensor:
        return self.out(self.table(tokens_BT))


class PlainLayer(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.mix, self.up, self.down = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[None, :, None])
        return x + self.down(torch.relu(self.up(x)))


class PlainNet(nn.Module):
    """A model as people write one: no seed, no `vocab_size`, no `blocks`, no positions, names of its own."""

    def __init__(self, letters: int = 16, width: int = 16, depth: int = 2):
        super().__init__()
        self.tok = nn.Embedding(letters, width)
        self.body = nn.ModuleDict({"h": nn.ModuleList(PlainLayer(width) for _ in range(depth))})
        self.out = nn.Linear(width, letters, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tok(ids)
        for layer in self.body["h"]:  # pyright: ignore[reportGeneralTypeIssues]
            x = layer(x)
        return self.out(x)


PLAIN_PLAN = Plan(blocks="body.h")
TINY = [
    "data=text", "data.context_length=16", "data.batch_size=8", "model=nano", "model.n_layers=2", "model.d_model=32",
    "trainer.progress=false", "trainer.precision=32-true", "trainer.threads=1", "trainer.log_every_n_steps=1", "trainer.val_check_interval=1000",
    "logger=csv", "~callbacks.samples", "~callbacks.throughput",
]  # fmt: skip


def text_file(folder: Path, words: int = 1500, letters: str = "abcdefghij") -> Path:
    """A text with some structure, the same every time."""
    draw = random.Random(0)
    vocabulary = ["".join(draw.choices(letters, k=draw.randint(2, 6))) for _ in range(60)]
    path = Path(folder) / "text.txt"
    path.write_text(" ".join(draw.choice(vocabulary) for _ in range(words)) + "\n", encoding="utf-8")
    return path


def labelled_file(folder: Path, rows: int = 200, words: int = 9) -> Path:
    """texts.csv: texts of 1 to `words` words, with the class (three, uneven), a tag for each word, and another text of the same class."""
    draw = random.Random(1)
    vocabulary = {"animal": ["cat", "dog", "cow"], "tool": ["saw", "axe", "file"], "fruit": ["fig", "pear", "plum"]}
    every = [(word, kind) for kind, own in vocabulary.items() for word in own] + [("the", "none"), ("a", "none")]

    def text(kind: str) -> list[tuple[str, str]]:
        others = [draw.choice(every[-2:]) for _ in range(draw.randrange(words))]
        return [(draw.choice(vocabulary[kind]), kind), *others]

    path = Path(folder) / "texts.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["text", "label", "tags", "other"])
        for _ in range(rows):
            kind = draw.choice(["animal", "animal", "tool", "fruit"])
            own = text(kind)
            table.writerow([" ".join(w for w, _ in own), kind, " ".join(t for _, t in own), " ".join(w for w, _ in text(kind))])
    return path


def run_labelled(folder: Path, name: str, *overrides: str, resume: bool = False) -> list[dict[str, Any]]:
    """`run_tiny` for a task on labelled texts, which the overrides name."""
    texts = Path(folder) / "texts.csv"
    texts = texts if texts.is_file() else labelled_file(folder)
    tiny = [o for o in TINY if not o.startswith("data=")]
    own = ["data=csv", f"data.file={texts}", f"paths.data={folder}/cache", f"paths.runs={folder}/runs"]
    return _run(Path(folder) / name, deepcopy(_composed(*tiny, *own, *overrides)), resume)


def tiny_config(folder: Path, *overrides: str) -> dict[str, Any]:
    text = Path(folder) / "text.txt"
    text = text if text.is_file() else text_file(folder)
    return deepcopy(_composed(*TINY, f"data.files=[{text}]", f"paths.data={folder}/cache", f"paths.runs={folder}/runs", *overrides))


@cache
def _composed(*overrides: str) -> dict[str, Any]:
    """Composing takes 0.4 s of every rank: a test that asks for the configuration before it forks them spares them that."""
    return compose(overrides)


def run_tiny(folder: Path, name: str, *overrides: str, resume: bool = False) -> list[dict[str, Any]]:
    """Trains in folder/name and returns the rows of its metrics.csv. Within a forked rank: this rank's part of it."""
    return _run(Path(folder) / name, tiny_config(folder, *overrides), resume)


def _run(run: Path, config: dict[str, Any], resume: bool) -> list[dict[str, Any]]:
    run.mkdir(exist_ok=True)
    config["resume"] = str(run) if resume else None
    train(config, run)
    return read_metrics(run / "metrics.csv") if (run / "metrics.csv").is_file() else []
