"""Small training jobs for tests: a real text file, a real composed configuration, seconds on one thread."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from meshformer.compose import compose
from meshformer.record.metrics_csv import read_metrics
from meshformer.tasks import LanguageModelling
from meshformer.train import train


class Frozen(LanguageModelling):
    """A task of the user's: the embedding and the first block stay as they are."""

    def configure_model(self) -> None:
        super().configure_model()
        for name, parameter in self.model.named_parameters():
            if name.startswith(("embedding", "blocks.0", "position")):
                parameter.requires_grad_(False)


class OwnModel(nn.Module):
    """A model of the user's, with none of what Transformer has."""

    def __init__(self, vocab_size: int, width: int = 16, seed: int = 0):
        super().__init__()
        self.table, self.out = nn.Embedding(vocab_size, width), nn.Linear(width, vocab_size)

    def forward(self, tokens_BT: Tensor, positions_BT: Tensor | None = None) -> Tensor:
        return self.out(self.table(tokens_BT))


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


def tiny_config(folder: Path, *overrides: str) -> dict[str, Any]:
    text = Path(folder) / "text.txt"
    text = text if text.is_file() else text_file(folder)
    return compose([*TINY, f"data.files=[{text}]", f"paths.data={folder}/cache", f"paths.runs={folder}/runs", *overrides])


def run_tiny(folder: Path, name: str, *overrides: str, resume: bool = False) -> list[dict[str, Any]]:
    """Trains in folder/name and returns the rows of its metrics.csv. Within a forked rank: this rank's part of it."""
    run = Path(folder) / name
    run.mkdir(exist_ok=True)
    config = tiny_config(folder, *overrides)
    config["resume"] = str(run) if resume else None
    train(config, run)
    return read_metrics(run / "metrics.csv") if (run / "metrics.csv").is_file() else []
