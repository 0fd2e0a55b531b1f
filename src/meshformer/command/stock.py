"""Refuse Lightning's own callbacks and loggers that do not work here, before a folder is made, and name the alternative."""

from __future__ import annotations

import importlib.util
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from meshformer.config.errors import ConfigError

Config = dict[str, Any]
SAVES = ("callbacks.checkpoint saves, in a form that every layout reads", "Use callbacks.checkpoint.every_n_steps, keep_last and keep_best.")
SHOWS = ("the program shows its own progress", "Use trainer.progress=true.")
AVERAGES = ("it would not be saved with a checkpoint of this program", "Use callbacks.ema.decay=0.999.")
FREEZES = ("it looks for an attribute `backbone`", "Use stage.freeze and stage.unfreeze_every.")
# Class name -> (why it is refused, what to use instead).
REFUSED: dict[str, tuple[str, str]] = {
    "GradientAccumulationScheduler": (
        "data.batch_size is the samples of one optimizer step, and it would change them during training",
        "Use trainer.accumulate_grad_batches.",
    ),
    "BatchSizeFinder": ("it would change the samples of one optimizer step", "Choose data.batch_size, and trainer.accumulate_grad_batches to fit."),
    "LearningRateFinder": ("it trains the task outside of the run", "Compare runs: meshformer train -m sweep=learning_rate."),
    "Checkpoint": SAVES, "ModelCheckpoint": SAVES, "OnExceptionCheckpoint": SAVES,
    "ProgressBar": SHOWS, "RichProgressBar": SHOWS, "TQDMProgressBar": SHOWS,
    "StochasticWeightAveraging": AVERAGES, "WeightAveraging": AVERAGES, "EMAWeightAveraging": AVERAGES,
    "BaseFinetuning": FREEZES, "BackboneFinetuning": FREEZES,
    "ModelPruning": ("it renames parameters, so that a checkpoint could not be read", "Prune the exported model."),
    "ThroughputMonitor": ("it takes a function, which a configuration cannot hold", "Use callbacks.throughput, which is on by default."),
}  # fmt: skip
NEED_LOGGER = ("LearningRateMonitor", "DeviceStatsMonitor")
# Class name -> (package, what to install).
PACKAGES = {
    "WandbLogger": ("wandb", "'meshformer[wandb]'"), "MLFlowLogger": ("mlflow", "'meshformer[mlflow]'"), "CometLogger": ("comet_ml", "comet-ml"),
    "NeptuneLogger": ("neptune", "neptune"), "TensorBoardLogger": ("tensorboard", "tensorboard"),
}  # fmt: skip
# Environment variables that make wandb send nothing, or that say who sends and where.
LOGGED_IN = ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DISABLED", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE")


def check_stock(config: Config) -> None:
    """Raise ConfigError for a Lightning callback or logger that cannot work here or whose package is not installed."""
    loggers = [node for node in (config.get("logger") or {}).values() if node]
    for key, node in (config["callbacks"] or {}).items():
        name = _of_lightning(node)
        if name in REFUSED:
            why, instead = REFUSED[name]
            raise ConfigError(why, f"callbacks.{key}._target_", node["_target_"], fix=instead)
        if name in NEED_LOGGER and not loggers:
            message = "writes to a logger, and none is configured (metrics.csv does not count)"
            raise ConfigError(message, f"callbacks.{key}._target_", node["_target_"], fix="Add logger=tensorboard.")
    for key, node in (config.get("logger") or {}).items():
        name = _of_lightning(node) or ""
        package, install = PACKAGES.get(name, (None, None))
        if package is not None and importlib.util.find_spec(package) is None:
            message = f"needs the package {package}, which is not installed"
            raise ConfigError(message, f"logger.{key}._target_", node["_target_"], fix=f"Install it: pip install {install}.")
        if name == "WandbLogger" and not node.get("offline") and not _logged_in():
            message = "nobody is logged in to Weights & Biases on this machine"
            raise ConfigError(message, f"logger.{key}", fix=f"Run `wandb login`, or add logger.{key}.offline=true.")


def _logged_in() -> bool:
    """Whether wandb will find an account: without one it would ask in the middle of the start, or fail where nobody can answer."""
    if any(os.environ.get(name) for name in LOGGED_IN):
        return True
    for file in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        with suppress(OSError, UnicodeDecodeError):
            if file and "wandb" in Path(file).expanduser().read_text(encoding="utf-8"):
                return True
    return False


def _of_lightning(node: Any) -> str | None:
    """Return the class name if `node` names a class of Lightning, else None."""
    target = str(node.get("_target_", "")) if isinstance(node, dict) else ""
    return target.rpartition(".")[2] if target.startswith(("lightning.", "pytorch_lightning.")) else None
