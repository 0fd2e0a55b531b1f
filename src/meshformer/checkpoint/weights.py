"""Weights from a checkpoint into a model, by name."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from meshformer.config.errors import ConfigError

from .folder import read_tensors


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Copies the checkpoint's `model.*` tensors into `model`. ConfigError lists every tensor that is missing, extra or of another shape."""
    weights = {k.removeprefix("model."): v for k, v in read_tensors(checkpoint, "model.").items()}
    own = model.state_dict()
    problems = [f"{k}: missing in the checkpoint" for k in own.keys() - weights.keys()]
    problems += [f"{k}: unknown to the model" for k in weights.keys() - own.keys()]
    problems += [
        f"{k}: {tuple(weights[k].shape)} in the checkpoint, {tuple(own[k].shape)} in the model"
        for k in own.keys() & weights.keys()
        if own[k].shape != weights[k].shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
        raise ConfigError(
            f"the weights in {checkpoint} do not fit this model: {shown}", fix="use the model settings that the run was trained with"
        )
    model.load_state_dict(weights)
