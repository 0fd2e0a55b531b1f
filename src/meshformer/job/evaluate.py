"""`meshformer evaluate`: a run's metrics on its validation or test split."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from meshformer.checkpoint.find import latest_checkpoint
from meshformer.checkpoint.weights import load_weights
from meshformer.config.errors import ConfigError
from meshformer.config.paths import run_of
from meshformer.data import load_tokenizer
from meshformer.data.images import PIXELS, ImageData, PixelScale
from meshformer.job.build import build_data, build_model, build_task, build_trainer
from meshformer.job.train import choose_tf32, quiet_libraries
from meshformer.printing import say


def evaluate(config: dict[str, Any], options: dict[str, Any]) -> dict[str, float]:
    """Metrics of `options["run"]`, a run folder (its newest checkpoint) or a checkpoint in one, on the split `options["split"]` (val or test).

    Runs in one process, for a run of any layout.
    """
    quiet_libraries()
    torch.set_num_threads(config["trainer"]["threads"])
    choose_tf32(config["trainer"]["matmul_precision"])
    source = Path(options["run"])
    without = config["data"]["kind"] in ("images", "own")
    data = build_data(config, None if without else load_tokenizer(run_of(source) / "tokenizer.json"))
    if isinstance(data, ImageData):
        data.scale = PixelScale.read(run_of(source) / PIXELS)  # other images are seen as those of the training
    data.prepare_data()
    task: Any = build_task(config, max_steps=1)
    task.configure_model()
    checkpoint = latest_checkpoint(source)
    load_weights(task.model, checkpoint)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = build_trainer(config, Path(scratch), 1, [], [])
        check = trainer.validate if options["split"] == "val" else trainer.test
        check(task, datamodule=data, verbose=False)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    say(f"{checkpoint}")
    for name, value in metrics.items():
        say(f"  {name:<22}{value:.6f}")
    return metrics


def load_run(config: dict[str, Any], source: Path) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer) of `source`, a run folder (its newest checkpoint) or a checkpoint in one."""
    model, file = build_model(config), run_of(source) / "tokenizer.json"
    load_weights(model, latest_checkpoint(source))
    tokenizer, size = load_tokenizer(file), config["model"].get("vocab_size")
    if size is not None and tokenizer.vocab_size > size:
        raise ConfigError(f"{file} has {tokenizer.vocab_size} tokens, and the run's model {size}", fix="Restore it from a copy.")
    return model.eval(), tokenizer
