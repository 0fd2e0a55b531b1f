"""Use trained models in a notebook: load them, plot their attention, measure them at other lengths. One process reads a run of any layout."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from meshformer.checkpoint.find import latest_checkpoint
from meshformer.checkpoint.weights import load_weights
from meshformer.config import validate
from meshformer.config.foreign import confine, read_config, refuse_links
from meshformer.config.paths import default_cache, run_of
from meshformer.data import load_tokenizer
from meshformer.job.build import build_data, build_model, build_task
from meshformer.model import Attention, Learned, Mask, Transformer, attend_reference, training_flops_per_token


def load_model(run: Path | str, allow: Sequence[str] = ()) -> Any:
    """Return the run's LightningModule in eval mode, with the weights of its newest intact checkpoint or of the checkpoint named by `run`.

    `.model` is the network and `.tokenizer` the run's tokenizer or None. `allow` lists your own modules that the run's configuration may name; the
    list stored in the run folder is not trusted. Raises ConfigError if there is no intact checkpoint or its weights do not fit.
    """
    source = Path(run).expanduser()
    task: Any = build_task(read_settings(source, allow), max_steps=1)
    task.configure_model()
    load_weights(task.model, latest_checkpoint(source))
    file = run_of(source) / "tokenizer.json"
    task.tokenizer = load_tokenizer(file) if file.is_file() else None  # a run on images has none
    return task.eval()


def read_settings(run: Path | str, allow: Sequence[str] = ()) -> dict[str, Any]:
    """The run's configuration, without callbacks and loggers. `allow` as for `load_model`."""
    source = Path(run).expanduser()
    refuse_links(run_of(source), "run", str(source))
    config = {**read_config(run_of(source)), "callbacks": {}, "logger": {}, "allow": list(allow)}
    config = confine(config, {"runs": "runs", "data": os.path.expanduser(default_cache())})
    return validate(config)  # also fills in settings that are newer than the run


@torch.no_grad()
def attention_maps(model: Transformer, tokens_BT: Tensor) -> Tensor:
    """Return the softmax weights of every layer and head, (L, B, H, T, S).

    Each layer's attention function is replaced during one forward pass: with the identity as values, the reference formula returns the weights.
    """
    maps: list[Tensor] = []

    def record(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Mask, bias: Tensor | None = None, dropout: float = 0.0) -> Tensor:
        S = k_BKSD.shape[2]
        identity_BKSS = torch.eye(S, device=q_BHTD.device, dtype=q_BHTD.dtype).expand(*k_BKSD.shape[:2], S, S)
        maps.append(attend_reference(q_BHTD, k_BKSD, identity_BKSS, mask, bias))
        return attend_reference(q_BHTD, k_BKSD, v_BKSD, mask, bias)

    layers = [module for module in model.modules() if isinstance(module, Attention)]
    before = [layer.attend for layer in layers]
    try:
        for layer in layers:
            layer.attend = record
        model(tokens_BT)
    finally:
        for layer, attend in zip(layers, before, strict=True):
            layer.attend = attend
    return torch.stack(maps)


@torch.no_grad()
def loss_by_position(run: Path | str, length: int, windows: int = 64, allow: Sequence[str] = ()) -> Tensor:
    """Return the mean loss (nats) at each of `length` positions, shape (length,), over `windows` equally spaced windows of the validation data.

    With learned positions the result is cut off at the trained length.
    """
    source = Path(run).expanduser()
    task = load_model(source, allow)
    data = build_data(read_settings(source, allow), task.tokenizer)
    tokens = data.prepared.tokens("val")
    starts = torch.linspace(0, len(tokens) - length - 1, windows).long().tolist()
    if isinstance(task.model.position, Learned):
        length = min(length, task.model.context_length)
    text_BT = torch.stack([torch.from_numpy(tokens[s : s + length + 1].astype("int64")) for s in starts])
    total_T = torch.zeros(length, dtype=torch.float64)
    for part_BT in text_BT.split(max(1, 8192 // length)):
        logits_BTV = task.model(part_BT[:, :-1])
        total_T += F.cross_entropy(logits_BTV.float().transpose(1, 2), part_BT[:, 1:], reduction="none").double().sum(0)
    return total_T / windows


def training_flops(run: Path | str, allow: Sequence[str] = ()) -> int:
    """Return the training FLOPs per token of the run's model at its context length; see `model/count.py`."""
    config = read_settings(run, allow)
    with torch.device("meta"):
        model = build_model(config)
    return training_flops_per_token(model, config["data"]["context_length"])
